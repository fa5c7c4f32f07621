#include "core/cuda_devices.hpp"

#ifdef L3EXT_WITH_CUDA
#include <cuda_runtime_api.h>
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

#else

bool built_with_cuda() { return false; }
std::vector<CudaDevice> cuda_devices() { return {}; }

#endif

}  // namespace l3ext
