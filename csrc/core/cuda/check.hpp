// The CUDA check: every runtime call goes through it. Host code of CUDA builds only.
#pragma once

#include <cuda_runtime_api.h>

#include "core/error.hpp"

// Throws Error(kRuntime, ...) unless the call returns cudaSuccess; names the call and the reason.
#define L3EXT_CUDA_CHECK(call)                                                                     \
  do {                                                                                             \
    if (const cudaError_t status = (call); status != cudaSuccess) [[unlikely]] {                   \
      throw ::l3ext::Error(                                                                        \
          ::l3ext::ErrorCode::kRuntime,                                                            \
          ::l3ext::concat(#call, ": CUDA error ", int{status}, ", ", cudaGetErrorString(status))); \
    }                                                                                              \
  } while (false)
