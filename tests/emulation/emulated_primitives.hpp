// The functions of core/cuda/primitives.cuh for the emulation, with the bits of the hardware's
// conversions. A matrix product sums in order of k in float32, which no hardware promises.
#pragma once

#include "emulated_device.hpp"

namespace l3ext::cuda {
namespace emulated {

// To the nearest, ties to even; any NaN becomes 0x7fff, as on the device.
inline uint32_t round_to_bfloat16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  if (std::isnan(value)) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline uint32_t round_to_float16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // from 65520 on: infinity
  if (magnitude < 0x38800000) {  // below 2^-14: the sum with 0.5 has the unit of a subnormal
    const float sum = std::bit_cast<float>(magnitude) + 0.5f;
    return sign | (std::bit_cast<uint32_t>(sum) - std::bit_cast<uint32_t>(0.5f));
  }
  return sign | ((magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13);
}

inline float bfloat16_value(uint32_t bits) { return std::bit_cast<float>(bits << 16); }
inline float float16_value(uint32_t bits) {
  const uint32_t magnitude = (bits & 0x7fff) << 13, sign = (bits & 0x8000) << 16;
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;    // subnormals come out right
  const uint32_t special = magnitude >= 0x0f800000 ? 0x7f800000 : 0;  // infinity, NaN
  return std::bit_cast<float>(std::bit_cast<uint32_t>(scaled) | special | sign);
}

template <typename T>
struct Half;
template <>
struct Half<BFloat16> {
  static uint32_t round(float value) { return round_to_bfloat16(value); }
  static float value(uint32_t bits) { return bfloat16_value(bits); }
};
template <>
struct Half<Float16> {
  static uint32_t round(float value) { return round_to_float16(value); }
  static float value(uint32_t bits) { return float16_value(bits); }
};

template <typename T>
struct Product {
  float* c;
  uint32_t a[4], b[2];

  static void combine(void* const* operands, uint32_t) {
    using Columns = float __attribute__((vector_size(32)));
    float a[16][16];
    Columns b[16];
    for (int lane = 0; lane < 32; ++lane) {
      const auto& part = *static_cast<const Product*>(operands[lane]);
      const int g = lane / 4, k = lane % 4 * 2;
      for (int half = 0; half < 2; ++half) {
        const int shift = 16 * half;
        for (int i = 0; i < 4; ++i) {
          a[g + i % 2 * 8][k + i / 2 * 8 + half] = Half<T>::value(part.a[i] >> shift & 0xffff);
        }
        for (int i = 0; i < 2; ++i) {
          b[k + i * 8 + half][g] = Half<T>::value(part.b[i] >> shift & 0xffff);
        }
      }
    }
    Columns sums[16] = {};
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < 16; ++k) sums[row] += a[row][k] * b[k];
    }
    for (int lane = 0; lane < 32; ++lane) {
      float* c = static_cast<const Product*>(operands[lane])->c;
      for (int i = 0; i < 4; ++i) c[i] += sums[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
    }
  }
};

}  // namespace emulated

template <typename T>
uint32_t pack(float first, float second) {
  return emulated::Half<T>::round(first) | emulated::Half<T>::round(second) << 16;
}
template <typename T>
float2 unpack(uint32_t pair) {
  return {emulated::Half<T>::value(pair & 0xffff), emulated::Half<T>::value(pair >> 16)};
}
inline uint32_t low_halves(uint32_t a, uint32_t b) { return (a & 0xffff) | b << 16; }
inline uint32_t high_halves(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xffff0000u); }

inline uint4 load_streaming(const void* address) {
  L3EXT_CHECK(reinterpret_cast<uintptr_t>(address) % 16 == 0,
              "load_streaming: expected an address aligned to 16 bytes, got ", address);
  emulated::note_access(Access::kGlobalLoad, static_cast<const uint4*>(address));
  return *static_cast<const uint4*>(address);
}
template <typename T>
void store_global(T* address, T value) {
  emulated::note_access(Access::kGlobalStore, address);
  *address = value;
}
template <typename T>
T load_shared(const T* address) {
  emulated::note_access(Access::kSharedLoad, address);
  return *address;
}
template <typename T>
void store_shared(T* address, T value) {
  emulated::note_access(Access::kSharedStore, address);
  *address = value;
}

inline void prefetch_l2(const void*) {}  // of any address: a device does not fault either

inline void copy_async(void* shared, const void* global, bool valid) {
  if (valid) emulated::note_access(Access::kGlobalLoad, static_cast<const uint4*>(global));
  emulated::note_access(Access::kSharedStore, static_cast<const uint4*>(shared));
  emulated::copy_async(shared, global, valid);
}
inline void commit_copies() { emulated::commit_copies(); }
template <int Pending>
void wait_copies() {
  emulated::wait_copies(Pending);
}

template <typename T>
void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
         uint32_t b1) {
  emulated::Product<T> operand{c, {a0, a1, a2, a3}, {b0, b1}};
  emulated::collective("mma", 0xffffffffu, &operand, emulated::Product<T>::combine);
}

}  // namespace l3ext::cuda
