// The inner loops of segmented attention on the CPU, one table of functions per instruction set
// and storage type.
//
// Scores and softmax weights of `queries` queries lie side by side, row after row:
// [rows, padded(queries)], with padded() up to a multiple of the vector's lanes. Lanes beyond
// `queries` hold finite numbers that nobody reads.
#pragma once

#include <cstdint>

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

// T: how rows are stored. Acc: what is computed and summed in.
template <typename T>
struct RowKernels {
  using Acc = Accumulator<T>;

  int64_t query_lanes;  // padded() is up to a multiple of this
  int64_t query_block;  // the most queries at once: a multiple of query_lanes
  int64_t padded(int64_t queries) const {
    return (queries + query_lanes - 1) / query_lanes * query_lanes;
  }

  // How scores() wants many queries: elements of the packed copy (0 where queries are few; then
  // pack() writes nothing), and the copy itself. x: [queries, x_stride], x_stride >= depth; fast
  // where it is spread(depth).
  int64_t (*packed_elements)(int64_t queries, int64_t depth);
  void (*pack)(const Acc* x, int64_t x_stride, int64_t queries, int64_t depth, Acc* packed);

  // scores[r * padded(queries) + q] = scale * dot(x[q * x_stride ..], row r) over `depth` elements.
  // Each product is summed along the depth; only the kernels of AVX512-BF16 and AMX sum few
  // queries' otherwise than many's. `next`: rows that the thread reads after these, asked for
  // ahead; or none.
  void (*scores)(RowBlock<T> rows, const Acc* x, int64_t x_stride, const Acc* packed,
                 int64_t queries, int64_t depth, Acc scale, const RowBlock<T>& next, Acc* scores);

  // out[i * out_stride + c] += sum over r, ascending, of
  // weights[i * output_stride + r * row_stride] * row r [c], for i < outputs and c < columns.
  // Fast where out_stride is spread(columns).
  void (*accumulate)(RowBlock<T> rows, const Acc* weights, int64_t output_stride,
                     int64_t row_stride, int64_t outputs, int64_t columns, const RowBlock<T>& next,
                     Acc* out, int64_t out_stride);

  void (*load)(const T* from, Acc* to, int64_t count);
  // Multiplies by `factor` and rounds to nearest even. Null for quantised rows: nobody writes them.
  void (*store)(const Acc* from, Acc factor, T* to, int64_t count);

  // scores = exp(scores - the largest of their query); sums[q]: the sum over rows.
  void (*exponentials)(Acc* scores, int64_t rows, int64_t queries, Acc* sums);
  // p = p / sums; with dp the upstream gradient of p:
  // ds = scale * p * (dp - sum over rows of p dp), in dp's place.
  void (*softmax_backward)(Acc* p, const Acc* sums, Acc* dp, int64_t rows, int64_t queries,
                           Acc scale);
};

// A distance of rows of `columns` elements that is an odd number of cache lines: equal columns of
// many rows then lie in different sets of the first-level cache.
template <typename Acc>
constexpr int64_t spread(int64_t columns) {
  constexpr int64_t kLine = 64 / sizeof(Acc);
  return ((columns + kLine - 1) / kLine | 1) * kLine;
}

template <typename T>
const RowKernels<T>& row_kernels(CpuIsa isa);

}  // namespace l3ext::cpu
