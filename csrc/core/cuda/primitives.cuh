// The instructions that C++ does not name, one function each; the only file with inline assembly.
// Everything is sm_80 and later. The emulation has its own version of this file's functions.
#pragma once

#include "core/cuda/device.cuh"
#include "core/dtype.hpp"

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace l3ext::cuda {

// --- conversions: two 16-bit elements in one register, the first in the low half -----------------
template <typename T>
__device__ inline uint32_t pack(float first, float second);
template <>
__device__ inline uint32_t pack<BFloat16>(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return reinterpret_cast<const uint32_t&>(pair);
}
template <>
__device__ inline uint32_t pack<Float16>(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  return reinterpret_cast<const uint32_t&>(pair);
}

template <typename T>
__device__ inline float2 unpack(uint32_t pair);
template <>
__device__ inline float2 unpack<BFloat16>(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}
template <>
__device__ inline float2 unpack<Float16>(uint32_t pair) {
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}

// The low (high) halves of two registers in one.
__device__ inline uint32_t low_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); }
__device__ inline uint32_t high_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7632); }

// --- memory --------------------------------------------------------------------------------------
// 16 bytes of a table row: read once by this block, so it shall not displace the queries in L1.
__device__ inline uint4 load_streaming(const void* address) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}

// What is hot goes through these, so that the emulation can count sectors and bank conflicts.
template <typename T>
__device__ inline void store_global(T* address, T value) {
  *address = value;
}
template <typename T>
__device__ inline T load_shared(const T* address) {
  return *address;
}
template <typename T>
__device__ inline void store_shared(T* address, T value) {
  *address = value;
}

// Asks for the 128-byte line of `address` in L2; no result, no wait.
__device__ inline void prefetch_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// 16 bytes from global to shared memory in the background; zeros where `valid` is false. Visible to
// this thread after wait_copies, to the block after a barrier behind it.
__device__ inline void copy_async(void* shared, const void* global, bool valid) {
  const auto target = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(global),
               "r"(valid ? 16 : 0));
}
// Closes a group of the copies so far; wait_copies<n> waits until at most n groups are under way.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;"); }
template <int Pending>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// --- matrix product ------------------------------------------------------------------------------
// c[16 x 8] += a[16 x 16] b[16 x 8] by one warp. With lane = 4 g + t, a thread holds
//   a: (row g, k 2t, 2t+1), (row g+8, same), (row g, k 2t+8, 2t+9), (row g+8, same)
//   b: (k 2t, 2t+1, column g), (k 2t+8, 2t+9, column g)
//   c: (row g, column 2t), (row g, 2t+1), (row g+8, 2t), (row g+8, 2t+1)
template <typename T>
__device__ inline void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                           uint32_t b0, uint32_t b1);
template <>
__device__ inline void mma<BFloat16>(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                     uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
template <>
__device__ inline void mma<Float16>(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                    uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

}  // namespace l3ext::cuda

#else
#include "emulated_primitives.hpp"
#endif
