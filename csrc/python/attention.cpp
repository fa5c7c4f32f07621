// Segmented attention over arrays that the caller allocated.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

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

void read_table(SegmentedAttentionInputs& inputs, const ArrayReader& read, const TensorArg& x,
                const TensorArg& keys, const TensorArg& values, const PlanArrays& plan,
                int64_t max_rows) {
  inputs.dtype = x->dtype;
  inputs.keys = read.rows(keys, "keys", inputs.dtype, -1, -1);
  inputs.table_rows = keys->shape[0];
  inputs.d_in = keys->shape[1];
  inputs.values = read.rows(values, "values", inputs.dtype, inputs.table_rows, -1);
  inputs.d_emb = values->shape[1];
  inputs.plan = read.plan(plan, max_rows, inputs.table_rows);
  inputs.x = read.rows(x, "x", inputs.dtype, inputs.plan.num_tokens, inputs.d_in);
}

void forward(const TensorArg& x, const TensorArg& keys, const TensorArg& values,
             const PlanArrays& plan, int64_t max_rows, double scale, int num_threads,
             const TensorArg& y, const CudaQueue& queue) {
  const ArrayReader read(x, "x");
  SegmentedAttentionParams params;
  read_table(params, read, x, keys, values, plan, max_rows);
  params.scale = scale;
  params.num_threads = num_threads;
  params.y = read.mutable_rows(y, "y", params.dtype, params.plan.num_tokens, params.d_emb);
  run(read, params, queue);
}

void directory_forward(const TensorArg& x, const TensorArg& directory, const PlanArrays& plan,
                       int64_t max_rows, int64_t row_stride, int64_t value_offset, double scale,
                       int num_threads, const TensorArg& y, const CudaQueue& queue) {
  const ArrayReader read(x, "x");
  SegmentedAttentionParams params;
  params.dtype = x->dtype;
  params.plan = read.plan(plan, max_rows, std::nullopt);
  params.x = read.rows(x, "x", params.dtype, params.plan.num_tokens, -1);
  params.d_in = x->shape[1];
  params.directory = read.array<const int64_t>(directory, "directory", DType::kInt64, {-1});
  params.vocab_size = directory->shape[0];
  params.keys.stride = params.values.stride = row_stride;
  params.value_offset = value_offset;
  params.scale = scale;
  params.num_threads = num_threads;
  params.y = read.mutable_rows(y, "y", params.dtype, params.plan.num_tokens, -1);
  params.d_emb = y->shape[1];
  run(read, params, queue);
}

void backward(const TensorArg& dy, const TensorArg& x, const TensorArg& keys,
              const TensorArg& values, const PlanArrays& plan, int64_t max_rows, double scale,
              int num_threads, const std::optional<TensorArg>& segment_gradients,
              const std::optional<TensorArg>& dx, const std::optional<TensorArg>& dkeys,
              const std::optional<TensorArg>& dvalues, const CudaQueue& queue) {
  const ArrayReader read(x, "x");
  SegmentedAttentionBackwardParams params;
  read_table(params, read, x, keys, values, plan, max_rows);
  params.scale = scale;
  params.num_threads = num_threads;
  const DType dtype = params.dtype;
  const int64_t n = params.plan.num_tokens;
  params.dy = read.rows(dy, "dy", dtype, n, params.d_emb);
  if (dx) params.dx = read.mutable_rows(*dx, "dx", dtype, n, params.d_in);
  int64_t rows = params.table_rows;
  if (segment_gradients && dkeys) {
    const int64_t segments = plan[3]->shape[0];  // as many as segment_rows has entries for
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
             py::arg("plan"), py::arg("max_rows"), py::arg("scale"), py::arg("num_threads"),
             py::arg("y"), py::arg("queue"));
  module.def("directory_attention", directory_forward, py::arg("x"), py::arg("directory"),
             py::arg("plan"), py::arg("max_rows"), py::arg("row_stride"), py::arg("value_offset"),
             py::arg("scale"), py::arg("num_threads"), py::arg("y"), py::arg("queue"));
  module.def("segmented_attention_backward", backward, py::arg("dy"), py::arg("x"), py::arg("keys"),
             py::arg("values"), py::arg("plan"), py::arg("max_rows"), py::arg("scale"),
             py::arg("num_threads"), py::arg("segment_gradients"), py::arg("dx"), py::arg("dkeys"),
             py::arg("dvalues"), py::arg("queue"));
}

}  // namespace l3ext::python
