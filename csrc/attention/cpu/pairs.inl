// Scores by products of pairs side by side, summed across lanes at a row's end: of few queries, and
// of those that fill no block. Part of row_kernels_bf16.inl.

// The sum across the lanes of sums[r][q] in lane 4 r + q; zeros where there is no q.
template <int kQueries>
inline __m512 sums_of_lanes(const __m512 (&sums)[4][kQueries]) {
  __m512 quarters[4] = {};  // of query q: four sums for every row, a quarter of the lanes each
  for (int q = 0; q < kQueries; ++q) {
    const auto halves = [&](__m512 a, __m512 b) {
      return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    };
    const __m512 low = halves(sums[0][q], sums[1][q]), high = halves(sums[2][q], sums[3][q]);
    quarters[q] =
        _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
  }
  const auto pairs = [&](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  };
  const __m512 low = pairs(quarters[0], quarters[1]), high = pairs(quarters[2], quarters[3]);
  return _mm512_add_ps(_mm512_shuffle_ps(low, high, 0x88), _mm512_shuffle_ps(low, high, 0xdd));
}

// scores[r * ld + q] of kRows rows and kQueries queries, `packed` being `stride` apart. `after`:
// rows that are read some time later, or null.
template <int kRows, int kQueries>
inline void score_pairs(const RowBlock<BFloat16>& rows, const BFloat16* const* after,
                        const float* packed, int64_t stride, int64_t depth, float scale,
                        Wanted* wanted, float* scores, int64_t ld) {
  __m512 sums[kRows][kQueries];
  const BFloat16* row[kRows];
  for (int r = 0; r < kRows; ++r) {
    row[r] = rows.row(r);
    for (__m512& sum : sums[r]) sum = _mm512_setzero_ps();
  }
  const auto add = [&](int64_t k, auto load) {
    __m512i elements[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) elements[r] = load(row[r] + k);
#pragma GCC unroll 4
    for (int q = 0; q < kQueries; ++q) {
      const __m512i query = _mm512_loadu_si512(packed + q * stride + k / 2);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sums[r][q] = add_dot_of_pairs(sums[r][q], elements[r], query);
    }
  };
  int64_t k = 0;
  const auto add_all = [&](auto ask) {
    for (; k + kDepth <= depth; k += kDepth) {
      ask();
      add(k, [](const BFloat16* from) { return _mm512_loadu_si512(from); });
    }
  };
  if (after != nullptr) {
    add_all([&] {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) prefetch_near(after[r] + k);
    });
  } else if (wanted != nullptr) {
    add_all([&] { wanted->ask(1); });
  } else {
    add_all([] {});
  }
  if (k < depth) add(k, [&](const BFloat16* from) { return load_elements(from, depth - k); });
  if constexpr (kRows == 4) {
    const __m512 all = _mm512_mul_ps(sums_of_lanes(sums), _mm512_set1_ps(scale));
    _mm_storeu_ps(scores, _mm512_castps512_ps128(all));
    _mm_storeu_ps(scores + ld, _mm512_extractf32x4_ps(all, 1));
    _mm_storeu_ps(scores + 2 * ld, _mm512_extractf32x4_ps(all, 2));
    _mm_storeu_ps(scores + 3 * ld, _mm512_extractf32x4_ps(all, 3));
  } else {
    for (int r = 0; r < kRows; ++r) {
      for (int q = 0; q < kQueries; ++q) {
        scores[r * ld + q] = scale * _mm512_reduce_add_ps(sums[r][q]);
      }
    }
  }
}

// How many rows ahead they are asked for: some 10 KiB.
constexpr int64_t kRowsAhead = 4;

// At most kWords queries; zeros in the lanes beside them. `distance` rows on, rows are asked for.
void score_all_pairs(const RowBlock<BFloat16>& rows, const float* packed, int64_t queries,
                     int64_t depth, float scale, int64_t distance, const Ahead<BFloat16>& ahead,
                     float* scores, int64_t ld) {
  const int64_t stride = round_up(depth, kDepth) / 2;
  int64_t r = 0;
  const auto run = [&]<int kRows>(std::integral_constant<int, kRows>) {
    const BFloat16* after[kRows];
    for (int i = 0; i < kRows; ++i) {
      after[i] = row_ahead(rows, r + i + distance, ahead.next);
      if (ld > 1) _mm512_storeu_ps(scores + (r + i) * ld, _mm512_setzero_ps());
    }
    const RowBlock<BFloat16> some = {rows.row(r), rows.stride, kRows};
    const auto against = [&]<int kQueries>(std::integral_constant<int, kQueries>, int64_t q) {
      score_pairs<kRows, kQueries>(some, q == 0 && distance > 0 ? after : nullptr,
                                   packed + q * stride, stride, depth, scale, ahead.wanted,
                                   scores + r * ld + q, ld);
    };
    // In blocks that differ by at most a query: too few sums would wait for each other.
    const int64_t blocks = (queries + 3) / 4;
    for (int64_t i = 0, begin = 0; i < blocks; ++i) {
      const int64_t end = queries * (i + 1) / blocks;
      if (end - begin == 1) against(std::integral_constant<int, 1>{}, begin);
      if (end - begin == 2) against(std::integral_constant<int, 2>{}, begin);
      if (end - begin == 3) against(std::integral_constant<int, 3>{}, begin);
      if (end - begin == 4) against(std::integral_constant<int, 4>{}, begin);
      begin = end;
    }
    r += kRows;
  };
  while (queries > 2 && r + 4 <= rows.count) run(std::integral_constant<int, 4>{});
  while (r + 2 <= rows.count) run(std::integral_constant<int, 2>{});
  if (r < rows.count) run(std::integral_constant<int, 1>{});
}
