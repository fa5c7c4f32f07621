// Which CUDA devices this process can reach, and which of them is current. Without CUDA in the
// build, or without a driver: none.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace l3ext {

struct CudaDevice {
  std::string name;
  int major = 0;  // compute capability
  int minor = 0;
  int64_t memory_bytes = 0;
};

bool built_with_cuda();
std::vector<CudaDevice> cuda_devices();

// Makes a device current for the calling thread until the scope ends. Throws kRuntime where there
// is no such device; in a build without CUDA it does nothing.
class CudaDeviceGuard {
 public:
  explicit CudaDeviceGuard(int device);
  ~CudaDeviceGuard();
  CudaDeviceGuard(const CudaDeviceGuard&) = delete;
  CudaDeviceGuard& operator=(const CudaDeviceGuard&) = delete;

 private:
  int previous_;  // -1: it was current already
};

}  // namespace l3ext
