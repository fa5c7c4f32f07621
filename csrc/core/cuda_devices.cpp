#include "core/cuda_devices.hpp"

#ifdef L3EXT_WITH_CUDA
#include <cuda_runtime_api.h>

#include "core/cuda/check.hpp"
#endif

namespace l3ext {

#ifdef L3EXT_WITH_CUDA

bool built_with_cuda() { return true; }

std::vector<CudaDevice> cuda_devices() {
  std::vector<CudaDevice> devices;
  int count = 0;
  // Without a driver the first call reports an error: the answer is "none", not a failure.
  if (cudaGetDeviceCount(&count) != cudaSuccess) count = 0;
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, i) != cudaSuccess) continue;
    devices.push_back({properties.name, properties.major, properties.minor,
                       static_cast<int64_t>(properties.totalGlobalMem)});
  }
  return devices;
}

CudaDeviceGuard::CudaDeviceGuard(int device) {
  int current = 0;
  L3EXT_CUDA_CHECK(cudaGetDevice(&current));
  if (current == device) return;
  L3EXT_CUDA_CHECK(cudaSetDevice(device));
  previous_ = current;
}

CudaDeviceGuard::~CudaDeviceGuard() {
  if (previous_ >= 0) cudaSetDevice(previous_);  // was current before: it cannot fail
}

#else

bool built_with_cuda() { return false; }
std::vector<CudaDevice> cuda_devices() { return {}; }
CudaDeviceGuard::CudaDeviceGuard(int) {}
CudaDeviceGuard::~CudaDeviceGuard() = default;

#endif

}  // namespace l3ext
