// Segmented attention over arrays that the caller allocated.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <optional>
#include <string>

#include "attention/cuda/heuristics.hpp"
#include "attention/cuda/segmented_attention.hpp"
#include "attention/segmented_attention.hpp"
#include "python/array_reader.hpp"
#include "python/bindings.hpp"
#include "python/tensor_arg.hpp"

namespace py = pybind11;

namespace l3ext::python {
namespace {

void run(const ArrayReader& read, const SegmentedAttentionParams& params, const CudaQueue& queue) {
  if (read.on_host()) {
    py::gil_scoped_release release;
    return segmented_attention(params);
  }
  read.run_on_cuda(
      queue, [&] { return cuda::segmented_attention_workspace(params); },
      [&](const cuda::Launch& launch) { cuda::segmented_attention(params, launch); });
}

void run(const ArrayReader& read, const SegmentedAttentionBackwardParams& params,
         const CudaQueue& queue) {
  if (read.on_host()) {
    py::gil_scoped_release release;
    return segmented_attention_backward(params);
  }
  read.run_on_cuda(
      queue, [&] { return cuda::segmented_attention_backward_workspace(params); },
      [&](const cuda::Launch& launch) { cuda::segmented_attention_backward(params, launch); });
}

void check_quantized(const ArrayReader& read, DType dtype) {
  if (read.on_host()) return;
  throw Error(ErrorCode::kType, concat("keys: expected float32, bfloat16 or float16 on a CUDA "
                                       "device, got ",
                                       dtype_name(dtype)));
}

// Without `values` they lie behind the keys, in the same rows.
void read_table(SegmentedAttentionInputs& inputs, const ArrayReader& read, const TensorArg& x,
                const TensorArg& keys, const TensorArg* values, const PlanArg& plan) {
  inputs.dtype = x->dtype;
  const DType rows = inputs.quantization ? inputs.quantization->dtype : inputs.dtype;
  inputs.keys = read.rows(keys, "keys", rows, -1, -1);
  inputs.table_rows = keys->shape[0];
  if (values != nullptr) {
    inputs.d_in = keys->shape[1];
    inputs.values = read.rows(*values, "values", rows, inputs.table_rows, -1);
    inputs.d_emb = (*values)->shape[1];
  } else {
    inputs.d_in = x->ndim == 2 ? x->shape[1] : 0;
    inputs.d_emb = keys->shape[1] - inputs.d_in;
    L3EXT_CHECK(inputs.d_emb > 0, "keys: expected more columns than the ", inputs.d_in,
                " of x, as the values lie behind the keys, got ", keys->shape[1]);
    const auto* first = static_cast<const std::byte*>(inputs.keys.data);
    inputs.values = {first + inputs.d_in * dtype_bytes(rows), inputs.keys.stride};
  }
  inputs.plan = read.plan(plan, inputs.table_rows);
  inputs.x = read.rows(x, "x", inputs.dtype, inputs.plan.num_tokens, inputs.d_in);
}

void forward(const TensorArg& x, const TensorArg& keys, const std::optional<TensorArg>& values,
             const PlanArg& plan, double scale, int num_threads, const TensorArg& y,
             const CudaQueue& queue, const std::optional<TensorArg>& key_scales,
             const std::optional<TensorArg>& value_scales) {
  const ArrayReader read(x, "x");
  SegmentedAttentionParams params;
  L3EXT_CHECK(
      key_scales.has_value() == is_quantized(keys->dtype) &&
          value_scales.has_value() == is_quantized(keys->dtype),
      "key_scales, value_scales: expected them for keys of float8_e4m3fn and int8 alone, got ",
      key_scales ? "" : "no ", "key_scales and ", value_scales ? "" : "no ",
      "value_scales for keys of ", dtype_name(keys->dtype));
  if (key_scales && value_scales) {
    L3EXT_CHECK(values, "values: expected an array beside keys of ", dtype_name(keys->dtype),
                ", got None");
    check_quantized(read, keys->dtype);
    const int64_t rows = keys->ndim > 0 ? keys->shape[0] : 0;
    params.quantization = {.dtype = keys->dtype,
                           .keys = read.scales(*key_scales, "key_scales", rows),
                           .values = read.scales(*value_scales, "value_scales", rows)};
  }
  read_table(params, read, x, keys, values ? &*values : nullptr, plan);
  params.scale = scale;
  params.num_threads = num_threads;
  params.y = read.mutable_rows(y, "y", params.dtype, params.plan.num_tokens, params.d_emb);
  run(read, params, queue);
}

void directory_forward(const TensorArg& x, const TensorArg& directory, const PlanArg& plan,
                       int64_t row_stride, int64_t value_offset, double scale, int num_threads,
                       const TensorArg& y, const CudaQueue& queue,
                       const std::optional<std::string>& row_dtype, int64_t scale_offset,
                       int spare_multiprocessors) {
  const ArrayReader read(x, "x");
  SegmentedAttentionParams params;
  params.dtype = x->dtype;
  if (row_dtype) {
    const std::optional<DType> dtype = quantized_dtype(*row_dtype);
    L3EXT_CHECK(dtype, "row_dtype: expected float8_e4m3fn or int8, got ", *row_dtype);
    params.quantization.emplace();
    params.quantization->dtype = *dtype;
    params.quantization->scale_offset = scale_offset;
    check_quantized(read, params.quantization->dtype);
  }
  params.plan = read.plan(plan, std::nullopt);
  params.x = read.rows(x, "x", params.dtype, params.plan.num_tokens, -1);
  params.d_in = x->shape[1];
  params.directory = read.array<const int64_t>(directory, "directory", DType::kInt64, {-1});
  params.vocab_size = directory->shape[0];
  params.keys.stride = params.values.stride = row_stride;
  params.value_offset = value_offset;
  params.scale = scale;
  params.num_threads = num_threads;
  params.spare_multiprocessors = spare_multiprocessors;
  params.y = read.mutable_rows(y, "y", params.dtype, params.plan.num_tokens, -1);
  params.d_emb = y->shape[1];
  run(read, params, queue);
}

void backward(const TensorArg& dy, const TensorArg& x, const TensorArg& keys,
              const TensorArg& values, const PlanArg& plan, double scale, int num_threads,
              const std::optional<TensorArg>& segment_gradients, const std::optional<TensorArg>& dx,
              const std::optional<TensorArg>& dkeys, const std::optional<TensorArg>& dvalues,
              const CudaQueue& queue) {
  const ArrayReader read(x, "x");
  SegmentedAttentionBackwardParams params;
  read_table(params, read, x, keys, &values, plan);
  params.scale = scale;
  params.num_threads = num_threads;
  const DType dtype = params.dtype;
  const int64_t n = params.plan.num_tokens;
  params.dy = read.rows(dy, "dy", dtype, n, params.d_emb);
  if (dx) params.dx = read.mutable_rows(*dx, "dx", dtype, n, params.d_in);
  int64_t rows = params.table_rows;
  if (segment_gradients && dkeys) {
    const int64_t segments =
        plan.segment_rows->shape[0];  // as many as segment_rows has entries for
    params.segment_gradients = read.array<const int64_t>(*segment_gradients, "segment_gradients",
                                                         DType::kInt64, {segments});
    params.gradient_rows = rows = dkeys->view().shape[0];
  }
  if (dkeys) params.dkeys = read.mutable_rows(*dkeys, "dkeys", dtype, rows, params.d_in);
  if (dvalues) {
    params.dvalues = read.mutable_rows(*dvalues, "dvalues", dtype, rows, params.d_emb);
  } else {
    L3EXT_CHECK(!dkeys || params.d_in == params.d_emb,
                "dvalues: a tied table needs d_in == d_emb, got ", params.d_in, " and ",
                params.d_emb);
  }
  run(read, params, queue);
}

}  // namespace

void bind_attention(py::module_& module) {
  module.def("segmented_attention", forward, py::arg("x"), py::arg("keys"), py::arg("values"),
             py::arg("plan"), py::arg("scale"), py::arg("num_threads"), py::arg("y"),
             py::arg("queue"), py::arg("key_scales") = py::none(),
             py::arg("value_scales") = py::none());
  module.def("directory_attention", directory_forward, py::arg("x"), py::arg("directory"),
             py::arg("plan"), py::arg("row_stride"), py::arg("value_offset"), py::arg("scale"),
             py::arg("num_threads"), py::arg("y"), py::arg("queue"),
             py::arg("row_dtype") = py::none(), py::arg("scale_offset") = 0,
             py::arg("spare_multiprocessors") = 0);
  module.def("segmented_attention_backward", backward, py::arg("dy"), py::arg("x"), py::arg("keys"),
             py::arg("values"), py::arg("plan"), py::arg("scale"), py::arg("num_threads"),
             py::arg("segment_gradients"), py::arg("dx"), py::arg("dkeys"), py::arg("dvalues"),
             py::arg("queue"));
  // Without arguments: as it was.
  module.def(
      "tune_cuda",
      [](int most_forward_tiles, int most_backward_tiles, int64_t most_decode_tokens,
         int decode_turns, bool slabs) {
        L3EXT_CHECK(decode_turns >= 1, "decode_turns: expected 1 or more, got ", decode_turns);
        L3EXT_CHECK(most_decode_tokens <= cuda::kDecodeTokens,
                    "most_decode_tokens: expected at most ", cuda::kDecodeTokens, ", got ",
                    most_decode_tokens);
        cuda::tuning() = {most_forward_tiles, most_backward_tiles, most_decode_tokens, decode_turns,
                          slabs};
      },
      py::kw_only(), py::arg("most_forward_tiles") = cuda::Tuning{}.most_forward_tiles,
      py::arg("most_backward_tiles") = cuda::Tuning{}.most_backward_tiles,
      py::arg("most_decode_tokens") = cuda::Tuning{}.most_decode_tokens,
      py::arg("decode_turns") = cuda::Tuning{}.decode_turns,
      py::arg("slabs") = cuda::Tuning{}.slabs);
}

}  // namespace l3ext::python
