#include "python/array_reader.hpp"

#include <algorithm>
#include <array>
#include <iterator>

#include "core/error.hpp"

namespace py = pybind11;

namespace l3ext::python {

PlanArg PlanArg::from_object(py::handle object) {
  static constexpr const char* kFields[] = {"permutation",  "segment_tokens", "segment_queries",
                                            "segment_rows", "num_segments",   "table_rows",
                                            "schedule",     "max_rows"};
  PlanArg arg;
  if (PyTuple_CheckExact(object.ptr()) || PyList_CheckExact(object.ptr())) {
    const auto fields = py::reinterpret_borrow<py::sequence>(object);
    if (fields.size() != std::size(kFields)) {
      throw Error(ErrorCode::kType, concat("plan: expected ", std::size(kFields),
                                           " fields, those of l3ext.Plan, got ", fields.size()));
    }
    for (size_t i = 0; i < std::size(kFields); ++i) arg.fields_[i] = fields[i];
  } else {
    // Interned once: a name made anew would be hashed in every call.
    static const auto names = [] {
      std::array<PyObject*, std::size(kFields)> interned;
      std::ranges::transform(kFields, interned.begin(), PyUnicode_InternFromString);
      return interned;
    }();
    for (size_t i = 0; i < std::size(kFields); ++i) {
      arg.fields_[i] = py::reinterpret_steal<py::object>(PyObject_GetAttr(object.ptr(), names[i]));
      if (arg.fields_[i].ptr() != nullptr) continue;
      PyErr_Clear();
      throw Error(ErrorCode::kType,
                  concat("plan: expected l3ext.Plan, got ", Py_TYPE(object.ptr())->tp_name));
    }
  }
  TensorArg* const arrays[] = {&arg.permutation,  &arg.segment_tokens, &arg.segment_queries,
                               &arg.segment_rows, &arg.num_segments,   &arg.table_rows,
                               &arg.schedule};
  for (size_t i = 0; i < std::size(arrays); ++i) {
    *arrays[i] = TensorArg::from_object(arg.fields_[i]);
  }
  arg.max_rows = arg.fields_[std::size(arrays)].cast<int64_t>();
  return arg;
}

ArrayReader::ArrayReader(const TensorArg& first, const char* argument)
    : place_(first->place), first_(argument) {
  if (place_.kind == Place::Kind::kOther) {
    throw Error(ErrorCode::kType,
                concat(argument, ": expected an array in host memory or on a CUDA device, got one ",
                       place_name(place_)));
  }
}

void ArrayReader::check_place(const TensorView& tensor, const char* argument) const {
  if (tensor.place == place_) return;
  throw Error(ErrorCode::kType,
              concat(argument, ": expected an array ", place_name(place_), ", where ", first_,
                     " lies, got one ", place_name(tensor.place)));
}

void ArrayReader::check_array(const TensorView& tensor, const char* argument, DType dtype,
                              std::initializer_list<int64_t> shape) const {
  check_place(tensor, argument);
  check_dtype(tensor, argument, dtype);
  check_shape(tensor, argument, shape);
  check_contiguous(tensor, argument);
}

Rows ArrayReader::rows(const TensorArg& tensor, const char* argument, DType dtype, int64_t rows,
                       int64_t width) const {
  check_place(tensor.view(), argument);
  check_dtype(tensor.view(), argument, dtype);
  check_shape(tensor.view(), argument, {rows, width});
  // Of no rows there is nothing to read, and a gradient that was expanded has no strides then.
  L3EXT_CHECK(tensor->shape[0] == 0 || tensor->shape[1] <= 1 || tensor->strides[1] == 1, argument,
              ": expected rows of adjacent elements, got stride ", tensor->strides[1],
              " in the last dimension");
  // Producers set the stride of a single row to anything, as it leads nowhere.
  return {tensor->data, tensor->shape[0] > 1 ? tensor->strides[0] : tensor->shape[1]};
}

MutableRows ArrayReader::mutable_rows(const TensorArg& tensor, const char* argument, DType dtype,
                                      int64_t rows, int64_t width) const {
  check_writable(tensor.view(), argument);
  return {tensor->data, this->rows(tensor, argument, dtype, rows, width).stride};
}

RowScales ArrayReader::scales(const TensorArg& tensor, const char* argument, int64_t rows) const {
  check_place(tensor.view(), argument);
  check_dtype(tensor.view(), argument, DType::kFloat32);
  check_shape(tensor.view(), argument, {rows});
  return {tensor->as<const std::byte>(), tensor->strides[0] * static_cast<int64_t>(sizeof(float))};
}

PlanView ArrayReader::plan(const PlanArg& arrays, std::optional<int64_t> table_rows) const {
  PlanView plan;
  plan.permutation = array<int32_t>(arrays.permutation, "plan.permutation", DType::kInt32, {-1});
  const int64_t n = plan.num_tokens = arrays.permutation->shape[0];
  plan.segment_tokens =
      array<int32_t>(arrays.segment_tokens, "plan.segment_tokens", DType::kInt32, {n});
  plan.segment_queries =
      array<int32_t>(arrays.segment_queries, "plan.segment_queries", DType::kInt32, {n + 1});
  plan.segment_rows =
      array<int64_t>(arrays.segment_rows, "plan.segment_rows", DType::kInt64, {-1, 2});
  const auto* segments =
      array<int32_t>(arrays.num_segments, "plan.num_segments", DType::kInt32, {1});
  const auto* expected = array<int64_t>(arrays.table_rows, "plan.table_rows", DType::kInt64, {1});
  plan.schedule =
      array<int32_t>(arrays.schedule, "plan.schedule", DType::kInt32, {schedule_size(n)});
  plan.max_rows = arrays.max_rows;
  if (!on_host()) return plan;
  L3EXT_CHECK(!table_rows || *expected < 0 || *expected == *table_rows, "keys: expected ",
              *expected, " rows, as many as the offsets end at, got ", table_rows.value_or(0));
  plan.num_segments = *segments;
  L3EXT_CHECK(plan.num_segments <= arrays.segment_rows->shape[0], "plan.segment_rows: expected ",
              plan.num_segments, " segments or more, got ", arrays.segment_rows->shape[0]);
  return plan;
}

}  // namespace l3ext::python
