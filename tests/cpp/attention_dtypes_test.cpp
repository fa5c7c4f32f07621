// Forward and backward of every storage type, by the instruction set that L3EXT_CPU_ISA names,
// against the definition in float64; few and many queries to a segment.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include "attention/plan_buffers.hpp"
#include "attention/segmented_attention.hpp"
#include "check.hpp"
#include "core/cpu_features.hpp"
#include "core/error.hpp"
#include "storage.hpp"

using l3ext::BFloat16;
using l3ext::Float16;

namespace {

template <typename T>
constexpr l3ext::DType kDType = std::is_same_v<T, double>     ? l3ext::DType::kFloat64
                                : std::is_same_v<T, float>    ? l3ext::DType::kFloat32
                                : std::is_same_v<T, BFloat16> ? l3ext::DType::kBFloat16
                                                              : l3ext::DType::kFloat16;

// The largest error over the largest value, as in tests/reference.py; gradients have four times it.
template <typename T>
constexpr double kTolerance = std::is_same_v<T, double>     ? 1e-12
                              : std::is_same_v<T, float>    ? 2e-6
                              : std::is_same_v<T, BFloat16> ? 6e-3
                                                            : 8e-4;

// A matrix in its storage type, and what that holds in float64.
template <typename T>
struct Array {
  std::vector<T> stored;
  std::vector<double> values;

  Array(int64_t count, double deviation, std::mt19937& random) : stored(count), values(count) {
    std::normal_distribution<double> normal(0, deviation);
    for (int64_t i = 0; i < count; ++i) {
      assign(stored[i], normal(random));
      values[i] = value_of(stored[i]);
    }
  }
};

template <typename T>
bool close(const std::vector<T>& got, const std::vector<double>& want, double factor,
           const char* what) {
  double worst = 0, largest = 1e-30;
  for (size_t i = 0; i < want.size(); ++i) {
    const double error = std::abs(value_of(got[i]) - want[i]);
    worst = error <= worst ? worst : error;  // takes NaN, and keeps it
    largest = std::max(largest, std::abs(want[i]));
  }
  const double share = worst / (factor * kTolerance<T> * largest);
  if (!(share <= 1)) {
    std::fprintf(stderr, "%s, %s: %.2f of the budget\n", l3ext::dtype_name(kDType<T>), what, share);
  }
  return share <= 1;
}

template <typename T>
void check_step(int64_t tokens, int64_t d_in, int64_t d_emb) {
  const std::vector<int64_t> owned = {1, 2, 3, 8, 13, 33, 40, 150};
  std::mt19937 random(11);
  std::vector<int64_t> offsets = {0}, ids;
  for (const int64_t count : owned) offsets.push_back(offsets.back() + count);
  for (int64_t i = 0; i < tokens; ++i) ids.push_back(static_cast<int64_t>(random() % owned.size()));
  l3ext::PlanBuffers plan;
  plan.make(ids, offsets);
  const int64_t width = d_in + d_emb;
  const Array<T> x(tokens * d_in, 1, random), dy(tokens * d_emb, 1, random);
  const Array<T> table(offsets.back() * width, 1 / std::sqrt(static_cast<double>(d_in)), random);

  std::vector<double> y(dy.values.size()), dx(x.values.size()), dtable(table.values.size());
  for (int64_t i = 0; i < tokens; ++i) {
    const int64_t begin = offsets[ids[i]], rows = offsets[ids[i] + 1] - begin;
    const double *query = &x.values[i * d_in], *upstream = &dy.values[i * d_emb];
    std::vector<double> p(rows), dp(rows);
    double sum = 0, delta = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const double* row = &table.values[(begin + r) * width];
      double score = 0;
      for (int64_t k = 0; k < d_in; ++k) score += query[k] * row[k];
      sum += p[r] = std::exp(score);
      for (int64_t c = 0; c < d_emb; ++c) dp[r] += upstream[c] * row[d_in + c];
    }
    for (int64_t r = 0; r < rows; ++r) delta += (p[r] /= sum) * dp[r];
    for (int64_t r = 0; r < rows; ++r) {
      const double* row = &table.values[(begin + r) * width];
      double* drow = &dtable[(begin + r) * width];
      const double ds = p[r] * (dp[r] - delta);
      for (int64_t c = 0; c < d_emb; ++c) {
        y[i * d_emb + c] += p[r] * row[d_in + c];
        drow[d_in + c] += p[r] * upstream[c];
      }
      for (int64_t k = 0; k < d_in; ++k) {
        dx[i * d_in + k] += ds * row[k];
        drow[k] += ds * query[k];
      }
    }
  }

  T nan;
  assign(nan, std::numeric_limits<double>::quiet_NaN());
  std::vector<T> got_y(y.size(), nan), got_dx(dx.size(), nan), got_dtable(dtable.size(), nan);
  l3ext::SegmentedAttentionInputs inputs;
  inputs.dtype = kDType<T>;
  inputs.x = {x.stored.data(), d_in};
  inputs.keys = {table.stored.data(), width};
  inputs.values = {table.stored.data() + d_in, width};
  inputs.plan = plan.view();
  inputs.table_rows = plan.table_rows;
  inputs.d_in = d_in;
  inputs.d_emb = d_emb;
  std::vector<T> first;
  for (const int threads : {1, 3}) {
    inputs.num_threads = threads;
    l3ext::segmented_attention({inputs, {got_y.data(), d_emb}});
    if (first.empty()) first = got_y;
    EXPECT(std::memcmp(first.data(), got_y.data(), first.size() * sizeof(T)) == 0);
  }
  l3ext::SegmentedAttentionBackwardParams backward;
  static_cast<l3ext::SegmentedAttentionInputs&>(backward) = inputs;
  backward.dy = {dy.stored.data(), d_emb};
  backward.dx = {got_dx.data(), d_in};
  backward.dkeys = {got_dtable.data(), width};
  backward.dvalues = {got_dtable.data() + d_in, width};
  l3ext::segmented_attention_backward(backward);
  EXPECT(close(got_y, y, 1, "y"));
  EXPECT(close(got_dx, dx, 4, "dx"));
  EXPECT(close(got_dtable, dtable, 4, "dtable"));
}

template <typename T>
void matches_float64() {
  for (const int64_t tokens : {3, 60, 700}) {
    check_step<T>(tokens, 64, 32);
    check_step<T>(tokens, 37, 21);
  }
}

}  // namespace

int main() {
  try {
    std::printf("%s\n", l3ext::cpu_isa_name(l3ext::active_cpu_isa()));
  } catch (const l3ext::Error& error) {
    std::printf("skipped: %s\n", error.what());
    return 77;
  }
  RUN(matches_float64<double>);
  RUN(matches_float64<float>);
  RUN(matches_float64<BFloat16>);
  RUN(matches_float64<Float16>);
  return check::failures == 0 ? 0 : 1;
}
