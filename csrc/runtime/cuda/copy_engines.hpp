// Copies by the copy engines: one call for many, where toolkit and driver have it, or a loop. Host
// code of CUDA builds only.
#pragma once

#include <cuda_runtime_api.h>

#include <span>
#include <vector>

#include "runtime/device.hpp"

namespace l3ext::cuda {

// Whether copy_batch() may be called: cudaMemcpyBatchAsync came with CUDA 12.8.
bool has_batches();

class CopyEngines {
 public:
  // Both on a stream of the current device, in any order among each other. Not the legacy default
  // stream, which batches refuse.
  void copy_batch(std::span<const Copy> copies, cudaStream_t stream);
  static void copy_loop(std::span<const Copy> copies, cudaStream_t stream);

 private:
  std::vector<void*> targets_;  // kept: no allocation in a step
  std::vector<const void*> sources_;
  std::vector<size_t> sizes_;
};

}  // namespace l3ext::cuda
