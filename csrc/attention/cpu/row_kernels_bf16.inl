// Row kernels for bfloat16 and many queries on one product of blocks, which row_kernels_<isa>.cpp
// brings:
//
//   BlockProduct()(a, a_stride, rows, ahead, b, b_stride, columns, depth, add, sums, sums_stride)
//     sums[i][j] = (add ? sums[i][j] : 0) + sum over k of a[i][k] * b[k][j]
//
// for any number of rows, kWords or 2 kWords columns, and a depth that is a multiple of kDepth. `b`
// holds pairs: b[k / 2][j] is b[k][j] and b[k + 1][j] in one word. `ahead`: rows as many and as far
// apart as those of `a` that are read next, or null.
//
// Scores are table rows, read where they are, times packed queries. Sums are weights, rounded to
// bfloat16 as on a GPU, times table rows whose neighbours are interleaved into pairs in a buffer.
// What does not fill a block is copied beside zeros: nothing past a row, or past the last, is read.
// Few queries, and other columns than kWords at a time, are left to the kernels of avx512.
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#define L3EXT_VECTOR_BYTES 64

namespace l3ext::cpu {
namespace avx512 {
template <typename T>
const RowKernels<T>& table();
}

namespace L3EXT_ISA {
namespace {

#include "attention/cpu/vectors.inl"

constexpr int64_t kWords = kLanes<float>;
constexpr int64_t kDepth = 2 * kWords;

// Not of <algorithm>: what is compiled for one instruction set defines nothing that all may link.
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

bool are_few(int64_t queries) { return avx512::table<BFloat16>().packed_elements(queries, 1) == 0; }

// --- blocks in registers ------------------------------------------------------------------------

// The first `count` of 16; zeros for the rest, which are not read. None if it is negative.
inline __m512 load_floats(const float* from, int64_t count) {
  const uint32_t mask = count >= 16 ? 0xffffu : count <= 0 ? 0u : (1u << count) - 1;
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from);
}

// The first `count` of 32 floats, rounded.
inline U32 load_rounded(const float* from, int64_t count) {
  const __m256i low = round_to_bf16(load_floats(from, count));
  const __m256i high = round_to_bf16(load_floats(from + 16, count - 16));
  return bit_cast_vector<U32>(_mm512_inserti64x4(_mm512_zextsi256_si512(low), high, 1));
}

template <typename To>
inline void store_words(U32 words, To* to) {
  std::memcpy(to, &words, sizeof(words));
}

// Words whose lower halves are `even`.
inline U32 interleave(__m256i even, __m256i odd) {
  return __builtin_convertvector(bit_cast_vector<U16>(even), U32) |
         __builtin_convertvector(bit_cast_vector<U16>(odd), U32) << 16;
}

// --- scores -------------------------------------------------------------------------------------

int64_t packed_elements(int64_t queries, int64_t depth) {
  return are_few(queries) ? 0 : round_up(depth, kDepth) / 2 * round_up(queries, kWords);
}

// packed[k / 2][q]: elements k and k + 1 of query q. Zeros beside the queries and below `depth`.
// The queries come from bfloat16: rounding is exact.
void pack(const float* x, int64_t x_stride, int64_t queries, int64_t depth, float* packed) {
  if (are_few(queries)) return;
  const int64_t stride = round_up(queries, kWords);
  for (int64_t q = 0; q < stride; q += kWords) {
    for (int64_t k = 0; k < depth; k += kDepth) {
      U32 words[kWords];
      for (int64_t i = 0; i < kWords; ++i) {
        words[i] = q + i < queries ? load_rounded(x + (q + i) * x_stride + k, depth - k) : U32{};
      }
      transpose<uint32_t, L3EXT_VECTOR_BYTES>(words);
      for (int64_t i = 0; i < kWords; ++i) {
        store_words(words[i], packed + (k / 2 + i) * stride + q);
      }
    }
  }
}

void scores(RowBlock<BFloat16> rows, const float* x, int64_t x_stride, const float* packed,
            int64_t queries, int64_t depth, float scale, const RowBlock<BFloat16>& next,
            float* out) {
  if (are_few(queries)) {
    avx512::table<BFloat16>().scores(rows, x, x_stride, nullptr, queries, depth, scale, next, out);
    return;
  }
  constexpr int64_t kRows = 32;
  const int64_t stride = round_up(queries, kWords), whole = depth / kDepth * kDepth;
  const auto last = static_cast<__mmask32>((uint64_t{1} << (depth - whole)) - 1);
  alignas(64) BFloat16 rest[kRows * kDepth];  // of the rows' elements from `whole` on
  BlockProduct product;
  for (int64_t r = 0; r < rows.count; r += kRows) {
    const int64_t count = smaller(kRows, rows.count - r);
    const BFloat16* ahead = r + count < rows.count ? rows.row(r + count) : next.data;
    float* block = out + r * stride;
    for (int64_t i = 0; whole != depth && i < count; ++i) {
      _mm512_store_si512(rest + i * kDepth,
                         _mm512_maskz_loadu_epi16(last, rows.row(r + i) + whole));
    }
    for (int64_t q = 0; q < stride; q += 2 * kWords) {
      const int64_t columns = smaller(2 * kWords, stride - q);
      if (whole != 0) {
        product(rows.row(r), rows.stride, count, q == 0 ? ahead : nullptr, packed + q, stride,
                columns, whole, false, block + q, stride);
      }
      if (whole != depth) {
        product(rest, kDepth, count, nullptr, packed + whole / 2 * stride + q, stride, columns,
                kDepth, whole != 0, block + q, stride);
      }
    }
    for (int64_t i = 0; i < count * stride; i += kWords) {
      store(load(block + i) * scale, block + i);
    }
  }
}

// --- sums ---------------------------------------------------------------------------------------

// rounded[i][r], a row being `width` elements, a multiple of kDepth: zeros from `rows` on. One of
// the strides is 1.
void round_weights(const float* weights, int64_t output_stride, int64_t row_stride, int64_t outputs,
                   int64_t rows, BFloat16* rounded, int64_t width) {
  for (int64_t r = 0; r < width; r += kDepth) {
    const int64_t count = smaller(kDepth, rows - r);
    if (row_stride == 1) {
      for (int64_t i = 0; i < outputs; ++i) {
        store_words(load_rounded(weights + i * output_stride + r, count), rounded + i * width + r);
      }
      continue;
    }
    for (int64_t i = 0; i < outputs; i += kWords) {
      const int64_t lanes = smaller(kWords, outputs - i);
      const auto load_row = [&](int64_t k) {
        return round_to_bf16(
            load_floats(weights + i + (r + k) * row_stride, k < count ? lanes : 0));
      };
      U32 words[kWords];
      for (int64_t k = 0; k < kDepth; k += 2) {
        words[k / 2] = interleave(load_row(k), load_row(k + 1));
      }
      transpose<uint32_t, L3EXT_VECTOR_BYTES>(words);
      for (int64_t j = 0; j < lanes; ++j) {
        store_words(words[j], rounded + (i + j) * width + r);
      }
    }
  }
}

// pairs[r / 2][c]: rows r and r + 1 of column c; zeros from the last row to `depth`.
void interleave_rows(const RowBlock<BFloat16>& rows, int64_t columns, int64_t depth,
                     uint32_t* pairs) {
  const auto load_row = [&](int64_t r, int64_t c) {
    return r < rows.count ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows.row(r) + c))
                          : _mm256_setzero_si256();
  };
  for (int64_t r = 0; r < depth; r += 2) {
    for (int64_t c = 0; c < columns; c += kWords) {
      store_words(interleave(load_row(r, c), load_row(r + 1, c)), pairs + r * kWords + c);
    }
  }
}

// Of columns that are a multiple of kWords.
void add_products(RowBlock<BFloat16> rows, const float* weights, int64_t output_stride,
                  int64_t row_stride, int64_t outputs, int64_t columns,
                  const RowBlock<BFloat16>& next, float* out, int64_t out_stride) {
  // Rows whose pairs, and outputs whose weights, are at hand at once: 8 KiB and 16 KiB.
  constexpr int64_t kRows = 128, kOutputs = 64, kPanel = 2 * kWords;
  alignas(64) uint32_t pairs[kRows / 2 * kPanel];
  alignas(64) BFloat16 rounded[kOutputs * kRows];
  BlockProduct product;
  for (int64_t r = 0; r < rows.count; r += kRows) {
    const int64_t count = smaller(kRows, rows.count - r), depth = round_up(count, kDepth);
    const BFloat16* ahead = r + count < rows.count ? rows.row(r + count) : next.data;
    for (int64_t i = 0; i < outputs; i += kOutputs) {
      const int64_t some = smaller(kOutputs, outputs - i);
      round_weights(weights + i * output_stride + r * row_stride, output_stride, row_stride, some,
                    count, rounded, depth);
      for (int64_t c = 0; c < columns; c += kPanel) {
        const int64_t panel = smaller(kPanel, columns - c);
        for (int64_t k = 0; i == 0 && ahead != nullptr && k < count; ++k) {
          __builtin_prefetch(ahead + k * rows.stride + c, 0, 2);
        }
        interleave_rows({rows.row(r) + c, rows.stride, count}, panel, depth, pairs);
        product(rounded, depth, some, nullptr, reinterpret_cast<const float*>(pairs), kPanel, panel,
                depth, true, out + i * out_stride + c, out_stride);
      }
    }
  }
}

void accumulate(RowBlock<BFloat16> rows, const float* weights, int64_t output_stride,
                int64_t row_stride, int64_t outputs, int64_t columns,
                const RowBlock<BFloat16>& next, float* out, int64_t out_stride) {
  const int64_t whole = are_few(outputs) ? 0 : columns / kWords * kWords;
  if (whole != 0) {
    add_products(rows, weights, output_stride, row_stride, outputs, whole, next, out, out_stride);
  }
  if (whole != columns) {
    const RowBlock<BFloat16> rest = {rows.data + whole, rows.stride, rows.count};
    avx512::table<BFloat16>().accumulate(rest, weights, output_stride, row_stride, outputs,
                                         columns - whole, next, out + whole, out_stride);
  }
}

}  // namespace

const RowKernels<BFloat16>& table() {
  static const RowKernels<BFloat16> kernels = [] {
    RowKernels<BFloat16> all = avx512::table<BFloat16>();
    all.query_block = 4 * kWords;  // the outputs that share one interleaving of the rows
    all.packed_elements = packed_elements;
    all.pack = pack;
    all.scores = scores;
    all.accumulate = accumulate;
    return all;
  }();
  return kernels;
}

}  // namespace L3EXT_ISA
}  // namespace l3ext::cpu
