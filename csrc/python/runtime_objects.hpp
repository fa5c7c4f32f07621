// What the bindings of the runtimes share.
#pragma once

#include <dlpack/dlpack.h>
#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "python/dlpack_capsule.hpp"
#include "runtime/device.hpp"
#include "runtime/table.hpp"

namespace l3ext::python {

// A table in RAM (data is not null) or in a file.
struct PyTable {
  Table table;
  const void* data = nullptr;
};

inline std::vector<Table> runtime_tables(const std::vector<PyTable>& tables) {
  std::vector<Table> result;
  result.reserve(tables.size());
  for (const PyTable& table : tables) result.push_back(table.table);
  return result;
}

inline void* stream_of(uintptr_t handle) {
  // NOLINTNEXTLINE(performance-no-int-to-ptr): Python knows a stream as a number.
  return reinterpret_cast<void*>(handle);
}

// A matrix at the start of a buffer as a DLPack capsule, which shares the ownership.
inline pybind11::capsule buffer_capsule(std::shared_ptr<DeviceBuffer> buffer, const Device& device,
                                        DLDataType dtype, std::array<int64_t, 2> shape) {
  void* const data = buffer->data();
  return dlpack_capsule(std::move(buffer), data,
                        {device.is_host() ? kDLCPU : kDLCUDA, device.index()}, dtype, shape);
}

}  // namespace l3ext::python
