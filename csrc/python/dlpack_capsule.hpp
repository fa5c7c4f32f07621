// Memory of ours as an array of Python's.
#pragma once

#include <dlpack/dlpack.h>
#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <utility>

namespace l3ext::python {

// A matrix as a DLPack capsule that owns `owner`, in whose memory it lies.
template <typename Owner>
pybind11::capsule dlpack_capsule(Owner owner, void* data, DLDevice device, DLDataType dtype,
                                 std::array<int64_t, 2> shape) {
  struct Export {
    DLManagedTensor tensor{};
    std::array<int64_t, 2> shape;
    Owner owner;
  };
  auto* exported = new Export{{}, shape, std::move(owner)};
  DLTensor& tensor = exported->tensor.dl_tensor;
  tensor.data = data;
  tensor.device = device;
  tensor.ndim = 2;
  tensor.dtype = dtype;
  tensor.shape = exported->shape.data();
  exported->tensor.manager_ctx = exported;
  exported->tensor.deleter = [](DLManagedTensor* self) {
    delete static_cast<Export*>(self->manager_ctx);
  };
  return pybind11::capsule(&exported->tensor, "dltensor", [](PyObject* capsule) {
    if (!PyCapsule_IsValid(capsule, "dltensor")) return;  // somebody took it
    auto* self = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
    self->deleter(self);
  });
}

}  // namespace l3ext::python
