// Softmax over the rows, a query in each lane.

// exp for x <= 0. Reduction to |r| <= ln(2)/2 in two steps (Cody and Waite), a polynomial of
// degree 7 (the Taylor coefficients: its error, 5e-9, is below half a unit of float), then 2^n.
// Below the smallest normal result: 0. NaN stays NaN.
inline Vec<float> exp_nonpositive(Vec<float> x) {
  constexpr float kLowest = -87.0f;
  const Vec<float> clamped = x < kLowest ? Vec<float>{} + kLowest : x;
  const Vec<float> shift = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to integer
  const Vec<float> n = shift - 12582912.0f;
  const Vec<float> r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<float> p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const I32 exponent = (bit_cast_vector<I32>(shift) << 23) + 0x3f800000;
  const Vec<float> result = p * bit_cast_vector<Vec<float>>(exponent);
  return x < kLowest ? Vec<float>{} : result;
}
inline Vec<double> exp_nonpositive(Vec<double> x) {
  Vec<double> result;
  for (int i = 0; i < kLanes<double>; ++i) result[i] = std::exp(x[i]);
  return result;
}

// Of one query alone, scores `ld` apart: a row in each lane, but for the sum, which runs along the
// rows as that of many queries does.
template <typename Acc>
void exponentials_of_query(Acc* scores, int64_t rows, int64_t ld, Acc* sum) {
  constexpr int kStep = kLanes<Acc>;
  alignas(64) Acc some[kStep];
  const auto load_some = [&](int64_t r) {
    const int64_t count = rows - r < kStep ? rows - r : kStep;
    if (ld == 1 && count == kStep) return load(scores + r);
    for (int64_t i = 0; i < kStep; ++i) some[i] = scores[(r + (i < count ? i : 0)) * ld];
    return load(some);
  };
  Vec<Acc> largest = Vec<Acc>{} - std::numeric_limits<Acc>::infinity();
  for (int64_t r = 0; r < rows; r += kStep) {
    const Vec<Acc> score = load_some(r);
    largest = score > largest ? score : largest;
  }
  Acc max = largest[0];
  for (int i = 1; i < kStep; ++i) max = largest[i] > max ? largest[i] : max;
  Acc total = 0;
  for (int64_t r = 0; r < rows; r += kStep) {
    store(exp_nonpositive(load_some(r) - max), some);
    for (int64_t i = 0; i < kStep && r + i < rows; ++i) {
      scores[(r + i) * ld] = some[i];
      total += some[i];
    }
  }
  *sum = total;
}

template <typename Acc>
void exponentials(Acc* scores, int64_t rows, int64_t queries, Acc* sums) {
  constexpr int kStep = kLanes<Acc>, kFew = 2;
  if (queries == 1) return exponentials_of_query(scores, rows, 1, sums);
  const int64_t ld = padded<Acc>(queries);
  for (int64_t q = 0; q < queries; q += kStep) {
    if (queries - q <= kFew && rows > kStep) {
      store(Vec<Acc>{} + Acc{1}, sums + q);
      for (; q < queries; ++q) exponentials_of_query(scores + q, rows, ld, sums + q);
      return;
    }
    Vec<Acc> max = Vec<Acc>{} - std::numeric_limits<Acc>::infinity();
    for (int64_t r = 0; r < rows; ++r) {
      const Vec<Acc> score = load(scores + r * ld + q);
      max = score > max ? score : max;
    }
    Vec<Acc> sum = {};
    for (int64_t r = 0; r < rows; ++r) {
      const Vec<Acc> p = exp_nonpositive(load(scores + r * ld + q) - max);
      store(p, scores + r * ld + q);
      sum += p;
    }
    store(sum, sums + q);
  }
}

template <typename Acc>
void softmax_backward(Acc* p, const Acc* sums, Acc* dp, int64_t rows, int64_t queries, Acc scale) {
  constexpr int kStep = kLanes<Acc>;
  if (queries == 1) {
    const Acc inverse = Acc{1} / sums[0];
    Acc delta = 0;
    for (int64_t r = 0; r < rows; ++r) {
      p[r] *= inverse;
      delta += p[r] * dp[r];
    }
    for (int64_t r = 0; r < rows; ++r) dp[r] = p[r] * (dp[r] - delta) * scale;
    return;
  }
  const int64_t ld = padded<Acc>(queries);
  for (int64_t q = 0; q < queries; q += kStep) {
    const Vec<Acc> inverse = Acc{1} / load(sums + q);
    Vec<Acc> delta = {};
    for (int64_t r = 0; r < rows; ++r) {
      const Vec<Acc> weight = load(p + r * ld + q) * inverse;
      store(weight, p + r * ld + q);
      delta += weight * load(dp + r * ld + q);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = r * ld + q;
      store(load(p + i) * (load(dp + i) - delta) * scale, dp + i);
    }
  }
}
