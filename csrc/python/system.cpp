// Errors, build facts and machine facts.
#include <pybind11/pybind11.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <utility>

#include "core/caching_allocator.hpp"
#include "core/checksum.hpp"
#include "core/cpu_features.hpp"
#include "core/cuda_devices.hpp"
#include "core/dlpack_dtype.hpp"
#include "core/error.hpp"
#include "python/bindings.hpp"
#include "python/dlpack_capsule.hpp"
#include "python/tensor_arg.hpp"
#include "runtime/read_queue.hpp"

namespace py = pybind11;

namespace l3ext::python {
namespace {

// By value: pybind11 fixes the signature.
void translate(std::exception_ptr pointer) {  // NOLINT(performance-unnecessary-value-param)
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const Error& error) {
    switch (error.code()) {
      case ErrorCode::kValue:
        PyErr_SetString(PyExc_ValueError, error.what());
        return;
      case ErrorCode::kType:
        PyErr_SetString(PyExc_TypeError, error.what());
        return;
      case ErrorCode::kIo: {
        // OSError(errno, text, path) becomes FileNotFoundError and friends by itself. A file that
        // is readable but wrong has no errno of its own: EIO is the closest.
        const int code = error.system_errno() != 0 ? error.system_errno() : EIO;
        // A path is bytes; those that are not UTF-8 come out as os.fsdecode() has them.
        const auto path =
            py::reinterpret_steal<py::object>(PyUnicode_DecodeFSDefault(error.path().c_str()));
        const auto text =
            py::reinterpret_steal<py::object>(PyUnicode_DecodeFSDefault(error.what()));
        if (!path || !text) return;
        py::object instance = py::reinterpret_steal<py::object>(
            PyObject_CallFunction(PyExc_OSError, "iOO", code, text.ptr(), path.ptr()));
        if (instance) {
          PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(instance.ptr())), instance.ptr());
        }
        return;
      }
      case ErrorCode::kRuntime:
        PyErr_SetString(PyExc_RuntimeError, error.what());
        return;
      case ErrorCode::kInterrupted:
        if (!PyErr_Occurred()) PyErr_SetNone(PyExc_KeyboardInterrupt);
        return;
    }
  }
}

}  // namespace

bool interrupted() {
  py::gil_scoped_acquire gil;
  return PyErr_CheckSignals() != 0;  // leaves the exception set for translate()
}

void bind_system(py::module_& module) {
  py::register_exception_translator(translate);
  module.attr("has_cuda") = built_with_cuda();
  module.attr("version") = L3EXT_VERSION;
  module.def("cpu_isa", [] { return cpu_isa_name(active_cpu_isa()); });
  module.def("cpu_isas", [] {
    py::list names;
    for (const CpuIsa isa : kCpuIsas) {
      if (cpu_runs(isa)) names.append(cpu_isa_name(isa));
    }
    return names;
  });
  module.def("cuda_devices", [] {
    py::list devices;
    for (const CudaDevice& device : cuda_devices()) {
      py::dict facts;
      facts["name"] = device.name;
      facts["compute_capability"] = py::make_tuple(device.major, device.minor);
      facts["memory_bytes"] = device.memory_bytes;
      devices.append(facts);
    }
    return devices;
  });
  module.def("why_no_uring", &why_no_uring);
  // uint8 [1, nbytes], which is kept for the next when it is freed.
  module.def("cached_memory", [](size_t nbytes) {
    CachingAllocator::Block block = CachingAllocator::of_process().allocate(nbytes);
    void* const data = block.get();
    return dlpack_capsule(std::move(block), data, {kDLCPU, 0}, dlpack_dtype(DType::kUInt8),
                          {1, static_cast<int64_t>(nbytes)});
  });
  module.def("crc32c", [](const TensorArg& data) {
    check_host(data.view(), "data");
    check_contiguous(data.view(), "data");
    return crc32c(data->data, static_cast<size_t>(data->numel()) * dtype_bytes(data->dtype));
  });
}

}  // namespace l3ext::python
