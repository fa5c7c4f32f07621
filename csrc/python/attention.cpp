// Plan and segmented attention over arrays that the caller allocated.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>

#include "attention/plan.hpp"
#include "attention/segmented_attention.hpp"
#include "python/bindings.hpp"
#include "python/tensor_arg.hpp"

namespace py = pybind11;

namespace l3ext::python {
namespace {

// A [n, width] matrix of `dtype` whose rows may be strided; width or rows -1: any.
Rows rows_of(const TensorArg& tensor, const char* argument, DType dtype, int64_t rows,
             int64_t width) {
  check_host(tensor.view(), argument);
  check_dtype(tensor.view(), argument, dtype);
  check_shape(tensor.view(), argument, {rows, width});
  L3EXT_CHECK(tensor->shape[1] <= 1 || tensor->strides[1] == 1, argument,
              ": expected rows of adjacent elements, got stride ", tensor->strides[1],
              " in the last dimension");
  return {tensor->data, tensor->strides[0]};
}

MutableRows mutable_rows_of(const TensorArg& tensor, const char* argument, DType dtype,
                            int64_t rows, int64_t width) {
  check_writable(tensor.view(), argument);
  rows_of(tensor, argument, dtype, rows, width);
  return {tensor->data, tensor->strides[0]};
}

template <typename T>
T* array_of(const TensorArg& tensor, const char* argument, DType dtype,
            std::initializer_list<int64_t> shape) {
  check_host(tensor.view(), argument);
  check_dtype(tensor.view(), argument, dtype);
  check_shape(tensor.view(), argument, shape);
  check_contiguous(tensor.view(), argument);
  return tensor->as<T>();
}

// permutation, segment_queries, segment_rows, num_segments, table_rows; see l3ext.Plan.
using PlanArrays = std::array<TensorArg, 5>;

PlanView plan_of(const PlanArrays& arrays, int64_t rows) {
  const auto& [permutation, segment_queries, segment_rows, num_segments, table_rows] = arrays;
  PlanView plan;
  plan.permutation = array_of<int32_t>(permutation, "plan.permutation", DType::kInt32, {-1});
  plan.num_tokens = permutation->shape[0];
  plan.segment_queries = array_of<int32_t>(segment_queries, "plan.segment_queries", DType::kInt32,
                                           {plan.num_tokens + 1});
  plan.segment_rows = array_of<int64_t>(segment_rows, "plan.segment_rows", DType::kInt64, {-1, 2});
  plan.num_segments = *array_of<int32_t>(num_segments, "plan.num_segments", DType::kInt32, {1});
  const int64_t expected = *array_of<int64_t>(table_rows, "plan.table_rows", DType::kInt64, {1});
  L3EXT_CHECK(expected < 0 || expected == rows, "keys: expected ", expected,
              " rows, as many as the offsets end at, got ", rows);
  L3EXT_CHECK(plan.num_segments <= segment_rows->shape[0], "plan.segment_rows: expected ",
              plan.num_segments, " segments or more, got ", segment_rows->shape[0]);
  return plan;
}

void read_inputs(SegmentedAttentionInputs& inputs, const TensorArg& x, const TensorArg& keys,
                 const TensorArg& values, const PlanArrays& plan, double scale, int num_threads) {
  inputs.dtype = x->dtype;
  inputs.keys = rows_of(keys, "keys", inputs.dtype, -1, -1);
  inputs.table_rows = keys->shape[0];
  inputs.d_in = keys->shape[1];
  inputs.values = rows_of(values, "values", inputs.dtype, inputs.table_rows, -1);
  inputs.d_emb = values->shape[1];
  inputs.plan = plan_of(plan, inputs.table_rows);
  inputs.x = rows_of(x, "x", inputs.dtype, inputs.plan.num_tokens, inputs.d_in);
  inputs.scale = scale;
  inputs.num_threads = num_threads;
}

void bind_plan(const TensorArg& token_ids, const TensorArg& offsets, bool check_offsets,
               const TensorArg& permutation, const TensorArg& segment_tokens,
               const TensorArg& segment_queries, const TensorArg& segment_rows,
               const TensorArg& num_segments, const TensorArg& table_rows) {
  PlanParams params;
  check_host(token_ids.view(), "token_ids");
  check_shape(token_ids.view(), "token_ids", {-1});
  check_contiguous(token_ids.view(), "token_ids");
  params.token_ids = token_ids->data;
  params.token_dtype = token_ids->dtype;
  params.num_tokens = token_ids->shape[0];
  params.offsets = array_of<const int64_t>(offsets, "offsets", DType::kInt64, {-1});
  L3EXT_CHECK(offsets->shape[0] >= 1, "offsets: expected vocab_size + 1 entries, got 0");
  params.vocab_size = offsets->shape[0] - 1;
  params.check_offsets = check_offsets;
  const int64_t n = params.num_tokens;
  params.permutation = array_of<int32_t>(permutation, "permutation", DType::kInt32, {n});
  params.segment_tokens = array_of<int32_t>(segment_tokens, "segment_tokens", DType::kInt32, {n});
  params.segment_queries =
      array_of<int32_t>(segment_queries, "segment_queries", DType::kInt32, {n + 1});
  params.segment_rows = array_of<int64_t>(segment_rows, "segment_rows", DType::kInt64, {n, 2});
  params.num_segments = array_of<int32_t>(num_segments, "num_segments", DType::kInt32, {1});
  params.table_rows = array_of<int64_t>(table_rows, "table_rows", DType::kInt64, {1});
  py::gil_scoped_release release;
  plan(params);
}

void bind_forward(const TensorArg& x, const TensorArg& keys, const TensorArg& values,
                  const PlanArrays& plan, double scale, int num_threads, const TensorArg& y) {
  SegmentedAttentionParams params;
  read_inputs(params, x, keys, values, plan, scale, num_threads);
  params.y = mutable_rows_of(y, "y", params.dtype, params.plan.num_tokens, params.d_emb);
  py::gil_scoped_release release;
  segmented_attention(params);
}

void bind_backward(const TensorArg& dy, const TensorArg& x, const TensorArg& keys,
                   const TensorArg& values, const PlanArrays& plan, double scale, int num_threads,
                   const std::optional<TensorArg>& dx, const std::optional<TensorArg>& dkeys,
                   const std::optional<TensorArg>& dvalues) {
  SegmentedAttentionBackwardParams params;
  read_inputs(params, x, keys, values, plan, scale, num_threads);
  const int64_t n = params.plan.num_tokens, rows = params.table_rows;
  params.dy = rows_of(dy, "dy", params.dtype, n, params.d_emb);
  if (dx) params.dx = mutable_rows_of(*dx, "dx", params.dtype, n, params.d_in);
  if (dkeys) params.dkeys = mutable_rows_of(*dkeys, "dkeys", params.dtype, rows, params.d_in);
  if (dvalues) {
    params.dvalues = mutable_rows_of(*dvalues, "dvalues", params.dtype, rows, params.d_emb);
  } else {
    L3EXT_CHECK(!dkeys || params.d_in == params.d_emb,
                "dvalues: a tied table needs d_in == d_emb, got ", params.d_in, " and ",
                params.d_emb);
  }
  py::gil_scoped_release release;
  segmented_attention_backward(params);
}

}  // namespace

void bind_attention(py::module_& module) {
  module.def("plan", bind_plan, py::arg("token_ids"), py::arg("offsets"), py::arg("check_offsets"),
             py::arg("permutation"), py::arg("segment_tokens"), py::arg("segment_queries"),
             py::arg("segment_rows"), py::arg("num_segments"), py::arg("table_rows"));
  module.def("segmented_attention", bind_forward, py::arg("x"), py::arg("keys"), py::arg("values"),
             py::arg("plan"), py::arg("scale"), py::arg("num_threads"), py::arg("y"));
  module.def("segmented_attention_backward", bind_backward, py::arg("dy"), py::arg("x"),
             py::arg("keys"), py::arg("values"), py::arg("plan"), py::arg("scale"),
             py::arg("num_threads"), py::arg("dx"), py::arg("dkeys"), py::arg("dvalues"));
}

}  // namespace l3ext::python
