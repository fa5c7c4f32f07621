// Few queries: every row comes from memory once and is used a few times, so that what counts is
// how early it was asked for.

template <typename T, int kBytes>
constexpr int kLanesOf = kBytes / static_cast<int>(sizeof(T));

// A vector of rows, an element of each, meets an element of each query: the sums run along the
// depth in the same order as in dense.inl, so that a query's bits do not depend on how many share
// its segment. Blocks of rows are transposed in registers.
template <typename T, int kBytes, int kQueries>
inline void stream_block(const T* const* rows, const T* const* ahead, int64_t count, const T* x,
                         int64_t x_stride, int64_t depth, T scale, T* scores, int64_t ld) {
  using Vector = typename VectorOf<T, kBytes>::type;
  constexpr int kRows = kLanesOf<T, kBytes>;
  Vector sums[kQueries] = {};
  const auto multiply = [&](const Vector& elements, int64_t k) {
#pragma GCC unroll 4
    for (int q = 0; q < kQueries; ++q) sums[q] += elements * x[q * x_stride + k];
  };
  Vector block[kRows];
  int64_t k = 0;
  for (; k + kRows <= depth; k += kRows) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      prefetch(ahead[r] + k);
      block[r] = load_raw<Vector>(rows[r] + k);
    }
    transpose<T, kBytes>(block);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) multiply(block[i], k + i);
  }
  if (k < depth) {
    for (int r = 0; r < kRows; ++r) {
      block[r] = Vector{};
      std::memcpy(&block[r], rows[r] + k, static_cast<size_t>(depth - k) * sizeof(T));
    }
    transpose<T, kBytes>(block);
    for (int i = 0; k < depth; ++i, ++k) multiply(block[i], k);
  }
  for (int q = 0; q < kQueries; ++q) {
    for (int64_t r = 0; r < count; ++r) scores[r * ld + q] = scale * sums[q][r];
  }
}

// Rows [first, first + count), as many as a vector of kBytes has lanes or fewer.
template <typename T, int kBytes>
inline void stream_rows(const RowBlock<T>& rows, int64_t first, int64_t count,
                        const RowBlock<T>& next, const T* x, int64_t x_stride, int64_t queries,
                        int64_t depth, T scale, T* scores, int64_t ld) {
  constexpr int kRows = kLanesOf<T, kBytes>;
  const T* row[kRows];
  const T* ahead[kRows];
  for (int r = 0; r < kRows; ++r) {  // lanes without a row repeat the last
    row[r] = rows.row(first + (r < count ? r : count - 1));
    ahead[r] = row_ahead(rows, first + count + r, next);
  }
  int64_t q = 0;
  const auto run = [&]<int kQueries>(std::integral_constant<int, kQueries>) {
    for (; q + kQueries <= queries; q += kQueries) {
      stream_block<T, kBytes, kQueries>(row, ahead, count, x + q * x_stride, x_stride, depth, scale,
                                        scores + q, ld);
    }
  };
  run(std::integral_constant<int, 4>{});
  run(std::integral_constant<int, 2>{});
  run(std::integral_constant<int, 1>{});
}

template <typename T>
void stream_scores(RowBlock<T> rows, const T* x, int64_t x_stride, int64_t queries, int64_t depth,
                   T scale, const RowBlock<T>& next, T* scores) {
  const int64_t ld = padded<T>(queries);
  if (ld != queries) std::memset(scores, 0, static_cast<size_t>(rows.count * ld) * sizeof(T));
  for (int64_t r = 0; r < rows.count;) {
    // Half the lanes where half are enough: half the work on as many rows.
    const auto run = [&]<int kBytes>(std::integral_constant<int, kBytes>) {
      const int64_t left = rows.count - r;
      const int64_t count = left < kLanesOf<T, kBytes> ? left : kLanesOf<T, kBytes>;
      stream_rows<T, kBytes>(rows, r, count, next, x, x_stride, queries, depth, scale,
                             scores + r * ld, ld);
      r += count;
    };
    constexpr int kBytes = L3EXT_VECTOR_BYTES;
    const int64_t left = rows.count - r;
    if constexpr (kBytes >= 64) {
      if (left <= kLanes<T> / 4) {
        run(std::integral_constant<int, kBytes / 4>{});
        continue;
      }
    }
    if constexpr (kBytes >= 32) {
      if (left <= kLanes<T> / 2) {
        run(std::integral_constant<int, kBytes / 2>{});
        continue;
      }
    }
    run(std::integral_constant<int, kBytes>{});
  }
}

// out[i, :] += the sum of kRows weighted rows: the rows pass once, the sums stay in the first-level
// cache.
template <typename T, int kRows, int kOutputs>
inline void stream_sum(const T* const* rows, const T* const* ahead, const Accumulator<T>* weights,
                       int64_t output_stride, int64_t row_stride, int64_t columns,
                       Accumulator<T>* out, int64_t out_stride) {
  using Acc = Accumulator<T>;
  constexpr int kStep = kLanes<Acc>, kPart = kParts<T>;
  constexpr int64_t kLine = 64 / sizeof(T);
  Acc weight[kOutputs][kRows];
#pragma GCC unroll 8
  for (int i = 0; i < kOutputs; ++i) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      weight[i][r] = weights[i * output_stride + r * row_stride] * Acc{kUnit<T>};
    }
  }
  const auto add = [&](int i, Vec<Acc> sum, const auto* values) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sum += values[r] * weight[i][r];
    return sum;
  };
  int64_t c = 0;
  for (; c + kPart * kStep <= columns; c += kPart * kStep) {
    Vec<Acc> values[kPart][kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      if (c % kLine == 0) prefetch(ahead[r] + c);
      Vec<Acc> parts[kPart];
      load_parts(rows[r] + c, parts);
#pragma GCC unroll 2
      for (int p = 0; p < kPart; ++p) values[p][r] = parts[p];
    }
#pragma GCC unroll 8
    for (int i = 0; i < kOutputs; ++i) {
#pragma GCC unroll 2
      for (int p = 0; p < kPart; ++p) {
        Acc* to = out + i * out_stride + c + p * kStep;
        store(add(i, load(to), values[p]), to);
      }
    }
  }
  for (; c < columns; c += kStep) {
    const int64_t some = columns - c < kStep ? columns - c : kStep;
    Vec<Acc> values[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) values[r] = load_partial_part(rows[r] + c, some);
#pragma GCC unroll 8
    for (int i = 0; i < kOutputs; ++i) {
      Acc* to = out + i * out_stride + c;
      store_partial<Acc>(add(i, load_partial(to, some), values), to, some);
    }
  }
}

constexpr int64_t kRowsAhead = 16;  // some 10 KiB: memory answers within the time they take

template <typename T>
void stream_accumulate(RowBlock<T> rows, const Accumulator<T>* weights, int64_t output_stride,
                       int64_t row_stride, int64_t outputs, int64_t columns,
                       const RowBlock<T>& next, Accumulator<T>* out, int64_t out_stride) {
  const int64_t distance = rows.count < kRowsAhead ? rows.count : kRowsAhead;
  int64_t r = 0;
  const auto run = [&]<int kRows>(std::integral_constant<int, kRows>) {
    const T* row[kRows];
    const T* ahead[kRows];
    for (int i = 0; i < kRows; ++i) {
      row[i] = rows.row(r + i);
      ahead[i] = row_ahead(rows, r + i + distance, next);
    }
    const auto* w = weights + r * row_stride;
    int64_t i = 0;
    for (; i + 2 <= outputs; i += 2) {
      stream_sum<T, kRows, 2>(row, ahead, w + i * output_stride, output_stride, row_stride, columns,
                              out + i * out_stride, out_stride);
    }
    if (i < outputs) {
      stream_sum<T, kRows, 1>(row, ahead, w + i * output_stride, output_stride, row_stride, columns,
                              out + i * out_stride, out_stride);
    }
    return kRows;
  };
  constexpr int kRows = 4;
  while (r + kRows <= rows.count) r += run(std::integral_constant<int, kRows>{});
  while (r < rows.count) r += run(std::integral_constant<int, 1>{});
}
