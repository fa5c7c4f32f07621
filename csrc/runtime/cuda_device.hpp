// A CUDA device behind the runtime's interface: rows in its memory, copies on streams of their own.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "runtime/device.hpp"

namespace l3ext {

// How a device's queues copy from host memory.
struct CopyChoice {
  bool batched = false;  // many copies go to the copy engines in one call, not in a loop
  // Copies below this many bytes go to a kernel that reads host memory; 0: none.
  size_t kernel_below = 0;
  int kernel_blocks = 4;  // of that kernel: the multiprocessors it takes
  std::string text;       // the choice and what it follows from, for a reader
};

// `index`: as CUDA numbers the devices. Measures for some 50 ms how the device copies best. Throws
// kValue where there is no such device, kRuntime where CUDA fails or this build is without it.
std::shared_ptr<Device> make_cuda_device(int index);
// Without the measurement.
std::shared_ptr<Device> make_cuda_device(int index, const CopyChoice& choice);

// How a device copies; null for one that is none of CUDA's. Lives as long as the device.
const CopyChoice* copy_choice(const Device& device);

}  // namespace l3ext
