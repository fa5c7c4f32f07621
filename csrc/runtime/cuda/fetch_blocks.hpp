// Rows from host memory by kernels: where the copy engines are slow, and where no host takes part.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "core/dtype.hpp"
#include "runtime/device.hpp"

namespace l3ext::cuda {

// Enqueues the copies on `stream` (cudaStream_t) of the current device, in any order, by a kernel
// of `blocks` blocks. Sources must be readable by the device at their own addresses: device memory,
// or host memory that is pinned and mapped. Any alignment and size; targets must not overlap.
// Nothing is allocated, nothing waited for. Throws kValue, kRuntime.
void fetch_blocks(std::span<const Copy> copies, int blocks, void* stream);

// The rows of a step without the host, so that a graph can hold it: a token's rows are where they
// are resident, else copied into the ring, else, where the ring is full, left in host memory, which
// attention then reads itself: slower, never wrong. All arrays lie on the device.
struct FetchStepParams {
  // Ascending, repeats allowed: a plan's segment_tokens, of which num_segments count. What is no
  // token (-1) is passed over.
  const int32_t* tokens = nullptr;        // [>= *num_tokens]
  const int32_t* num_tokens = nullptr;    // [1]
  int64_t most_tokens = 0;                // *num_tokens is at most this
  int64_t vocab_size = 0;                 // V
  const int64_t* resident = nullptr;      // [V], address of the token's rows on the device; 0: none
  const int64_t* sources = nullptr;       // [V], of its rows in mapped host memory; 0: none
  const int64_t* source_bytes = nullptr;  // [V]
  std::byte* ring = nullptr;              // [ring_bytes], aligned to 16
  int64_t ring_bytes = 0;
  // What directory_attention reads; entries of other tokens stay as they are.
  int64_t* directory = nullptr;  // [V]
  // Added to: tokens resident, tokens fetched, bytes fetched, tokens left in host memory. May be
  // null.
  int64_t* counters = nullptr;  // [4]
  int blocks = 4;               // of the kernel that copies
};

// Bytes of device memory that a step needs besides, aligned to 16.
int64_t fetch_step_workspace(int64_t most_tokens);
// Enqueues two kernels on `stream`; no step before may still read the ring where it begins. Throws
// kValue, kRuntime.
void fetch_step(const FetchStepParams& params, void* workspace, int64_t workspace_bytes,
                void* stream);
// The same at once, by the host, over host memory: its twin. Available in every build.
void fetch_step_on_host(const FetchStepParams& params);

}  // namespace l3ext::cuda
