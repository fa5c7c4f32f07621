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

namespace {

// Returns the device that was current before, or -1 where it is the same.
int enter_device(int device) {
  int current = 0;
  L3EXT_CUDA_CHECK(cudaGetDevice(&current));
  if (current == device) return -1;
  L3EXT_CUDA_CHECK(cudaSetDevice(device));
  return current;
}

void leave_device(int previous) { cudaSetDevice(previous); }  // was current: it cannot fail

}  // namespace

#else

bool built_with_cuda() { return false; }
std::vector<CudaDevice> cuda_devices() { return {}; }

namespace {

int enter_device(int) { return -1; }
void leave_device(int) {}

}  // namespace

#endif

CudaDeviceGuard::CudaDeviceGuard(int device) : previous_(enter_device(device)) {}

CudaDeviceGuard::~CudaDeviceGuard() {
  if (previous_ >= 0) leave_device(previous_);
}

}  // namespace l3ext
