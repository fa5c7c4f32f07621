// The inner loops of segmented attention on the CPU, one table of functions per instruction set
// and storage type. Rows come as pointers: gathering queries through the permutation and walking
// a strided table are the same thing to them.
#pragma once

#include <cstdint>

#include "core/cpu_features.hpp"
#include "core/dtype.hpp"

namespace l3ext::cpu {

// Every array of row pointers goes on for this many pointers past its rows: what will be read next,
// or anything. The kernels prefetch from there and never read.
constexpr int64_t kRowsAhead = 32;

// T: how rows are stored. Acc: what is computed and summed in.
template <typename T>
struct RowKernels {
  using Acc = Accumulator<T>;

  // out[q * out_stride + r] = scale * dot(x[q * x_stride ..], rows[r]) over `depth` elements.
  // Each dot product is summed in an order that depends on `depth` alone.
  void (*dot)(const T* const* rows, int64_t num_rows, const Acc* x, int64_t x_stride,
              int64_t queries, int64_t depth, Acc scale, Acc* out, int64_t out_stride);

  // out[q * out_stride + c] += sum over r of weights[q * query_stride + r * row_stride] *
  // rows[r][c], r ascending, for `columns` elements.
  void (*accumulate)(const T* const* rows, int64_t num_rows, const Acc* weights,
                     int64_t query_stride, int64_t row_stride, int64_t queries, int64_t columns,
                     Acc* out, int64_t out_stride);

  void (*load)(const T* from, Acc* to, int64_t count);
  // Multiplies by `factor` and rounds to nearest even.
  void (*store)(const Acc* from, Acc factor, T* to, int64_t count);

  // scores[i] = exp(scores[i] - max); returns their sum.
  Acc (*exponentials)(Acc* scores, int64_t count);
  // Given softmax p and its upstream gradient dp: dp[i] = scale * p[i] * (dp[i] - sum_j p[j]
  // dp[j]).
  void (*softmax_backward)(const Acc* p, Acc* dp, int64_t count, Acc scale);
  void (*scale)(Acc* values, Acc factor, int64_t count);
};

template <typename T>
const RowKernels<T>& row_kernels(CpuIsa isa);

}  // namespace l3ext::cpu
