#include "python/tensor_arg.hpp"

#include <string>

namespace py = pybind11;

namespace l3ext::python {
namespace {

[[noreturn]] void fail(const std::string& message) { throw Error(ErrorCode::kType, message); }

DType dtype_of(const DLDataType& type) {
  if (type.lanes == 1) {
    if (type.code == kDLFloat && type.bits == 64) return DType::kFloat64;
    if (type.code == kDLFloat && type.bits == 32) return DType::kFloat32;
    if (type.code == kDLFloat && type.bits == 16) return DType::kFloat16;
    if (type.code == kDLBfloat && type.bits == 16) return DType::kBFloat16;
    if (type.code == kDLInt && type.bits == 64) return DType::kInt64;
    if (type.code == kDLInt && type.bits == 32) return DType::kInt32;
    if (type.code == kDLFloat8_e4m3fn && type.bits == 8) return DType::kFloat8E4M3;
    if (type.code == kDLInt && type.bits == 8) return DType::kInt8;
    if (type.code == kDLUInt && type.bits == 8) return DType::kUInt8;
  }
  fail(
      concat("array: expected dtype float64, float32, bfloat16, float16, float8_e4m3fn, int64, "
             "int32, int8 or uint8, got DLPack code ",
             int{type.code}, " with ", int{type.bits}, " bits"));
}

Place place_of(const DLDevice& device) {
  switch (device.device_type) {
    case kDLCPU:
    case kDLCUDAHost:
      return {Place::Kind::kHost, 0};
    case kDLCUDA:
    case kDLCUDAManaged:
      return {Place::Kind::kCuda, device.device_id};
    default:
      return {Place::Kind::kOther, 0};
  }
}

TensorView view_of(const DLTensor& tensor) {
  TensorView view;
  if (tensor.ndim > TensorView::kMaxDims) {
    fail(
        concat("array: expected at most ", TensorView::kMaxDims, " dimensions, got ", tensor.ndim));
  }
  view.dtype = dtype_of(tensor.dtype);
  view.place = place_of(tensor.device);
  view.ndim = tensor.ndim;
  view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  int64_t packed = 1;
  for (int i = tensor.ndim - 1; i >= 0; --i) {
    view.shape[i] = tensor.shape[i];
    view.strides[i] = tensor.strides != nullptr ? tensor.strides[i] : packed;
    packed *= tensor.shape[i];
  }
  return view;
}

const DLPackExchangeAPI* exchange_api_of(PyTypeObject* type) {
  PyObject* capsule =
      PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  if (capsule == nullptr) {
    PyErr_Clear();
    return nullptr;
  }
  auto* api = static_cast<const DLPackExchangeAPI*>(
      PyCapsule_CheckExact(capsule) ? PyCapsule_GetPointer(capsule, "dlpack_exchange_api")
                                    : nullptr);
  if (api == nullptr) PyErr_Clear();
  Py_DECREF(capsule);  // the table is static: the capsule does not own it
  if (api == nullptr || api->header.version.major != DLPACK_MAJOR_VERSION) return nullptr;
  return api;
}

// torch >= 2.11: a C function table on the type, no capsule and no Python call per tensor.
const DLPackExchangeAPI* exchange_api(py::handle object) {
  // Of the type that had one last, under the GIL. Kept alive: another one could have its address.
  static PyTypeObject* known = nullptr;
  static const DLPackExchangeAPI* its_api = nullptr;
  PyTypeObject* const type = Py_TYPE(object.ptr());
  if (type == known) return its_api;
  const DLPackExchangeAPI* const api = exchange_api_of(type);
  if (api == nullptr) return nullptr;
  Py_INCREF(type);
  its_api = api;
  Py_XDECREF(std::exchange(known, type));
  return api;
}

bool on_cuda(py::handle object) {
  const py::object method = py::getattr(object, "__dlpack_device__", py::none());
  if (method.is_none()) return false;
  const auto type = method().cast<py::tuple>()[0].cast<int>();
  return type == kDLCUDA || type == kDLCUDAManaged;
}

py::object call_dlpack(py::handle object) {
  py::object method = py::getattr(object, "__dlpack__", py::none());
  if (method.is_none()) {
    fail(
        concat("array: expected a torch tensor, a NumPy array or another object with "
               "__dlpack__, got ",
               Py_TYPE(object.ptr())->tp_name));
  }
  py::dict options;
  options["max_version"] = py::make_tuple(1, 0);
  // Work on a device goes to the stream that the caller names beside the array: the producer is not
  // to wait for another one (-1), which a graph capture would not survive.
  if (on_cuda(object)) options["stream"] = -1;
  try {
    return method(**options);
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;
  }
  return method();  // a producer that predates DLPack 1.0
}

}  // namespace

TensorArg TensorArg::from_object(py::handle object) {
  TensorArg arg;
  if (const DLPackExchangeAPI* api = exchange_api(object);
      api != nullptr && api->dltensor_from_py_object_no_sync != nullptr) {
    DLTensor tensor;
    if (api->dltensor_from_py_object_no_sync(object.ptr(), &tensor) != 0) {
      throw py::error_already_set();
    }
    arg.view_ = view_of(tensor);
    return arg;
  }
  py::object capsule = call_dlpack(object);
  if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned")) {
    auto* managed = static_cast<DLManagedTensorVersioned*>(
        PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
    PyCapsule_SetName(capsule.ptr(), "used_dltensor_versioned");
    arg.versioned_ = managed;
    if (managed->version.major != DLPACK_MAJOR_VERSION) fail("array: unknown DLPack version");
    arg.view_ = view_of(managed->dl_tensor);
    arg.view_.read_only = managed->flags & DLPACK_FLAG_BITMASK_READ_ONLY;
  } else if (PyCapsule_IsValid(capsule.ptr(), "dltensor")) {
    auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
    PyCapsule_SetName(capsule.ptr(), "used_dltensor");
    arg.managed_ = managed;
    arg.view_ = view_of(managed->dl_tensor);
  } else {
    fail("array: __dlpack__ returned something that is no DLPack capsule");
  }
  return arg;
}

void check_host(const TensorView& tensor, const char* argument) {
  if (!tensor.place.on_host()) {
    throw Error(ErrorCode::kType, concat(argument, ": expected an array in host memory, got one ",
                                         place_name(tensor.place)));
  }
}

void check_dtype(const TensorView& tensor, const char* argument, DType dtype) {
  if (tensor.dtype != dtype) {
    throw Error(ErrorCode::kType, concat(argument, ": expected ", dtype_name(dtype), ", got ",
                                         dtype_name(tensor.dtype)));
  }
}

void check_shape(const TensorView& tensor, const char* argument,
                 std::initializer_list<int64_t> shape) {
  bool equal = tensor.ndim == static_cast<int>(shape.size());
  int i = 0;
  for (const int64_t length : shape) {
    equal = equal && (length < 0 || tensor.shape[i] == length);
    ++i;
  }
  if (equal) return;
  std::string expected, got;
  for (const int64_t length : shape) {
    expected += concat(expected.empty() ? "" : ", ", length < 0 ? "*" : std::to_string(length));
  }
  for (i = 0; i < tensor.ndim; ++i) got += concat(i == 0 ? "" : ", ", tensor.shape[i]);
  throw Error(ErrorCode::kValue,
              concat(argument, ": expected shape [", expected, "], got [", got, "]"));
}

void check_contiguous(const TensorView& tensor, const char* argument) {
  L3EXT_CHECK(tensor.contiguous(), argument, ": expected a contiguous array, got a strided one");
}

void check_writable(const TensorView& tensor, const char* argument) {
  L3EXT_CHECK(!tensor.read_only, argument, ": expected a writable array, got a read-only one");
}

}  // namespace l3ext::python
