// What the tests of the emulation share.
#pragma once

#include <cstdint>
#include <string>

#include "core/cuda/device.cuh"

// A launch as the library makes it: asks how many blocks are resident, then launches.
template <typename Args>
void run_kernel(void (*kernel)(Args), int blocks, int threads, int64_t shared_bytes,
                const Args& args, bool cooperative = false) {
  l3ext::cuda::resident_blocks(kernel, threads, shared_bytes);
  l3ext::cuda::launch(kernel, blocks, threads, shared_bytes, nullptr, args, cooperative);
}

inline bool contains(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}
