// The arrays of one call, checked against each other: all in host memory or all on one CUDA device.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <utility>

#include "attention/cuda/schedule.hpp"
#include "attention/cuda/segmented_attention.hpp"
#include "attention/segmented_attention.hpp"
#include "core/cuda_devices.hpp"
#include "core/tensor_view.hpp"
#include "python/tensor_arg.hpp"

namespace l3ext::python {

// A l3ext.Plan, or a sequence of its fields in their order.
class PlanArg {
 public:
  // Throws kType where `object` is neither.
  static PlanArg from_object(pybind11::handle object);

  TensorArg permutation, segment_tokens, segment_queries, segment_rows, num_segments, table_rows,
      schedule;
  int64_t max_rows = 0;

 private:
  pybind11::object fields_[8];  // what the arrays borrow from
};

// Where work on a device goes: a cudaStream_t, and a function that makes a uint8 array of so many
// bytes for it. Arrays in host memory need neither.
using CudaQueue = std::pair<uintptr_t, pybind11::function>;

class ArrayReader {
 public:
  // The first array says where the others must lie. Keep the name alive.
  ArrayReader(const TensorArg& first, const char* argument);

  bool on_host() const { return place_.on_host(); }
  int cuda_device() const { return place_.index; }

  // A [rows, width] matrix of `dtype` whose rows may be strided; -1: any number.
  Rows rows(const TensorArg& tensor, const char* argument, DType dtype, int64_t rows,
            int64_t width) const;
  MutableRows mutable_rows(const TensorArg& tensor, const char* argument, DType dtype, int64_t rows,
                           int64_t width) const;

  // A float32 for each of `rows` rows.
  RowScales scales(const TensorArg& tensor, const char* argument, int64_t rows) const;

  // A contiguous array; -1: any length.
  template <typename T>
  T* array(const TensorArg& tensor, const char* argument, DType dtype,
           std::initializer_list<int64_t> shape) const {
    check_array(tensor.view(), argument, dtype, shape);
    return tensor->as<T>();
  }

  // Entries of the schedule of `num_tokens` tokens: the CPU needs none.
  int64_t schedule_size(int64_t num_tokens) const {
    return on_host() ? 0 : cuda::schedule_entries(num_tokens);
  }

  // `table_rows`: of the table that the plan shall fit; none: rows lie elsewhere. What only the
  // data shows is checked in host memory alone: reading it from a device would wait for it.
  PlanView plan(const PlanArg& arrays, std::optional<int64_t> table_rows) const;

  // Calls run(launch) with the arrays' CUDA device current, without the GIL, and with the
  // workspace_bytes() that it needs.
  template <typename WorkspaceBytes, typename Run>
  void run_on_cuda(const CudaQueue& queue, const WorkspaceBytes& workspace_bytes,
                   const Run& run) const {
    const CudaDeviceGuard guard(cuda_device());
    cuda::Launch launch;
    // NOLINTNEXTLINE(performance-no-int-to-ptr): Python knows a stream as a number.
    launch.stream = reinterpret_cast<void*>(queue.first);
    launch.workspace_bytes = workspace_bytes();
    // Held until the launch is enqueued; after that the allocator keeps the order of the stream.
    const pybind11::object workspace = queue.second(launch.workspace_bytes);
    const TensorArg view = TensorArg::from_object(workspace);
    launch.workspace = array<std::byte>(view, "workspace", DType::kUInt8, {launch.workspace_bytes});
    pybind11::gil_scoped_release release;
    run(launch);
  }

 private:
  void check_place(const TensorView& tensor, const char* argument) const;
  void check_array(const TensorView& tensor, const char* argument, DType dtype,
                   std::initializer_list<int64_t> shape) const;

  Place place_;
  const char* first_;
};

}  // namespace l3ext::python

namespace pybind11::detail {

template <>
struct type_caster<l3ext::python::PlanArg> {
  PYBIND11_TYPE_CASTER(l3ext::python::PlanArg, const_name("Plan"));
  bool load(handle source, bool) {
    value = l3ext::python::PlanArg::from_object(source);
    return true;
  }
};

}  // namespace pybind11::detail
