// Scores of rows that are widened, in 8 or 16 bits. That takes about as long as the product with a
// query, so elements are widened as they lie: vectors run along the rows, and sums across lanes
// come last. No row is transposed, as in stream.inl, and no product waits for the one before. Many
// queries share one widening, and are summed in the same order: a query's bits do not depend on how
// many share its segment.

constexpr int kDotRows = 4;
// Of a tile, whose sums fill a vector when they have been added across lanes.
constexpr int kDotQueries = kLanes<float> / kDotRows;
// Elements of a row that are summed across lanes at once: four widened rows of them (16 KiB) stay
// in the first-level cache.
constexpr int64_t kDotDepth = 1024;
// How many rows ahead they are asked for: some 16 KiB.
constexpr int64_t kDotRowsAhead = 16;

// Queries one after the other, each up to a whole number of vectors with zeros.
template <typename X>
inline void pack_dots(const X* const* x, int64_t queries, int64_t depth, float* packed) {
  const int64_t stride = spread<float>(depth);
  for (int64_t q = 0; q < queries; ++q) {
    float* to = packed + q * stride;
    int64_t k = 0;
    for (; k + kLanes<float> <= depth; k += kLanes<float>) store(load(x[q] + k), to + k);
    if (k < depth) store(load_partial(x[q] + k, depth - k), to + k);
  }
}

// Of a row, `count` elements as load_parts() gives them.
template <typename T>
inline void widen_parts(const T* row, int64_t count, float* to) {
  constexpr int kStep = kLanes<float>, kPart = kParts<T>;
  int64_t k = 0;
  for (; k + kPart * kStep <= count; k += kPart * kStep) {
    Vec<float> elements[kPart];
    load_parts(row + k, elements);
    for (int i = 0; i < kPart; ++i) store(elements[i], to + k + i * kStep);
  }
  for (; k < count; k += kStep) {
    const int64_t some = count - k < kStep ? count - k : kStep;
    store_partial<float>(load_partial_part(row + k, some), to + k, some);
  }
}

// sums[i] across its lanes, in lane i: halves are added until one lane is left, as sum_lanes() does
// it, here of a vector of sums at once.
template <int kDistance = kLanes<float> / 2>
inline Vec<float> sums_of_lanes(Vec<float>* sums) {
#pragma GCC unroll 16
  for (int i = 0; i < kDistance; ++i) {
    exchange<float, L3EXT_VECTOR_BYTES, kDistance>(sums[i], sums[i + kDistance],
                                                   std::make_index_sequence<kLanes<float>>());
    sums[i] += sums[i + kDistance];
  }
  if constexpr (kDistance > 1) {
    return sums_of_lanes<kDistance / 2>(sums);
  } else {
    return sums[0];
  }
}

// scores[r * ld + q] = ((add ? itself : 0) + row r times query q) * factor, over `count` elements.
// ahead: rows that are read some time later, or null.
template <typename Stored, int kRows, int kQueries>
inline void dot_tile(const Stored* const* rows, const Stored* const* ahead, const float* x,
                     int64_t x_stride, int64_t count, bool add, float factor, float* scores,
                     int64_t ld) {
  constexpr int kStep = kLanes<float>, kPart = kParts<Stored>;
  constexpr int64_t kLine = 64 / sizeof(Stored);
  Vec<float> sums[kRows * kQueries] = {};
  const auto multiply = [&](int64_t k, const auto& elements) __attribute__((always_inline)) {
    constexpr int kVectors = std::extent_v<std::remove_reference_t<decltype(elements[0])>>;
#pragma GCC unroll 2
    for (int i = 0; i < kVectors; ++i) {
#pragma GCC unroll 4
      for (int q = 0; q < kQueries; ++q) {
        const Vec<float> query = load(x + q * x_stride + k + i * kStep);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) sums[r * kQueries + q] += elements[r][i] * query;
      }
    }
  };
  int64_t k = 0;
  for (; k + kPart * kStep <= count; k += kPart * kStep) {
    Vec<float> elements[kRows][kPart];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      if (ahead != nullptr && k % kLine == 0) prefetch_near(ahead[r] + k);
      load_parts(rows[r] + k, elements[r]);
    }
    multiply(k, elements);
  }
  for (; k < count; k += kStep) {
    Vec<float> elements[kRows][1];
    for (int r = 0; r < kRows; ++r) {
      elements[r][0] = load_partial_part(rows[r] + k, count - k < kStep ? count - k : kStep);
    }
    multiply(k, elements);
  }
  float across[kRows * kQueries];
  if constexpr (kRows * kQueries == kStep) {
    store(sums_of_lanes(sums), across);
  } else {
    for (int i = 0; i < kRows * kQueries; ++i) across[i] = sum_lanes<float>(sums[i]);
  }
  for (int r = 0; r < kRows; ++r) {
    for (int q = 0; q < kQueries; ++q) {
      float& score = scores[r * ld + q];
      score = ((add ? score : 0.0f) + across[r * kQueries + q]) * factor;
    }
  }
}

// kRows rows, some queries, over `count` elements.
template <typename Stored, int kRows>
inline void dot_rows(const Stored* const* rows, const Stored* const* ahead, const float* x,
                     int64_t x_stride, int64_t queries, int64_t count, bool add, float factor,
                     float* scores, int64_t ld) {
  int64_t q = 0;
  const auto run = [&]<int kQueries>(std::integral_constant<int, kQueries>) {
    for (; q + kQueries <= queries; q += kQueries) {
      dot_tile<Stored, kRows, kQueries>(rows, q == 0 ? ahead : nullptr, x + q * x_stride, x_stride,
                                        count, add, factor, scores + q, ld);
    }
  };
  run(std::integral_constant<int, kDotQueries>{});
  if constexpr (kDotQueries > 2) run(std::integral_constant<int, 2>{});
  if constexpr (kDotQueries > 1) run(std::integral_constant<int, 1>{});
}

template <typename T>
void dot_scores(const RowBlock<T>& rows, const float* packed, int64_t queries, int64_t depth,
                float scale, const RowBlock<T>& next, float* scores) {
  const int64_t ld = padded<float>(queries), stride = spread<float>(depth);
  if (ld != queries) {
    std::memset(scores, 0, static_cast<size_t>(rows.count * ld) * sizeof(float));
  }
  const int64_t distance = rows.count < kDotRowsAhead ? rows.count : kDotRowsAhead;
  int64_t r = 0;
  const auto run = [&]<int kRows>(std::integral_constant<int, kRows>) {
    for (int64_t k = 0; k == 0 || k < depth; k += kDotDepth) {
      const int64_t count = depth - k < kDotDepth ? depth - k : kDotDepth;
      const float factor = k + count >= depth ? scale * kUnit<T> : 1.0f;
      const T* row[kRows];
      const T* ahead[kRows];
      for (int i = 0; i < kRows; ++i) {
        row[i] = rows.row(r + i) + k;
        ahead[i] = row_ahead(rows, r + i + distance, next) + k;
      }
      if (queries <= kDotQueries) {
        dot_rows<T, kRows>(row, ahead, packed + k, stride, queries, count, k > 0, factor,
                           scores + r * ld, ld);
        continue;
      }
      alignas(64) float widened[kRows][kDotDepth];
      const float* wide[kRows];
      for (int i = 0; i < kRows; ++i) {
        for (int64_t c = 0; c < count; c += 64) prefetch_near(ahead[i] + c);
        widen_parts(row[i], count, widened[i]);
        wide[i] = widened[i];
      }
      dot_rows<float, kRows>(wide, nullptr, packed + k, stride, queries, count, k > 0, factor,
                             scores + r * ld, ld);
    }
    r += kRows;
  };
  while (r + kDotRows <= rows.count) run(std::integral_constant<int, kDotRows>{});
  if (r + 2 <= rows.count) run(std::integral_constant<int, 2>{});
  if (r < rows.count) run(std::integral_constant<int, 1>{});
}
