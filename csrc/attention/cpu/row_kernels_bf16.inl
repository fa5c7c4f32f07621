// Row kernels for bfloat16 and many queries on one product of blocks, which row_kernels_<isa>.cpp
// brings:
//
//   BlockProduct()(a, a_stride, rows, prefetches, b, b_stride, columns, depth, add, sums,
//                  sums_stride)
//     sums[i][j] = (add ? sums[i][j] : 0) + sum over k of a[i][k] * b[k][j]
//
// for any number of rows, kWords or 2 kWords columns, and a depth that is a multiple of kDepthStep.
// `b` holds pairs: b[k / 2][j] is b[k][j] and b[k + 1][j] in one word. `prefetches`: what
// to ask memory for meanwhile.
//
// and BlockProduct::kQueries, whose lanes fill a block; kPairQueries, the most beside full blocks
// that meet rows in products of pairs; kFewQueries, up to which memory is what takes time;
// kFewRows, up to which sums over rows gain nothing by it.
//
// Scores of many queries are table rows, read where they are, times packed queries. Those that fill
// no block meet a row in products of pairs side by side, which are summed across lanes in the end.
// Sums are weights, rounded to bfloat16 as
// on a GPU, times table rows whose neighbours are interleaved into pairs in a buffer. What does not
// fill a block is copied beside zeros: nothing past a row, or past the last, is read. Sums of few
// outputs or few rows, and of other columns than kWords at a time, are left to the kernels of
// avx512.
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

// --- queries ------------------------------------------------------------------------------------

// The first `count` of 32 elements; zeros for the rest, which are not read.
inline __m512i load_elements(const BFloat16* from, int64_t count) {
  if (count >= kDepth) return _mm512_loadu_si512(from);
  const uint32_t mask = count <= 0 ? 0u : (1u << count) - 1;
  return _mm512_maskz_loadu_epi16(mask, from);
}

// Queries that meet rows in products of blocks, the lanes beside the last among them. The others,
// the last ones, meet them in products of pairs.
constexpr int64_t in_panels(int64_t queries) {
  const int64_t rest = queries % BlockProduct::kQueries;
  return rest <= BlockProduct::kPairQueries ? queries - rest : round_up(queries, kWords);
}

static_assert(in_panels(BlockProduct::kFewQueries) == 0);

int64_t packed_elements(int64_t queries, int64_t depth) {
  const int64_t panels = in_panels(queries);
  return round_up(depth, kDepth) / 2 * (queries > panels ? queries : panels);
}

// In panels: packed[k / 2][q] are elements k and k + 1 of query q, with zeros beside the queries
// and below `depth`. The others one after the other, up to a multiple of kDepth, with zeros.
void pack(const BFloat16* const* x, int64_t queries, int64_t depth, float* packed) {
  const int64_t stride = in_panels(queries);
  for (int64_t q = 0; q < stride; q += kWords) {
    for (int64_t k = 0; k < depth; k += kDepth) {
      U32 words[kWords];
      for (int64_t i = 0; i < kWords; ++i) {
        words[i] =
            q + i < queries ? bit_cast_vector<U32>(load_elements(x[q + i] + k, depth - k)) : U32{};
      }
      transpose<uint32_t, L3EXT_VECTOR_BYTES>(words);
      for (int64_t i = 0; i < kWords; ++i) {
        store_words(words[i], packed + (k / 2 + i) * stride + q);
      }
    }
  }
  packed += round_up(depth, kDepth) / 2 * stride;
  for (int64_t q = stride; q < queries; ++q) {
    for (int64_t k = 0; k < depth; k += kDepth, packed += kWords) {
      _mm512_storeu_si512(packed, load_elements(x[q] + k, depth - k));
    }
  }
}

#include "attention/cpu/pairs.inl"

// --- scores -------------------------------------------------------------------------------------

void scores(RowBlock<BFloat16> rows, const float* packed, int64_t queries, int64_t depth,
            float scale, const Ahead<BFloat16>& ahead, float* out) {
  const int64_t ld = padded<float>(queries);
  if (queries <= BlockProduct::kFewQueries) {
    return score_all_pairs(rows, packed, queries, depth, scale, smaller(rows.count, kRowsAhead),
                           {ahead.next}, out, ld);
  }
  // Elements of a row between two visits of the sums: so much of 32 queries (32 KiB) stays in the
  // first-level cache while a group of rows passes.
  constexpr int64_t kRows = 32, kPart = 512;
  const int64_t panels = in_panels(queries), whole = depth / kDepth * kDepth;
  const float* pairs = packed + round_up(depth, kDepth) / 2 * panels;
  alignas(64) BFloat16 rest[kRows * kDepth];  // of the rows' elements from `whole` on
  BlockProduct product;
  for (int64_t r = 0; r < rows.count; r += kRows) {
    const int64_t count = smaller(kRows, rows.count - r);
    const RowBlock<BFloat16> after = rows_ahead(rows, r + count, ahead.next);
    float* block = out + r * ld;
    for (int64_t k = 0; k < (panels == 0 ? 0 : whole); k += kPart) {
      const int64_t part = smaller(kPart, whole - k);
      for (int64_t q = 0; q < panels; q += 2 * kWords) {
        Prefetches prefetches = {.wanted = ahead.wanted};
        if (q == 0 && after.count > 0) {
          prefetches.rows = after.data + k;
          prefetches.stride = after.stride;
        }
        product(rows.row(r) + k, rows.stride, count, prefetches, packed + k / 2 * panels + q,
                panels, smaller(2 * kWords, panels - q), part, k != 0, block + q, ld);
      }
    }
    if (whole != depth && panels != 0) {
      for (int64_t i = 0; i < count; ++i) {
        _mm512_store_si512(rest + i * kDepth,
                           load_elements(rows.row(r + i) + whole, depth - whole));
      }
      for (int64_t q = 0; q < panels; q += 2 * kWords) {
        product(rest, kDepth, count, {}, packed + whole / 2 * panels + q, panels,
                smaller(2 * kWords, panels - q), kDepth, whole != 0, block + q, ld);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t q = 0; q < panels; q += kWords) {
        store(load(block + i * ld + q) * scale, block + i * ld + q);
      }
    }
    // A vector of queries, which stay in the first-level cache while rows pass.
    for (int64_t q = panels; q < queries; q += kWords) {
      score_all_pairs(rows.part(r, r + count), pairs + (q - panels) * round_up(depth, kDepth) / 2,
                      smaller(kWords, queries - q), depth, scale, q == 0 ? count : 0,
                      {after, ahead.wanted}, block + q, ld);
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

// pairs[r / 2][c]: rows r and r + 1 of column c; zeros from the last row to `depth`. kWords or
// 2 kWords columns.
void interleave_rows(const RowBlock<BFloat16>& rows, int64_t columns, int64_t depth,
                     uint32_t* pairs) {
  // Of two vectors of 32: 0, 32, 1, 33 and so on to 15, 47; and from there on.
  alignas(64) uint16_t order[kDepth];
  for (int i = 0; i < kDepth; ++i) order[i] = static_cast<uint16_t>(i / 2 + i % 2 * 32);
  const __m512i low = _mm512_load_si512(order);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t r = 0; r < depth; r += 2, pairs += 2 * kWords) {
    const __m512i even = load_elements(rows.row(r), r < rows.count ? columns : 0);
    const __m512i odd = load_elements(rows.row(r + 1), r + 1 < rows.count ? columns : 0);
    _mm512_storeu_si512(pairs, _mm512_permutex2var_epi16(even, low, odd));
    if (columns > kWords) {
      _mm512_storeu_si512(pairs + kWords, _mm512_permutex2var_epi16(even, high, odd));
    }
  }
}

// Outputs that share one interleaving of rows: their weights for 256 rows take 64 KiB, the rows'
// pairs 16 KiB.
constexpr int64_t kOutputs = 8 * kWords;

// Of columns that are a multiple of kWords.
void add_products(RowBlock<BFloat16> rows, const float* weights, int64_t output_stride,
                  int64_t row_stride, int64_t outputs, int64_t columns,
                  const Ahead<BFloat16>& ahead, bool add, float* out, int64_t out_stride) {
  // Rows between two visits of the sums: the weights of many outputs may pass through the
  // second-level cache, those of few stay in the first.
  constexpr int64_t kRows = 256, kFewRows = 128, kPanel = 2 * kWords;
  alignas(64) uint32_t pairs[kRows / 2 * kPanel];
  alignas(64) BFloat16 rounded[kOutputs * kRows];
  const bool few = outputs <= BlockProduct::kFewQueries;
  const int64_t visit = few ? kFewRows : kRows;
  BlockProduct product;
  for (int64_t r = 0; r < rows.count; r += visit) {
    const int64_t count = smaller(visit, rows.count - r), width = round_up(count, kDepth);
    const int64_t depth = round_up(count, BlockProduct::kDepthStep);
    const RowBlock<BFloat16> after = rows_ahead(rows, r + count, ahead.next);
    for (int64_t i = 0; i < outputs; i += kOutputs) {
      const int64_t some = smaller(kOutputs, outputs - i);
      round_weights(weights + i * output_stride + r * row_stride, output_stride, row_stride, some,
                    count, rounded, width);
      for (int64_t c = 0; c < columns; c += kPanel) {
        const int64_t panel = smaller(kPanel, columns - c);
        if (few) {  // the rows of many outputs were asked for as wanted
          for (int64_t k = 0; k < smaller(count, after.count); ++k) prefetch(after.row(k) + c);
          for (int64_t k = 0; c + kPanel < columns && k < count; ++k) {
            prefetch(rows.row(r + k) + c + kPanel);
          }
        }
        interleave_rows({rows.row(r) + c, rows.stride, count}, panel, depth, pairs);
        product(rounded, width, some, {.wanted = ahead.wanted},
                reinterpret_cast<const float*>(pairs), kPanel, panel, depth, add || r > 0,
                out + i * out_stride + c, out_stride);
      }
    }
  }
}

void accumulate(RowBlock<BFloat16> rows, const float* weights, int64_t output_stride,
                int64_t row_stride, int64_t outputs, int64_t columns, const Ahead<BFloat16>& ahead,
                bool add, float* out, int64_t out_stride) {
  const bool few = outputs <= 2 || rows.count <= BlockProduct::kFewRows;
  const int64_t whole = few ? 0 : columns / kWords * kWords;
  if (whole != 0) {
    add_products(rows, weights, output_stride, row_stride, outputs, whole, ahead, add, out,
                 out_stride);
  }
  if (whole != columns) {
    const RowBlock<BFloat16> rest = {rows.data + whole, rows.stride, rows.count};
    avx512::table<BFloat16>().accumulate(rest, weights, output_stride, row_stride, outputs,
                                         columns - whole, ahead, add, out + whole, out_stride);
  }
}

}  // namespace

const RowKernels<BFloat16>& table() {
  static const RowKernels<BFloat16> kernels = [] {
    RowKernels<BFloat16> all = avx512::table<BFloat16>();
    all.query_block = kOutputs;
    all.backward_block = kOutputs * 3 / 4;
    all.asks_for_wanted = true;
    all.few_queries = BlockProduct::kFewQueries;
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
