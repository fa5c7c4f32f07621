// What kernel files include instead of the CUDA headers. Under nvcc it is CUDA; elsewhere it is the
// emulation of tests/emulation, which runs the same kernels on the host, thread by thread, so that
// their logic is tested where there is no GPU.
//
// Kernels take one argument struct, keep all shared memory in dynamic_shared(), and reach inline
// assembly only through core/cuda/primitives.cuh: that is all an emulation has to know.
#pragma once

#ifdef __CUDACC__

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <tuple>

#include "core/cuda/check.hpp"

namespace l3ext::cuda {

using Stream = cudaStream_t;

// The block's dynamic shared memory, aligned to 128 bytes.
__device__ inline std::byte* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char l3ext_dynamic_shared[];
  return reinterpret_cast<std::byte*>(l3ext_dynamic_shared);
}

// Every block of a cooperative launch waits for all others; their global writes are visible after.
__device__ inline void grid_barrier() { cooperative_groups::this_grid().sync(); }

// The properties that launches are shaped by, of the current device.
struct DeviceLimits {
  int multiprocessors = 0;
  int64_t shared_bytes = 0;  // of one block, at most
};

inline DeviceLimits device_limits() {
  int device = 0, multiprocessors = 0, shared_bytes = 0;
  L3EXT_CUDA_CHECK(cudaGetDevice(&device));
  L3EXT_CUDA_CHECK(
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  L3EXT_CUDA_CHECK(
      cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return {multiprocessors, shared_bytes};
}

// Blocks of `kernel` that run at the same time on the whole device, one or more; throws where it
// does not fit. Asked once per kernel, device and size: the answer costs some microseconds.
template <typename Args>
int resident_blocks(void (*kernel)(Args), int threads, int64_t shared_bytes) {
  const auto* function = reinterpret_cast<const void*>(kernel);
  int device = 0;
  L3EXT_CUDA_CHECK(cudaGetDevice(&device));
  thread_local std::map<std::tuple<const void*, int, int, int64_t>, int> known;
  const std::tuple key(function, device, threads, shared_bytes);
  if (const auto entry = known.find(key); entry != known.end()) return entry->second;
  const DeviceLimits limits = device_limits();
  int blocks = 0;
  if (shared_bytes <= limits.shared_bytes) {
    // The last setting counts, whatever size it was for: always as much as there is, or a launch of
    // a size that was asked for before a smaller one would fail.
    L3EXT_CUDA_CHECK(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(limits.shared_bytes)));
    L3EXT_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
        &blocks, function, threads, static_cast<size_t>(shared_bytes)));
  }
  if (blocks == 0) {
    throw Error(ErrorCode::kRuntime,
                concat("device: expected room for a kernel of ", threads, " threads and ",
                       shared_bytes, " bytes of shared memory, got a device with at most ",
                       limits.shared_bytes, " bytes a block"));
  }
  known[key] = blocks * limits.multiprocessors;
  return known[key];
}

// Launches kernel(args); the caller has asked resident_blocks() for the same shape before.
template <typename Args>
void launch(void (*kernel)(Args), int blocks, int threads, int64_t shared_bytes, Stream stream,
            const Args& args, bool cooperative = false) {
  if (blocks == 0) return;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  config.attrs = &attribute;
  config.numAttrs = cooperative ? 1 : 0;
  L3EXT_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, args));
}

}  // namespace l3ext::cuda

#else
#include "emulated_device.hpp"
#endif
