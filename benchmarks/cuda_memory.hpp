// Memory of the current CUDA device, owned; for benchmarks and for the C++ tests on a device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>

#include "core/cuda/check.hpp"

namespace l3ext::bench {

// Not initialized: so that a sanitizer sees what is read before it was written.
class DeviceMemory {
 public:
  explicit DeviceMemory(int64_t bytes) {
    if (bytes == 0) return;
    L3EXT_CUDA_CHECK(cudaMalloc(&data_, static_cast<size_t>(bytes)));
  }
  ~DeviceMemory() { cudaFree(data_); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
};
using Memory = std::unique_ptr<DeviceMemory>;

template <typename T>
Memory on_device(const T* values, int64_t count) {
  const auto bytes = static_cast<size_t>(count) * sizeof(T);
  auto memory = std::make_unique<DeviceMemory>(static_cast<int64_t>(bytes));
  if (count > 0) {
    L3EXT_CUDA_CHECK(cudaMemcpy(memory->as<T>(), values, bytes, cudaMemcpyHostToDevice));
  }
  return memory;
}

}  // namespace l3ext::bench
