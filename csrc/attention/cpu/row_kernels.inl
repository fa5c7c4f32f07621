// The row kernels, once; compiled per instruction set by row_kernels_<isa>.cpp with
// -ffp-contract=fast, so that a * b + c is one rounding where the set has FMA.
//
// Few queries are bound by memory, many by FMAs: stream.inl and dense.inl. Rows are never repacked,
// and widen on the way to the registers: their scores are those of dots.inl.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "attention/cpu/row_kernels.hpp"

namespace l3ext::cpu::L3EXT_ISA {
namespace {

#include "attention/cpu/vectors.inl"
// in this order
#include "attention/cpu/stream.inl"
// in this order
#include "attention/cpu/dense.inl"
// in this order
#include "attention/cpu/dots.inl"
// in this order
#include "attention/cpu/softmax.inl"

// Up to so many queries stream. Beyond, lanes without a query cost less than sums across lanes.
constexpr int64_t kFewQueries = L3EXT_FEW_QUERIES;

template <typename T>
constexpr bool kWidened = !std::is_same_v<T, Accumulator<T>>;

template <typename T>
int64_t packed_elements(int64_t queries, int64_t depth) {
  using Acc = Accumulator<T>;
  constexpr int kStep = kLanes<Acc>;
  if (kWidened<T> || queries <= kFewQueries) return queries * spread<Acc>(depth);
  return (queries + kStep - 1) / kStep * kStep * depth;
}

template <typename T>
void pack(const Query<T>* const* x, int64_t queries, int64_t depth, Accumulator<T>* packed) {
  if constexpr (kWidened<T>) {
    pack_dots(x, queries, depth, packed);
  } else {
    if (queries > kFewQueries) return pack_queries(x, queries, depth, packed);
    const int64_t stride = spread<T>(depth);
    for (int64_t q = 0; q < queries; ++q) load_row(x[q], packed + q * stride, depth);
  }
}

template <typename T>
void scores(RowBlock<T> rows, const Accumulator<T>* packed, int64_t queries, int64_t depth,
            Accumulator<T> scale, const Ahead<T>& ahead, Accumulator<T>* out) {
  if constexpr (kWidened<T>) {
    dot_scores<T>(rows, packed, queries, depth, scale, ahead.next, out);
  } else if (queries <= kFewQueries) {
    stream_scores<T>(rows, packed, spread<T>(depth), queries, depth, scale, ahead.next, out);
  } else {
    dense_scores<T>(rows, packed, queries, depth, scale, ahead.next, out);
  }
}

template <typename T>
void accumulate(RowBlock<T> rows, const Accumulator<T>* weights, int64_t output_stride,
                int64_t row_stride, int64_t outputs, int64_t columns, const Ahead<T>& ahead,
                bool add, Accumulator<T>* out, int64_t out_stride) {
  if (outputs > kFewQueries) {
    return dense_accumulate<T>(rows, weights, output_stride, row_stride, outputs, columns,
                               ahead.next, add, out, out_stride);
  }
  if (!add) clear_rows(out, out_stride, outputs, columns);
  stream_accumulate<T>(rows, weights, output_stride, row_stride, outputs, columns, ahead.next, out,
                       out_stride);
}

// Quantised rows are read and never written.
template <typename T>
constexpr decltype(RowKernels<T>::store) stored() {
  if constexpr (sizeof(T) == 1) {
    return nullptr;
  } else {
    return store_row<T>;
  }
}
template <typename T>
constexpr decltype(RowKernels<T>::store_past_caches) stored_past_caches() {
  if constexpr (sizeof(T) == 1) {
    return nullptr;
  } else {
    return store_rows_past_caches<T>;
  }
}

}  // namespace

template <typename T>
const RowKernels<T>& table() {
  using Acc = Accumulator<T>;
  static constexpr RowKernels<T> kernels = {
      .query_lanes = kLanes<Acc>,
      .query_block = kPanels * kVectors * kLanes<Acc>,
      .backward_block = kPanels * kVectors * kLanes<Acc>,
      .few_queries = kFewQueries,
      .asks_for_wanted = false,
      .packed_elements = packed_elements<T>,
      .pack = pack<T>,
      .scores = scores<T>,
      .accumulate = accumulate<T>,
      .load = load_row<T>,
      .store = stored<T>(),
      .store_past_caches = stored_past_caches<T>(),
      .exponentials = exponentials<Acc>,
      .softmax_backward = softmax_backward<Acc>,
  };
  return kernels;
}

template const RowKernels<double>& table();
template const RowKernels<float>& table();
template const RowKernels<BFloat16>& table();
template const RowKernels<Float16>& table();
template const RowKernels<Float8E4M3>& table();
template const RowKernels<int8_t>& table();

}  // namespace l3ext::cpu::L3EXT_ISA
