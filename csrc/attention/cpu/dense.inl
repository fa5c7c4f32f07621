// Many queries: bound by FMAs. Scores of rows that are stored as computed: queries lie side by side
// (one vector holds an element of as many queries as it has lanes), and each element of a row,
// broadcast, meets all of them: rows are read once and in place, and no sum runs across lanes.
// Sums: vectors run along the columns, and the weights are broadcast. Rows are widened block by
// block in the first-level cache.

constexpr int kVectors = L3EXT_DENSE_VECTORS;    // of queries
constexpr int kPanels = 2;                       // of so many vectors, that share a reading of rows
constexpr int kTile = L3EXT_DENSE_ACCUMULATORS;  // vectors of sums that the registers hold

// --- packing ----------------------------------------------------------------------------------

// packed[k, q] for q < padded(queries): x[q][k], zero past the queries.
template <typename T>
void pack_queries(const T* const* x, int64_t queries, int64_t depth, T* packed) {
  constexpr int kStep = kLanes<T>;
  const int64_t ld = (queries + kStep - 1) / kStep * kStep;
  for (int64_t q = 0; q < queries; q += kStep) {
    const int64_t count = queries - q < kStep ? queries - q : kStep;
    for (int64_t k = 0; k < depth; k += kStep) {
      const int64_t elements = depth - k < kStep ? depth - k : kStep;
      T* to = packed + k * ld + q;
      Vec<T> v[kStep];
      if (count == kStep && elements == kStep) {
#pragma GCC unroll 16
        for (int i = 0; i < kStep; ++i) v[i] = load(x[q + i] + k);
        transpose<T, L3EXT_VECTOR_BYTES>(v);
#pragma GCC unroll 16
        for (int i = 0; i < kStep; ++i) store(v[i], to + i * ld);
        continue;
      }
      for (int i = 0; i < kStep; ++i) {
        v[i] = i < count ? load_partial(x[q + i] + k, elements) : Vec<T>{};
      }
      transpose<T, L3EXT_VECTOR_BYTES>(v);
      for (int64_t i = 0; i < elements; ++i) store(v[i], to + i * ld);
    }
  }
}

// --- scores -----------------------------------------------------------------------------------

// scores[r, :] += rows[r, :] x for kRows rows and kQ vectors of queries, times `scale` in the end.
// ahead: the rows that are read next.
template <typename T, int kRows, int kQ>
inline void score_tile(const T* rows, int64_t row_stride, const RowBlock<T>& ahead, const T* packed,
                       int64_t ld, int64_t depth, bool first, T scale, T* scores) {
  constexpr int kStep = kLanes<T>;
  Vec<T> sums[kRows][kQ];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int q = 0; q < kQ; ++q) sums[r][q] = first ? Vec<T>{} : load(scores + r * ld + q * kStep);
  }
  const auto multiply = [&](int64_t k) {
    Vec<T> x[kQ];
#pragma GCC unroll 4
    for (int q = 0; q < kQ; ++q) {
      x[q] = load(packed + k * ld + q * kStep);
      keep_in_register(x[q]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      Vec<T> element = broadcast(rows[r * row_stride + k]);
      if constexpr (kQ > 1) keep_in_register(element);
#pragma GCC unroll 4
      for (int q = 0; q < kQ; ++q) sums[r][q] += x[q] * element;
    }
  };
  constexpr int64_t kLine = 64 / sizeof(T);
  int64_t k = 0;
  for (; k + kLine <= depth; k += kLine) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) prefetch(ahead.row(r) + k);
#pragma GCC unroll 4
    for (int64_t i = 0; i < kLine; ++i) multiply(k + i);
  }
  for (; k < depth; ++k) multiply(k);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int q = 0; q < kQ; ++q) store(sums[r][q] * scale, scores + r * ld + q * kStep);
  }
}

// Elements of a row between two visits of a tile's sums: so much of all queries (24 KiB) stays in
// the first-level cache while a group of tiles passes.
constexpr int64_t kDepth = 128;
constexpr int64_t kTilesOfGroup = 4;

template <typename T, int kRows, int kQ>
inline void score_rows(const RowBlock<T>& rows, const RowBlock<T>& ahead, const T* packed,
                       int64_t ld, int64_t depth, bool first, T scale, T* scores) {
  // One vector of queries uses each element once: it must be in the first-level cache by then.
  if constexpr (kQ > 1) {
    score_tile<T, kRows, kQ>(rows.data, rows.stride, ahead, packed, ld, depth, first, scale,
                             scores);
  } else {
    alignas(64) T copy[kRows * kDepth];
    for (int r = 0; r < kRows; ++r) load_row(rows.row(r), copy + r * kDepth, depth);
    score_tile<T, kRows, kQ>(copy, kDepth, ahead, packed, ld, depth, first, scale, scores);
  }
}

// Rows of a tile. No more than a set of the first-level cache has ways: they may lie a multiple of
// 4 KiB apart.
constexpr int rows_of_tile(int vectors) { return kTile / vectors < 12 ? kTile / vectors : 12; }

// A group of rows against kQ vectors of queries, over `depth` elements.
template <typename T, int kQ>
inline void score_panel(const RowBlock<T>& rows, const T* ahead, const T* packed, int64_t ld,
                        int64_t depth, bool first, T scale, T* scores) {
  constexpr int kMost = rows_of_tile(kQ);
  int64_t r = 0;
  const auto run = [&]<int kRows>(std::integral_constant<int, kRows>) {
    for (; r + kRows <= rows.count; r += kRows) {
      score_rows<T, kRows, kQ>({rows.row(r), rows.stride, kRows},
                               {ahead + r * rows.stride, rows.stride, kRows}, packed, ld, depth,
                               first, scale, scores + r * ld);
    }
  };
  run(std::integral_constant<int, kMost>{});
  if constexpr (kMost > 4) run(std::integral_constant<int, 4>{});
  run(std::integral_constant<int, 1>{});
}

// Panels of up to kVectors vectors of queries meet a group of rows in turn: so the rows come from
// memory, or from a cache that is hardly faster, once for all of them.
template <typename T>
void dense_scores(const RowBlock<T>& rows, const T* packed, int64_t queries, int64_t depth, T scale,
                  const RowBlock<T>& next, T* scores) {
  constexpr int64_t kStep = kLanes<T>;
  const int64_t vectors = (queries + kStep - 1) / kStep, ld = vectors * kStep;
  const int64_t panels = (vectors + kVectors - 1) / kVectors;
  const int64_t rows_of_group =
      kTilesOfGroup * rows_of_tile(static_cast<int>((vectors + panels - 1) / panels));
  for (int64_t r = 0; r < rows.count; r += rows_of_group) {
    const int64_t count = rows.count - r < rows_of_group ? rows.count - r : rows_of_group;
    const T* after = row_ahead(rows, r + count, next);
    for (int64_t k = 0; k < depth; k += kDepth) {
      const int64_t part = depth - k < kDepth ? depth - k : kDepth;
      const T factor = k + part == depth ? scale : T{1};
      const RowBlock<T> group = {rows.row(r) + k, rows.stride, count};
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t begin = vectors * p / panels, end = vectors * (p + 1) / panels;
        const auto run = [&]<int kQ>(std::integral_constant<int, kQ>) {
          if (end - begin != kQ) return;
          score_panel<T, kQ>(group, p == 0 ? after + k : group.data,
                             packed + k * ld + begin * kStep, ld, part, k == 0, factor,
                             scores + r * ld + begin * kStep);
        };
        run(std::integral_constant<int, 1>{});
        if constexpr (kVectors >= 2) run(std::integral_constant<int, 2>{});
        if constexpr (kVectors >= 3) run(std::integral_constant<int, 3>{});
      }
    }
  }
}

// --- sums -------------------------------------------------------------------------------------

template <typename Acc>
void clear_rows(Acc* rows, int64_t stride, int64_t count, int64_t columns) {
  for (int64_t r = 0; r < count; ++r) {
    std::memset(rows + r * stride, 0, static_cast<size_t>(columns) * sizeof(Acc));
  }
}

// out[0 .. kOutputs, one panel of columns] = (add ? itself : 0) + weights rows. The panel's rows
// stay in the first-level cache while all outputs pass.
template <typename T, int kOutputs, int kColumns, bool kPrefetch>
inline void sum_tile(const Accumulator<T>* rows, int64_t row_stride, const RowBlock<T>& ahead,
                     const Accumulator<T>* weights, int64_t output_stride, int64_t weight_stride,
                     bool add, Accumulator<T>* out, int64_t out_stride) {
  using Acc = Accumulator<T>;
  constexpr int kStep = kLanes<Acc>;
  Vec<Acc> sums[kOutputs][kColumns] = {};
  if (add) {
#pragma GCC unroll 8
    for (int i = 0; i < kOutputs; ++i) {
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) sums[i][c] = load(out + i * out_stride + c * kStep);
    }
  }
  for (int64_t r = 0; r < ahead.count; ++r) {
    if constexpr (kPrefetch) {
#pragma GCC unroll 4
      for (int64_t c = 0; c < kColumns * kStep; c += 64 / sizeof(T)) prefetch(ahead.row(r) + c);
    }
    Vec<Acc> values[kColumns];
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) {
      values[c] = load(rows + r * row_stride + c * kStep);
      keep_in_register(values[c]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kOutputs; ++i) {
      Vec<Acc> weight = broadcast(weights[i * output_stride + r * weight_stride]);
      if constexpr (kColumns > 1) keep_in_register(weight);
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) sums[i][c] += values[c] * weight;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kOutputs; ++i) {
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) store(sums[i][c], out + i * out_stride + c * kStep);
  }
}

template <typename T, int kColumns>
inline void sum_panel(const Accumulator<T>* rows, int64_t row_stride, const RowBlock<T>& ahead,
                      const Accumulator<T>* weights, int64_t output_stride, int64_t weight_stride,
                      int64_t outputs, bool add, Accumulator<T>* out, int64_t out_stride) {
  constexpr int kOutputs = kTile / kColumns < 8 ? kTile / kColumns : 8;
  int64_t i = 0;
  const auto run = [&]<int kCount>(std::integral_constant<int, kCount>) {
    for (; i + kCount <= outputs; i += kCount) {
      const auto* w = weights + i * output_stride;
      auto* to = out + i * out_stride;
      if (i == 0) {  // the rows that come next, while these meet their first outputs
        sum_tile<T, kCount, kColumns, true>(rows, row_stride, ahead, w, output_stride,
                                            weight_stride, add, to, out_stride);
      } else {
        sum_tile<T, kCount, kColumns, false>(rows, row_stride, ahead, w, output_stride,
                                             weight_stride, add, to, out_stride);
      }
    }
  };
  run(std::integral_constant<int, kOutputs>{});
  if constexpr (kOutputs > 2) run(std::integral_constant<int, 2>{});
  run(std::integral_constant<int, 1>{});
}

template <typename T>
void dense_accumulate(RowBlock<T> rows, const Accumulator<T>* weights, int64_t output_stride,
                      int64_t weight_stride, int64_t outputs, int64_t columns,
                      const RowBlock<T>& next, bool add, Accumulator<T>* out, int64_t out_stride) {
  if (rows.count == 0 && !add) clear_rows(out, out_stride, outputs, columns);
  using Acc = Accumulator<T>;
  constexpr int kStep = kLanes<Acc>, kColumns = L3EXT_DENSE_COLUMNS, kPanel = kColumns * kStep;
  constexpr int64_t kChunk = 64;  // rows between two visits of the sums in `out`
  alignas(64) Acc block[kChunk * kPanel];
  for (int64_t first = 0; first < rows.count; first += kChunk) {
    const int64_t count = rows.count - first < kChunk ? rows.count - first : kChunk;
    const Acc* chunk_weights = weights + first * weight_stride;
    const bool adds = add || first > 0;
    const auto panel = [&]<int kWidth>(std::integral_constant<int, kWidth>, int64_t c) {
      const RowBlock<T> ahead = {row_ahead(rows, first + count, next) + c, rows.stride, count};
      // Rows whose distance is a multiple of 4 KiB, say, would push each other out of the cache.
      for (int64_t r = 0; r < count; ++r) {
        load_row(rows.row(first + r) + c, block + r * kPanel, kWidth * kStep);
      }
      sum_panel<T, kWidth>(block, kPanel, ahead, chunk_weights, output_stride, weight_stride,
                           outputs, adds, out + c, out_stride);
      return int64_t{kWidth * kStep};
    };
    int64_t c = 0;
    while (c + kPanel <= columns) c += panel(std::integral_constant<int, kColumns>{}, c);
    while (c + kStep <= columns) c += panel(std::integral_constant<int, 1>{}, c);
    if (c < columns) {
      const RowBlock<T> tail = {rows.row(first) + c, rows.stride, count};
      if (!adds) clear_rows(out + c, out_stride, outputs, columns - c);
      stream_accumulate<T>(tail, chunk_weights, output_stride, weight_stride, outputs, columns - c,
                           {}, out + c, out_stride);
    }
  }
}
