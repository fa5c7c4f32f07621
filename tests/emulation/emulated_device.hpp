// The CUDA that core/cuda/device.cuh promises, run by the host: kernel sources compile unchanged as
// C++, every CUDA thread is a fiber, and launch() returns when the kernel has run.
//
// Emulated: blocks, warps and their collectives, barriers of block and grid, dynamic shared memory,
// asynchronous copies (emulated_primitives.hpp). It runs to find faults that a device would hide:
//   - threads run in a random order that a seed fixes, so that a missing barrier shows as a wrong
//     result under some seed; a thread runs until its next collective or barrier;
//   - shared memory is all ones (NaN, -1) at the start, and so is an asynchronous copy's target
//     until the thread waits for it; behind shared memory lies a page that faults;
//   - collectives that not all lanes reach, and barriers that not all threads reach, end in an
//     Error that says where every thread waits; so do misaligned copies and launches that a device
//     would refuse.
// A test may have the accesses of warps counted (emulated_accesses.hpp).
//
// Not emulated: timing; registers and what they do to occupancy; memory that others see late or out
// of order (every access is sequentially consistent); divergence of lanes inside one mma; waiting
// for another thread by polling memory.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>
#include <typeinfo>

#include "core/error.hpp"
#include "emulated_accesses.hpp"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

namespace l3ext::cuda {

using Stream = void*;

// What a test may set before it launches.
struct Emulation {
  int multiprocessors = 3;
  int64_t shared_bytes = 227 * 1024;  // of one block, at most
  uint64_t seed = 0;                  // of the order in which threads run
};
Emulation& emulation();

struct DeviceLimits {
  int multiprocessors = 0;
  int64_t shared_bytes = 0;
};
inline DeviceLimits device_limits() {
  return {emulation().multiprocessors, emulation().shared_bytes};
}

std::byte* dynamic_shared();
void grid_barrier();

namespace emulated {

// Every lane of `mask` arrives with the address of its operand; the last one calls
// combine(operands, mask), operands indexed by lane, for all.
using Combine = void (*)(void* const* operands, uint32_t mask);
void collective(const char* name, uint32_t mask, void* operand, Combine combine);

void block_barrier();
int lane();

void copy_async(void* shared, const void* global, bool valid);
void commit_copies();
void wait_copies(int pending);

struct LaunchShape {
  const void* kernel;
  const char* args_type;  // names the kernel in messages
  int blocks, threads;
  int64_t shared_bytes;
  bool cooperative;
};
int resident_blocks(const void* kernel, int threads, int64_t shared_bytes);
void launch(const LaunchShape& shape, const std::function<void()>& kernel);

template <typename T>
struct Shuffle {
  T value;
  int source;
  T result;

  static void combine(void* const* operands, uint32_t mask) {
    for (int lane = 0; lane < 32; ++lane) {
      if ((mask >> lane & 1) == 0) continue;
      auto& self = *static_cast<Shuffle*>(operands[lane]);
      L3EXT_CHECK(mask >> self.source & 1, "shuffle: expected a source lane in the mask, got ",
                  self.source, " for lane ", lane);
      self.result = static_cast<Shuffle*>(operands[self.source])->value;
    }
  }
};
template <typename T>
T shuffle(const char* name, uint32_t mask, T value, int source) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  Shuffle<T> operand{value, source, {}};
  collective(name, mask, &operand, Shuffle<T>::combine);
  return operand.result;
}

}  // namespace emulated

template <typename Args>
int resident_blocks(void (*kernel)(Args), int threads, int64_t shared_bytes) {
  return emulated::resident_blocks(reinterpret_cast<const void*>(kernel), threads, shared_bytes);
}

template <typename Args>
void launch(void (*kernel)(Args), int blocks, int threads, int64_t shared_bytes, Stream,
            const Args& args, bool cooperative = false) {
  static_assert(std::is_trivially_copyable_v<Args> && sizeof(Args) <= 4096);
  const Args copy = args;  // as a device has its own: the kernel cannot see later changes
  emulated::launch({reinterpret_cast<const void*>(kernel), typeid(Args).name(), blocks, threads,
                    shared_bytes, cooperative},
                   [kernel, &copy] { kernel(copy); });
}

}  // namespace l3ext::cuda

// --- what CUDA has in the global namespace -------------------------------------------------------
struct EmulatedIndex {
  unsigned x;
};
extern EmulatedIndex threadIdx, blockIdx, blockDim, gridDim;

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline void __syncthreads() { l3ext::cuda::emulated::block_barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  l3ext::cuda::emulated::collective("__syncwarp", mask, nullptr, [](void* const*, uint32_t) {});
}

// `width` lanes, a power of two, form a group of their own.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = l3ext::cuda::emulated::lane(), first = lane & ~(width - 1);
  return l3ext::cuda::emulated::shuffle("__shfl_sync", mask, value, first + (source & (width - 1)));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  const int lane = l3ext::cuda::emulated::lane(), last = lane | (width - 1);
  const int source = lane ^ lane_mask;
  return l3ext::cuda::emulated::shuffle("__shfl_xor_sync", mask, value,
                                        source <= last ? source : lane);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = l3ext::cuda::emulated::lane(), first = lane & ~(width - 1);
  const int source = lane - static_cast<int>(delta);
  return l3ext::cuda::emulated::shuffle("__shfl_up_sync", mask, value,
                                        source >= first ? source : lane);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = l3ext::cuda::emulated::lane(), last = lane | (width - 1);
  const int source = lane + static_cast<int>(delta);
  return l3ext::cuda::emulated::shuffle("__shfl_down_sync", mask, value,
                                        source <= last ? source : lane);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  struct Operand {
    bool predicate;
    unsigned result;
  } operand{predicate != 0, 0};
  l3ext::cuda::emulated::collective(
      "__ballot_sync", mask, &operand, [](void* const* operands, uint32_t lanes) {
        unsigned votes = 0;
        for (int i = 0; i < 32; ++i) {
          if (lanes >> i & 1) votes |= unsigned{static_cast<Operand*>(operands[i])->predicate} << i;
        }
        for (int i = 0; i < 32; ++i) {
          if (lanes >> i & 1) static_cast<Operand*>(operands[i])->result = votes;
        }
      });
  return operand.result;
}

inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline float __uint_as_float(unsigned value) { return std::bit_cast<float>(value); }
template <typename T>
T __ldg(const T* address) {
  l3ext::cuda::emulated::note_access(l3ext::cuda::Access::kGlobalLoad, address);
  return *address;
}
template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  static_assert(std::is_integral_v<T>, "a sum of floats would depend on the order of threads");
  const T old = *address;
  *address = old + value;
  return old;
}
using std::max;
using std::min;
