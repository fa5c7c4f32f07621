// A product of blocks with AVX512-BF16: vdpbf16ps adds two products to each of 16 lanes.
#define L3EXT_ISA avx512_bf16
#include <cstring>

#include "attention/cpu/bf16_instructions.hpp"
#include "attention/cpu/row_kernels.hpp"

namespace l3ext::cpu::L3EXT_ISA {
namespace {

#include "attention/cpu/prefetches.inl"

// kRows x 16 kVectors sums in registers: each broadcast pair of a row meets kVectors of `b`.
constexpr int kMostRows = 8;

template <int kRows, int kVectors>
void multiply_rows(const BFloat16* a, int64_t a_stride, const Prefetches& prefetches,
                   int64_t first_row, const float* b, int64_t b_stride, int64_t depth, bool add,
                   float* sums, int64_t sums_stride) {
  __m512 total[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      total[r][v] = add ? _mm512_loadu_ps(sums + r * sums_stride + v * 16) : _mm512_setzero_ps();
    }
  }
  const auto add_pair = [&](int64_t k) __attribute__((always_inline)) {
    __m512i columns[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      columns[v] = _mm512_loadu_si512(b + v * 16);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      int32_t pair;
      std::memcpy(&pair, a + r * a_stride + k, sizeof(pair));
      const __m512i row = _mm512_set1_epi32(pair);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        total[r][v] = add_dot_of_pairs(total[r][v], row, columns[v]);
      }
    }
    b += b_stride;
  };
  // A count that the compiler knows, and no more of it at once: addresses of more would not fit
  // into registers beside the rows'.
  constexpr int64_t kLine = 32;  // elements
  int64_t first = 0;
  for (; first + kLine <= depth; first += kLine, a += kLine) {
    prefetches.ask(first_row, kRows, first);
#pragma GCC unroll 2
    for (int64_t k = 0; k < kLine; k += 2) add_pair(k);
  }
  if (first < depth) prefetches.ask(first_row, kRows, first);
#pragma GCC unroll 1
  for (; first < depth; first += 2, a += 2) add_pair(0);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      _mm512_storeu_ps(sums + r * sums_stride + v * 16, total[r][v]);
    }
  }
}

// See row_kernels_bf16.inl.
class BlockProduct {
 public:
  static constexpr int64_t kQueries = 32, kPairQueries = 24, kFewQueries = 16, kDepthStep = 2,
                           kFewRows = 4;

  void operator()(const BFloat16* a, int64_t a_stride, int64_t rows, const Prefetches& prefetches,
                  const float* b, int64_t b_stride, int64_t columns, int64_t depth, bool add,
                  float* sums, int64_t sums_stride) const {
    // In blocks that differ by at most a row: sums of one row alone would wait for each other.
    static constexpr decltype(&multiply_rows<1, 1>) kMultiply[2][kMostRows] = {
        {multiply_rows<1, 1>, multiply_rows<2, 1>, multiply_rows<3, 1>, multiply_rows<4, 1>,
         multiply_rows<5, 1>, multiply_rows<6, 1>, multiply_rows<7, 1>, multiply_rows<8, 1>},
        {multiply_rows<1, 2>, multiply_rows<2, 2>, multiply_rows<3, 2>, multiply_rows<4, 2>,
         multiply_rows<5, 2>, multiply_rows<6, 2>, multiply_rows<7, 2>, multiply_rows<8, 2>}};
    const int64_t blocks = (rows + kMostRows - 1) / kMostRows;
    for (int64_t i = 0, begin = 0; i < blocks; ++i) {
      const int64_t end = rows * (i + 1) / blocks;
      kMultiply[columns / 32][end - begin - 1](a + begin * a_stride, a_stride, prefetches, begin, b,
                                               b_stride, depth, add, sums + begin * sums_stride,
                                               sums_stride);
      begin = end;
    }
  }
};

}  // namespace
}  // namespace l3ext::cpu::L3EXT_ISA

#include "attention/cpu/row_kernels_bf16.inl"
