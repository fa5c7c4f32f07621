// The plan of a step, and its schedule on a device, into arrays that the caller allocated.
#include "attention/plan.hpp"

#include <pybind11/pybind11.h>

#include "attention/cuda/schedule.hpp"
#include "attention/cuda/segmented_attention.hpp"
#include "python/array_reader.hpp"
#include "python/bindings.hpp"
#include "python/tensor_arg.hpp"

namespace py = pybind11;

namespace l3ext::python {
namespace {

void make_plan(const TensorArg& token_ids, const TensorArg& offsets, bool check_offsets,
               const TensorArg& permutation, const TensorArg& segment_tokens,
               const TensorArg& segment_queries, const TensorArg& segment_rows,
               const TensorArg& num_segments, const TensorArg& table_rows,
               const TensorArg& schedule, const CudaQueue& queue) {
  const ArrayReader read(token_ids, "token_ids");
  PlanParams params;
  check_shape(token_ids.view(), "token_ids", {-1});
  check_contiguous(token_ids.view(), "token_ids");
  params.token_ids = token_ids->data;
  params.token_dtype = token_ids->dtype;
  const int64_t n = params.num_tokens = token_ids->shape[0];
  params.offsets = read.array<const int64_t>(offsets, "offsets", DType::kInt64, {-1});
  L3EXT_CHECK(offsets->shape[0] >= 1, "offsets: expected vocab_size + 1 entries, got 0");
  params.vocab_size = offsets->shape[0] - 1;
  params.check_offsets = check_offsets;
  params.permutation = read.array<int32_t>(permutation, "permutation", DType::kInt32, {n});
  params.segment_tokens = read.array<int32_t>(segment_tokens, "segment_tokens", DType::kInt32, {n});
  params.segment_queries =
      read.array<int32_t>(segment_queries, "segment_queries", DType::kInt32, {n + 1});
  params.segment_rows = read.array<int64_t>(segment_rows, "segment_rows", DType::kInt64, {n, 2});
  params.num_segments = read.array<int32_t>(num_segments, "num_segments", DType::kInt32, {1});
  params.table_rows = read.array<int64_t>(table_rows, "table_rows", DType::kInt64, {1});
  auto* entries = read.array<int32_t>(schedule, "schedule", DType::kInt32, {read.schedule_size(n)});
  if (read.on_host()) {
    py::gil_scoped_release release;
    return plan(params);
  }
  read.run_on_cuda(
      queue, [&] { return cuda::plan_workspace(params); },
      [&](const cuda::Launch& launch) { cuda::plan(params, entries, launch); });
}

void make_schedule(const TensorArg& segment_queries, const TensorArg& segment_rows,
                   const TensorArg& num_segments, const TensorArg& schedule,
                   const CudaQueue& queue) {
  const ArrayReader read(segment_queries, "segment_queries");
  PlanView plan;
  plan.segment_queries =
      read.array<int32_t>(segment_queries, "segment_queries", DType::kInt32, {-1});
  const int64_t n = plan.num_tokens = segment_queries->shape[0] - 1;
  L3EXT_CHECK(n >= 0, "segment_queries: expected num_tokens + 1 entries, got 0");
  plan.segment_rows = read.array<int64_t>(segment_rows, "segment_rows", DType::kInt64, {-1, 2});
  const auto* segments = read.array<int32_t>(num_segments, "num_segments", DType::kInt32, {1});
  auto* entries = read.array<int32_t>(schedule, "schedule", DType::kInt32, {read.schedule_size(n)});
  if (read.on_host()) return;  // the CPU needs none
  read.run_on_cuda(
      queue, [&] { return cuda::schedule_workspace(n); },
      [&](const cuda::Launch& launch) { cuda::schedule(plan, segments, entries, launch); });
}

}  // namespace

void bind_plan(py::module_& module) {
  module.def("plan", make_plan, py::arg("token_ids"), py::arg("offsets"), py::arg("check_offsets"),
             py::arg("permutation"), py::arg("segment_tokens"), py::arg("segment_queries"),
             py::arg("segment_rows"), py::arg("num_segments"), py::arg("table_rows"),
             py::arg("schedule"), py::arg("queue"));
  module.def("schedule", make_schedule, py::arg("segment_queries"), py::arg("segment_rows"),
             py::arg("num_segments"), py::arg("schedule"), py::arg("queue"));
}

}  // namespace l3ext::python
