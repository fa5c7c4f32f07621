// The inner loops of segmented attention on the CPU, one table of functions per instruction set
// and storage type.
//
// Scores and softmax weights of `queries` queries lie side by side, row after row:
// [rows, padded(queries)], with padded() up to a multiple of the vector's lanes. Lanes beyond
// `queries` hold finite numbers that nobody reads. Of one query they lie side by side: threads that
// share its rows pass each other as few cache lines as there can be.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "core/cpu_features.hpp"
#include "core/dtype.hpp"

namespace l3ext::cpu {

// Rows of equal length at equal distances: a token's keys or values where they lie in their table.
template <typename T>
struct RowBlock {
  const T* data;
  int64_t stride;  // elements from one row to the next
  int64_t count;

  const T* row(int64_t i) const { return data + i * stride; }
  RowBlock part(int64_t begin, int64_t end) const { return {row(begin), stride, end - begin}; }
};

// Pieces of equal length at equal distances.
struct MemoryRange {
  const std::byte* begin = nullptr;
  int64_t bytes = 0;   // of a piece
  int64_t stride = 0;  // bytes from one to the next
  int64_t count = 1;   // of pieces, at least one
};

// Memory that the thread reads later, in the order in which it does. Products of many queries leave
// memory idle: they ask for it, some lines at a time.
class Wanted {
 public:
  Wanted(const MemoryRange* ranges, const MemoryRange* end) : range_(ranges), end_(end) {
    if (range_ != end_) begin_range();
  }

  bool empty() const { return range_ == end_; }

  // The next `lines` cache lines, into the second-level cache. Inlined: what is compiled for one
  // instruction set defines nothing that all may link, and a call would save all sums around it.
  [[gnu::always_inline]] void ask(int lines) {
    if (range_ == end_) return;
    if (line_ + int64_t{64} * lines < piece_end_) [[likely]] {  // as nearly always: no branches
      for (int i = 0; i < lines; ++i) __builtin_prefetch(line_ + int64_t{64} * i, 0, 2);
      line_ += int64_t{64} * lines;
      return;
    }
    for (; lines > 0 && range_ != end_; --lines) {
      __builtin_prefetch(line_, 0, 2);
      line_ += 64;
      if (line_ < piece_end_) continue;
      if (--pieces_ > 0) {
        piece_end_ += range_->stride;
        line_ = piece_end_ - range_->bytes;
      } else if (++range_ != end_) {
        begin_range();
      }
    }
  }

 private:
  [[gnu::always_inline]] void begin_range() {
    line_ = range_->begin;
    piece_end_ = line_ + range_->bytes;
    pieces_ = range_->count;
  }

  const MemoryRange* range_;
  const MemoryRange* end_;
  const std::byte* line_ = nullptr;
  const std::byte* piece_end_ = nullptr;
  int64_t pieces_ = 0;  // of the range, from this one on
};

// What to ask memory for while rows pass, so that it is near when it is wanted.
template <typename T>
struct Ahead {
  RowBlock<T> next = {};     // rows that the thread reads after these, or none
  Wanted* wanted = nullptr;  // what it reads some time later
};

// A distance of rows of `columns` elements that is an odd number of cache lines: equal columns of
// many rows then lie in different sets of the first-level cache.
template <typename Acc>
constexpr int64_t spread(int64_t columns) {
  constexpr int64_t kLine = 64 / sizeof(Acc);
  return ((columns + kLine - 1) / kLine | 1) * kLine;
}

// How queries of rows stored as T are stored: likewise, but quantised rows meet what is computed
// in.
template <typename T>
using Query = std::conditional_t<sizeof(T) == 1, Accumulator<T>, T>;

// T: how rows are stored. Acc: what is computed and summed in.
template <typename T>
struct RowKernels {
  using Acc = Accumulator<T>;

  int64_t query_lanes;     // padded() is up to a multiple of this, but of 1 it is 1
  int64_t query_block;     // the most queries at once: a multiple of query_lanes
  int64_t backward_block;  // likewise in the backward, which keeps more of them at hand
  int64_t few_queries;   // up to so many are bound by memory: what counts is how rows are asked for
  bool asks_for_wanted;  // whether products of many queries ask for Ahead::wanted
  int64_t padded(int64_t queries) const {
    return queries == 1 ? 1 : (queries + query_lanes - 1) / query_lanes * query_lanes;
  }

  // Queries as scores() wants them, from wherever each lies: elements of the packed copy, and the
  // copy itself. x: [queries] addresses of `depth` elements.
  int64_t (*packed_elements)(int64_t queries, int64_t depth);
  void (*pack)(const Query<T>* const* x, int64_t queries, int64_t depth, Acc* packed);

  // scores[r * padded(queries) + q] = scale * dot(query q, row r) over `depth` elements. All
  // products are summed in the same order, which depends on T and the instruction set; only the
  // kernels of AVX512-BF16 and AMX sum some queries' otherwise than others'.
  void (*scores)(RowBlock<T> rows, const Acc* packed, int64_t queries, int64_t depth, Acc scale,
                 const Ahead<T>& ahead, Acc* scores);

  // out[i * out_stride + c] = (add ? itself : 0) + sum over r, ascending, of
  // weights[i * output_stride + r * row_stride] * row r [c], for i < outputs and c < columns.
  // Fast where out_stride is spread(columns).
  void (*accumulate)(RowBlock<T> rows, const Acc* weights, int64_t output_stride,
                     int64_t row_stride, int64_t outputs, int64_t columns, const Ahead<T>& ahead,
                     bool add, Acc* out, int64_t out_stride);

  void (*load)(const T* from, Acc* to, int64_t count);
  // Multiplies by `factor` and rounds to nearest even. Null for quantised rows: nobody writes them.
  void (*store)(const Acc* from, Acc factor, T* to, int64_t count);
  // Rounds rows likewise and writes them past the caches, if a row of `to` begins and ends where a
  // vector does: a store to a line that no cache holds would read it first. For outputs that no
  // cache will hold anyway. Null as store().
  void (*store_past_caches)(const Acc* from, int64_t from_stride, T* to, int64_t to_stride,
                            int64_t rows, int64_t columns);

  // scores = exp(scores - the largest of their query); sums[q]: the sum over rows.
  void (*exponentials)(Acc* scores, int64_t rows, int64_t queries, Acc* sums);
  // p = p / sums; with dp the upstream gradient of p:
  // ds = scale * p * (dp - sum over rows of p dp), in dp's place.
  void (*softmax_backward)(Acc* p, const Acc* sums, Acc* dp, int64_t rows, int64_t queries,
                           Acc scale);
};

template <typename T>
const RowKernels<T>& row_kernels(CpuIsa isa);

}  // namespace l3ext::cpu
