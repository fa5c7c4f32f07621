// Which way of copying suits a device: batches of copies, a loop, or the fetch kernel. Public
// figures differ by machine (copies below 28 KiB at 5 to 27 GB/s by the engines of one and the same
// model), so it is measured where it runs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "runtime/cuda_device.hpp"

namespace l3ext::cuda {

// `count` copies of `bytes` each, from the first call to the end of the last copy; the best of
// some.
struct CopyTiming {
  size_t bytes = 0;
  int64_t count = 0;
  double loop_us = 0;
  double batch_us = 0;   // 0: the device has none, or refuses them
  double kernel_us = 0;  // 0: it cannot read host memory by its host address
};

// By timings in any order. The kernel takes multiprocessors from attention, so it must be faster by
// a quarter, for all sizes up to the one from which on it does not serve.
CopyChoice choose_copies(std::span<const CopyTiming> timings);

// In some 50 ms, on an idle device of CUDA: what did not fit into them is missing. CUDA builds
// only.
std::vector<CopyTiming> measure_copies(Device& device);

}  // namespace l3ext::cuda
