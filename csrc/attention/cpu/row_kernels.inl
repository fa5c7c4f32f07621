// The row kernels, once; compiled per instruction set by row_kernels_<isa>.cpp with
// -ffp-contract=fast, so that a * b + c is one rounding where the set has FMA.
//
// What limits them: a segment of few queries streams its rows from memory once (dot and
// accumulate touch each row element once per block of queries and ask for the next rows ahead);
// a segment of many queries is bound by FMAs, hence register blocks of rows x queries in dot and
// queries x columns in accumulate. Rows are never repacked; 16-bit rows widen in registers.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "attention/cpu/row_kernels.hpp"

namespace l3ext::cpu::L3EXT_ISA {
namespace {

// Vectors of the compiler's own kind: the same source is SSE2, AVX2, AVX-512 or NEON.
template <typename Lane, int kBytes>
struct VectorOf {
  typedef Lane type __attribute__((vector_size(kBytes)));
};
template <typename Acc>
using Vec = typename VectorOf<Acc, L3EXT_VECTOR_BYTES>::type;
template <typename Acc>
constexpr int kLanes = L3EXT_VECTOR_BYTES / sizeof(Acc);

template <typename V, typename From>
inline V load_raw(const From* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <typename To, typename From>
inline To bit_cast_vector(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &v, sizeof(to));
  return to;
}

using U32 = typename VectorOf<uint32_t, L3EXT_VECTOR_BYTES>::type;
using I32 = typename VectorOf<int32_t, L3EXT_VECTOR_BYTES>::type;
using U16 = typename VectorOf<uint16_t, L3EXT_VECTOR_BYTES / 2>::type;

inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  uint32_t bits;
  if (magnitude >= 0x7c00u) {  // infinity, NaN (kept quiet)
    bits =
        sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13) | (magnitude > 0x7c00u ? 0x400000u : 0);
  } else if (magnitude >= 0x400u) {
    bits = sign | ((magnitude + 0x1c000u) << 13);
  } else {  // zero or subnormal: magnitude * 2^-24 is exact in float
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    std::memcpy(&bits, &value, 4);
    bits |= sign;
  }
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t float_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | ((bits >> 13) & 0x3ffu));
  if (bits >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds past 65504
  if (bits < 0x38800000u) {  // subnormal: the addition rounds to a multiple of 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    const float shifted = magnitude + 0.5f;
    uint32_t rounded;
    std::memcpy(&rounded, &shifted, 4);
    return static_cast<uint16_t>(sign | (rounded - 0x3f000000u));
  }
  bits += 0xc8000fffu + ((bits >> 13) & 1u);  // rebias the exponent, round to nearest even
  return static_cast<uint16_t>(sign | (bits >> 13));
}

inline Vec<double> load(const double* p) { return load_raw<Vec<double>>(p); }
inline Vec<float> load(const float* p) { return load_raw<Vec<float>>(p); }
inline Vec<float> load(const BFloat16* p) {
  return bit_cast_vector<Vec<float>>(__builtin_convertvector(load_raw<U16>(p), U32) << 16);
}
inline Vec<float> load(const Float16* p) {
#if L3EXT_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff,
                                           _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif L3EXT_VECTOR_BYTES == 32
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = half_to_float(p[i].bits);
  return v;
#endif
}

inline void store(Vec<double> v, double* p) { std::memcpy(p, &v, sizeof(v)); }
inline void store(Vec<float> v, float* p) { std::memcpy(p, &v, sizeof(v)); }
inline void store(Vec<float> v, BFloat16* p) {
  const U32 bits = bit_cast_vector<U32>(v);
  const U32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U32 quiet = (bits >> 16) | 0x40u;
  const U32 chosen = (bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
  const U16 narrow = __builtin_convertvector(chosen, U16);
  std::memcpy(p, &narrow, sizeof(narrow));
}
inline void store(Vec<float> v, Float16* p) {
#if L3EXT_VECTOR_BYTES == 64
  const __m256i narrow =
      _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow);
#elif L3EXT_VECTOR_BYTES == 32
  const __m128i narrow = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow);
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i].bits = float_to_half(v[i]);
#endif
}

// Keeps a loaded vector in a register. Otherwise GCC folds the load into every multiplication that
// uses the vector: as many loads as FMAs, of which the processor does no more a cycle.
template <typename V>
inline void keep_in_register(V& v) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(v));
#elif defined(__x86_64__)
  __asm__("" : "+x"(v));
#else
  static_cast<void>(v);
#endif
}

// The first `count` lanes; the rest are zero and nothing past them is read.
template <typename T>
inline auto load_partial(const T* p, int64_t count) {
  T buffer[kLanes<Accumulator<T>>] = {};
  std::memcpy(buffer, p, static_cast<size_t>(count) * sizeof(T));
  return load(buffer);
}
template <typename Acc, typename T>
inline void store_partial(Vec<Acc> v, T* p, int64_t count) {
  T buffer[kLanes<Acc>];
  store(v, buffer);
  std::memcpy(p, buffer, static_cast<size_t>(count) * sizeof(T));
}

// v with its lanes moved down by kDistance, cyclically.
template <typename Acc, int kDistance, size_t... kLane>
inline Vec<Acc> rotate_lanes(Vec<Acc> v, std::index_sequence<kLane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(v, v, ((kLane + kDistance) % sizeof...(kLane))...);
#else
  using Index = std::conditional_t<sizeof(Acc) == 8, int64_t, int32_t>;
  using Indices = typename VectorOf<Index, L3EXT_VECTOR_BYTES>::type;
  return __builtin_shuffle(v, Indices{((kLane + kDistance) % sizeof...(kLane))...});
#endif
}

// Halves are added until one lane is left: a fixed order for each width.
template <typename Acc, int kWidth = kLanes<Acc> / 2>
inline Acc sum_lanes(Vec<Acc> v) {
  v += rotate_lanes<Acc, kWidth>(v, std::make_index_sequence<kLanes<Acc>>());
  if constexpr (kWidth > 1) {
    return sum_lanes<Acc, kWidth / 2>(v);
  } else {
    return v[0];
  }
}

// --- dot --------------------------------------------------------------------------------------
template <typename T, int kRows, int kQueries, bool kPrefetch>
inline void dot_block(const T* const* rows, const T* const* next_rows, const Accumulator<T>* x,
                      int64_t x_stride, int64_t depth, Accumulator<T> scale, Accumulator<T>* out,
                      int64_t out_stride) {
  using Acc = Accumulator<T>;
  constexpr int kStep = kLanes<Acc>;
  Vec<Acc> sums[kRows][kQueries] = {};
  const T* row[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) row[r] = rows[r];
  int64_t k = 0;
  for (; k + kStep <= depth; k += kStep) {
    Vec<Acc> queries[kQueries];
#pragma GCC unroll 8
    for (int q = 0; q < kQueries; ++q) queries[q] = load(x + q * x_stride + k);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      if constexpr (kPrefetch) __builtin_prefetch(next_rows[r] + k);
      Vec<Acc> v = load(row[r] + k);
      if constexpr (kQueries > 1) keep_in_register(v);
#pragma GCC unroll 8
      for (int q = 0; q < kQueries; ++q) sums[r][q] += v * queries[q];
    }
  }
  if (k < depth) {
#pragma GCC unroll 8
    for (int q = 0; q < kQueries; ++q) {
      const Vec<Acc> query = load_partial(x + q * x_stride + k, depth - k);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sums[r][q] += load_partial(row[r] + k, depth - k) * query;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int q = 0; q < kQueries; ++q) out[q * out_stride + r] = scale * sum_lanes<Acc>(sums[r][q]);
  }
}

template <typename T, int kRows>
inline void dot_rows(const T* const* rows, const T* const* next_rows, const Accumulator<T>* x,
                     int64_t x_stride, int64_t queries, int64_t depth, Accumulator<T> scale,
                     Accumulator<T>* out, int64_t out_stride) {
  constexpr int kQueries = L3EXT_DOT_QUERIES;
  int64_t q = 0;
  // Only the first block of queries meets cold rows: it asks for the next ones.
  if (queries >= kQueries) {
    dot_block<T, kRows, kQueries, true>(rows, next_rows, x, x_stride, depth, scale, out,
                                        out_stride);
    for (q = kQueries; q + kQueries <= queries; q += kQueries) {
      dot_block<T, kRows, kQueries, false>(rows, next_rows, x + q * x_stride, x_stride, depth,
                                           scale, out + q * out_stride, out_stride);
    }
  }
  for (; q < queries; ++q) {
    dot_block<T, kRows, 1, true>(rows, next_rows, x + q * x_stride, x_stride, depth, scale,
                                 out + q * out_stride, out_stride);
  }
}

template <typename T>
void dot(const T* const* rows, int64_t num_rows, const Accumulator<T>* x, int64_t x_stride,
         int64_t queries, int64_t depth, Accumulator<T> scale, Accumulator<T>* out,
         int64_t out_stride) {
  constexpr int kRows = L3EXT_DOT_ROWS;
  static_assert(kRows <= kRowsAhead);
  int64_t r = 0;
  const auto run = [&]<int kCount>(std::integral_constant<int, kCount>) {
    dot_rows<T, kCount>(rows + r, rows + r + kCount, x, x_stride, queries, depth, scale, out + r,
                        out_stride);
    return kCount;
  };
  while (r + kRows <= num_rows) r += run(std::integral_constant<int, kRows>{});
  if (kRows > 4 && r + 4 <= num_rows) r += run(std::integral_constant<int, 4>{});
  if (r + 2 <= num_rows) r += run(std::integral_constant<int, 2>{});
  if (r < num_rows) run(std::integral_constant<int, 1>{});
}

// --- accumulate -------------------------------------------------------------------------------
template <typename T, int kQueries, int kVectors, bool kPrefetch>
inline void accumulate_block(const T* const* rows, int64_t num_rows, const Accumulator<T>* weights,
                             int64_t query_stride, int64_t row_stride, int64_t column,
                             Accumulator<T>* out, int64_t out_stride) {
  using Acc = Accumulator<T>;
  constexpr int kStep = kLanes<Acc>;
  Vec<Acc> sums[kQueries][kVectors];
#pragma GCC unroll 8
  for (int q = 0; q < kQueries; ++q) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sums[q][v] = load(out + q * out_stride + column + v * kStep);
  }
  for (int64_t r = 0; r < num_rows; ++r) {
    const T* row = rows[r] + column;
    Vec<Acc> values[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      values[v] = load(row + v * kStep);
      if constexpr (kQueries > 1) keep_in_register(values[v]);
    }
    if constexpr (kPrefetch) {
      const T* next = rows[r + num_rows] + column;
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) __builtin_prefetch(next + v * kStep);
    }
#pragma GCC unroll 8
    for (int q = 0; q < kQueries; ++q) {
      const Acc weight = weights[q * query_stride + r * row_stride];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[q][v] += values[v] * weight;
    }
  }
#pragma GCC unroll 8
  for (int q = 0; q < kQueries; ++q) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(sums[q][v], out + q * out_stride + column + v * kStep);
  }
}

template <typename T>
inline void accumulate_tail(const T* const* rows, int64_t num_rows, const Accumulator<T>* weights,
                            int64_t row_stride, int64_t column, int64_t count,
                            Accumulator<T>* out) {
  using Acc = Accumulator<T>;
  Vec<Acc> sum = load_partial(out + column, count);
  for (int64_t r = 0; r < num_rows; ++r) {
    sum += load_partial(rows[r] + column, count) * weights[r * row_stride];
  }
  store_partial<Acc>(sum, out + column, count);
}

// One panel of columns for all queries: the panel's rows stay in the first-level cache.
template <typename T, int kVectors>
inline void accumulate_panel(const T* const* rows, int64_t num_rows, const Accumulator<T>* weights,
                             int64_t query_stride, int64_t row_stride, int64_t queries,
                             int64_t column, Accumulator<T>* out, int64_t out_stride) {
  constexpr int kQueries = L3EXT_SUM_QUERIES;
  int64_t q = 0;
  if (queries >= kQueries) {
    accumulate_block<T, kQueries, kVectors, true>(rows, num_rows, weights, query_stride, row_stride,
                                                  column, out, out_stride);
    for (q = kQueries; q + kQueries <= queries; q += kQueries) {
      accumulate_block<T, kQueries, kVectors, false>(rows, num_rows, weights + q * query_stride,
                                                     query_stride, row_stride, column,
                                                     out + q * out_stride, out_stride);
    }
  }
  for (; q < queries; ++q) {
    accumulate_block<T, 1, kVectors, true>(rows, num_rows, weights + q * query_stride, query_stride,
                                           row_stride, column, out + q * out_stride, out_stride);
  }
}

template <typename T>
void accumulate(const T* const* rows, int64_t num_rows, const Accumulator<T>* weights,
                int64_t query_stride, int64_t row_stride, int64_t queries, int64_t columns,
                Accumulator<T>* out, int64_t out_stride) {
  using Acc = Accumulator<T>;
  constexpr int kStep = kLanes<Acc>;
  constexpr int kPanel = L3EXT_SUM_VECTORS * kStep;
  constexpr int64_t kChunk = kRowsAhead;  // rows between two visits of the sums in `out`
  for (int64_t r = 0; r < num_rows; r += kChunk) {
    const int64_t count = num_rows - r < kChunk ? num_rows - r : kChunk;
    const T* const* chunk = rows + r;
    const Acc* chunk_weights = weights + r * row_stride;
    int64_t column = 0;
    for (; column + kPanel <= columns; column += kPanel) {
      accumulate_panel<T, L3EXT_SUM_VECTORS>(chunk, count, chunk_weights, query_stride, row_stride,
                                             queries, column, out, out_stride);
    }
    for (; column + kStep <= columns; column += kStep) {
      accumulate_panel<T, 1>(chunk, count, chunk_weights, query_stride, row_stride, queries, column,
                             out, out_stride);
    }
    if (column < columns) {
      for (int64_t q = 0; q < queries; ++q) {
        accumulate_tail<T>(chunk, count, chunk_weights + q * query_stride, row_stride, column,
                           columns - column, out + q * out_stride);
      }
    }
  }
}

// --- rows in and out, softmax -----------------------------------------------------------------
template <typename T>
void load_row(const T* from, Accumulator<T>* to, int64_t count) {
  using Acc = Accumulator<T>;
  int64_t i = 0;
  for (; i + kLanes<Acc> <= count; i += kLanes<Acc>) store(load(from + i), to + i);
  if (i < count) store_partial<Acc>(load_partial(from + i, count - i), to + i, count - i);
}

template <typename T>
void store_row(const Accumulator<T>* from, Accumulator<T> factor, T* to, int64_t count) {
  using Acc = Accumulator<T>;
  int64_t i = 0;
  for (; i + kLanes<Acc> <= count; i += kLanes<Acc>) store(load(from + i) * factor, to + i);
  if (i < count) store_partial<Acc>(load_partial(from + i, count - i) * factor, to + i, count - i);
}

// exp for x <= 0. Reduction to |r| <= ln(2)/2 in two steps (Cody and Waite), a polynomial of
// degree 7 (the Taylor coefficients: its error, 5e-9, is below half a unit of float), then 2^n.
// Below the smallest normal result: 0. NaN stays NaN.
inline Vec<float> exp_nonpositive(Vec<float> x) {
  constexpr float kLowest = -87.0f;
  const Vec<float> clamped = x < kLowest ? Vec<float>{} + kLowest : x;
  const Vec<float> shift = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to integer
  const Vec<float> n = shift - 12582912.0f;
  const Vec<float> r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<float> p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const I32 exponent = (bit_cast_vector<I32>(shift) << 23) + 0x3f800000;
  const Vec<float> result = p * bit_cast_vector<Vec<float>>(exponent);
  return x < kLowest ? Vec<float>{} : result;
}
inline Vec<double> exp_nonpositive(Vec<double> x) {
  Vec<double> result;
  for (int i = 0; i < kLanes<double>; ++i) result[i] = std::exp(x[i]);
  return result;
}

template <typename Acc>
Acc exponentials(Acc* scores, int64_t count) {
  constexpr int kStep = kLanes<Acc>;
  Acc max = -std::numeric_limits<Acc>::infinity();
  for (int64_t i = 0; i < count; ++i) max = scores[i] > max ? scores[i] : max;
  Vec<Acc> sums = {};
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    const Vec<Acc> v = exp_nonpositive(load(scores + i) - max);
    store(v, scores + i);
    sums += v;
  }
  Acc sum = sum_lanes<Acc>(sums);
  if (i < count) {
    const Vec<Acc> v = exp_nonpositive(load_partial(scores + i, count - i) - max);
    store_partial<Acc>(v, scores + i, count - i);
    for (; i < count; ++i) sum += scores[i];
  }
  return sum;
}

template <typename Acc>
void softmax_backward(const Acc* p, Acc* dp, int64_t count, Acc scale) {
  constexpr int kStep = kLanes<Acc>;
  Vec<Acc> sums = {};
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) sums += load(p + i) * load(dp + i);
  if (i < count) sums += load_partial(p + i, count - i) * load_partial(dp + i, count - i);
  const Acc delta = sum_lanes<Acc>(sums);
  for (i = 0; i < count; ++i) dp[i] = scale * p[i] * (dp[i] - delta);
}

template <typename Acc>
void scale_values(Acc* values, Acc factor, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] *= factor;
}

}  // namespace

template <typename T>
const RowKernels<T>& table() {
  using Acc = Accumulator<T>;
  static constexpr RowKernels<T> kernels = {
      dot<T>,           accumulate<T>,     load_row<T>,
      store_row<T>,     exponentials<Acc>, softmax_backward<Acc>,
      scale_values<Acc>};
  return kernels;
}

template const RowKernels<double>& table();
template const RowKernels<float>& table();
template const RowKernels<BFloat16>& table();
template const RowKernels<Float16>& table();

}  // namespace l3ext::cpu::L3EXT_ISA
