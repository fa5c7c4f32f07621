#ifdef L3EXT_WITH_CUDA

#include "runtime/cuda/copy_engines.hpp"

#include "core/cuda/check.hpp"

namespace l3ext::cuda {

#if CUDART_VERSION >= 12080

bool has_batches() {
  int driver = 0;  // what it supports, as a version of CUDA: an older one may run a newer runtime
  L3EXT_CUDA_CHECK(cudaDriverGetVersion(&driver));
  return driver >= 12080;
}

void CopyEngines::copy_batch(std::span<const Copy> copies, cudaStream_t stream) {
  targets_.clear();
  sources_.clear();
  sizes_.clear();
  for (const Copy& copy : copies) {
    if (copy.bytes == 0) continue;  // an error in a batch
    targets_.push_back(copy.target);
    sources_.push_back(copy.source);
    sizes_.push_back(copy.bytes);
  }
  if (sizes_.empty()) return;
  cudaMemcpyAttributes attributes = {};
  // Not "any": a source on the device may be written by the work before.
  attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
  attributes.flags = cudaMemcpyFlagPreferOverlapWithCompute;
  size_t first = 0;  // the copy from which on the attributes hold
#if CUDART_VERSION >= 13000
  L3EXT_CUDA_CHECK(cudaMemcpyBatchAsync(targets_.data(), sources_.data(), sizes_.data(),
                                        sizes_.size(), &attributes, &first, 1, stream));
#else
  size_t failed = 0;
  L3EXT_CUDA_CHECK(cudaMemcpyBatchAsync(targets_.data(), const_cast<void**>(sources_.data()),
                                        sizes_.data(), sizes_.size(), &attributes, &first, 1,
                                        &failed, stream));
#endif
}

#else

bool has_batches() { return false; }
void CopyEngines::copy_batch(std::span<const Copy> copies, cudaStream_t stream) {
  copy_loop(copies, stream);
}

#endif

void CopyEngines::copy_loop(std::span<const Copy> copies, cudaStream_t stream) {
  for (const Copy& copy : copies) {
    if (copy.bytes == 0) continue;
    L3EXT_CUDA_CHECK(
        cudaMemcpyAsync(copy.target, copy.source, copy.bytes, cudaMemcpyDefault, stream));
  }
}

}  // namespace l3ext::cuda

#endif
