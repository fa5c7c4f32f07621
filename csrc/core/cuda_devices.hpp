// Which CUDA devices this process can reach. Without CUDA in the build, or without a driver: none.
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

}  // namespace l3ext
