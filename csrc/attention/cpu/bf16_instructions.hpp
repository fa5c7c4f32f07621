// The instructions of AVX512-BF16 and AMX-BF16 that the row kernels use. Where tests run the
// kernels on a processor that has neither, tests/emulation defines the same functions in their
// place.
//
// Both sets round every step to nearest even and take subnormals for zeros.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
// The operand that the intrinsics of GCC 12 leave undefined on purpose, it warns of itself.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include <cstdint>

namespace l3ext::cpu {

// What ldtilecfg reads: the extents of tile t. A tile of no rows is not used.
struct alignas(64) TileConfig {
  uint8_t palette = 1;  // 8 tiles of at most 16 rows of 64 bytes
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

}  // namespace l3ext::cpu

#if defined(L3EXT_EMULATED_CPU)
#include "emulated_bf16_instructions.hpp"
#else

namespace l3ext::cpu::L3EXT_ISA {
namespace {

// sums[i] + a[2i] * b[2i] + a[2i + 1] * b[2i + 1].
inline __m512 add_dot_of_pairs(__m512 sums, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sums, (__m512bh)a, (__m512bh)b);
}

inline __m256i round_to_bf16(__m512 values) { return (__m256i)_mm512_cvtneps_pbh(values); }

#if defined(__AMX_BF16__)
// In assembly, as GCC's intrinsics paste the tile's number into text, which no template can reach,
// and do not say that they read memory. Strides are in bytes.
inline void load_tile_config(const TileConfig& config) {
  __asm__ volatile("ldtilecfg %0" : : "m"(config));
}
inline void release_tiles() { __asm__ volatile("tilerelease"); }

template <int kTile>
inline void zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
template <int kTile>
inline void load_tile(const void* from, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2"
                   :
                   : "r"(from), "r"(stride), "i"(kTile)
                   : "memory");
}
template <int kTile>
inline void store_tile(void* to, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)"
                   :
                   : "r"(to), "r"(stride), "i"(kTile)
                   : "memory");
}
// kSums[m][n] += sum over k of kA[m][2k] * kB[k][2n] + kA[m][2k + 1] * kB[k][2n + 1].
template <int kSums, int kA, int kB>
inline void add_tile_product() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kA), "i"(kB));
}
#endif

}  // namespace
}  // namespace l3ext::cpu::L3EXT_ISA

#endif
