// The backward kernels on the emulated device against a plain computation in double.
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "attention/cuda/heuristics.hpp"
#include "check.hpp"
#include "core/error.hpp"
#include "cuda_step.hpp"

using namespace step;

namespace {

using step::same_bits;

constexpr double kFactor = 4;  // of the forward's tolerance: p and ds are rounded on the way
constexpr int64_t kManyTokens = l3ext::cuda::kDecodeTokens + 1;
const std::vector<int64_t> kRows = {0, 1, 2, 15, 16, 17, 63, 64, 65, 128, 129, 511, 512, 700};

template <typename T>
bool close(const Gradients& actual, const Gradients& expected, const char* what) {
  const auto part = [&](const std::vector<double>& a, const std::vector<double>& e,
                        const char* name) {
    return step::close(a, e, kFactor * kTolerance<T>, (std::string(what) + ": " + name).c_str());
  };
  const bool dx = part(actual.dx, expected.dx, "dx");
  const bool dkeys = part(actual.dkeys, expected.dkeys, "dkeys");
  return part(actual.dvalues, expected.dvalues, "dvalues") && dx && dkeys;
}

template <typename T>
bool backward_matches(const Shape& shape, const char* what) {
  Step<T> step(shape);
  return close<T>(step.backward(), step.expected_gradients(), what);
}

bool same_bits(const Gradients& a, const Gradients& b) {
  return same_bits(a.dx, b.dx) && same_bits(a.dkeys, b.dkeys) && same_bits(a.dvalues, b.dvalues);
}

// --- shapes --------------------------------------------------------------------------------------
void any_number_of_rows() {
  for_each_dtype([]<typename T>() {
    EXPECT(backward_matches<T>(grid(kRows, {1, 3, 8, 9}), "few tokens"));
    EXPECT(backward_matches<T>(grid(kRows, {1, 8, 9, 63}), "many tokens"));
  });
}

void any_number_of_queries() {
  for_each_dtype([]<typename T>() {
    const std::vector<int64_t> queries = {1, 2, 3, 8, 9, 16, 32, 33, 63, 64, 65, 72, 73, 129};
    EXPECT(backward_matches<T>(grid({0, 1, 2, 17, 130}, queries), "many tokens"));
    EXPECT(backward_matches<T>(grid({0, 1, 2, 17}, {1, 2, 3, 8, 9, 16, 33, 65}), "few tokens"));
  });
}

void any_width() {
  for_each_dtype([]<typename T>() {
    const Shape few = grid({1, 3, 20, 150}, {1, 5, 10});
    const Shape many = grid({1, 5, 40, 140, 300}, {1, 6, 70, 150});
    for (const int64_t d_in : {64, 128, 192, 320}) {
      EXPECT(backward_matches<T>(with_widths(few, d_in, 384 - d_in), "few tokens"));
      EXPECT(backward_matches<T>(with_widths(many, d_in, 384 - d_in), "many tokens"));
    }
  });
}

void tables_of_any_layout_and_gradients_of_any_kind() {
  for_each_dtype([]<typename T>() {
    for (const bool few : {true, false}) {
      Shape shape = grid({0, 1, 2, 33, 140}, {1, 7, few ? 20 : 210});
      for (const Layout layout : {Layout::kTable, Layout::kSeparate, Layout::kDirectory}) {
        for (const bool tied : {false, true}) {
          if (tied && layout == Layout::kSeparate) continue;
          shape.layout = layout;
          shape.tied = tied;
          Step<T> step(with_widths(shape, 128, tied ? 128 : 64));
          if (layout == Layout::kDirectory) {  // has no rows to give gradients to
            EXPECT(step::close(step.backward({.rows = false}).dx, step.expected_gradients().dx,
                               kFactor * kTolerance<T>, "directory"));
            continue;
          }
          const Gradients whole = step.backward();
          EXPECT(close<T>(whole, step.expected_gradients(), "layout"));
          EXPECT(same_bits(whole, step.backward({.packed = true})));
          // What is not wanted stays as it was, and nothing else changes.
          const Gradients dx_alone = step.backward({.rows = false});
          EXPECT(same_bits(whole.dx, dx_alone.dx));
          EXPECT(dx_alone.dkeys.empty() || std::isnan(dx_alone.dkeys[0]));
          const Gradients rows_alone = step.backward({.dx = false});
          EXPECT(std::isnan(rows_alone.dx[0]) && same_bits(whole.dkeys, rows_alone.dkeys));
          EXPECT(same_bits(whole.dvalues, rows_alone.dvalues));
        }
      }
    }
  });
}

void extreme_steps() {
  for_each_dtype([]<typename T>() {
    EXPECT(backward_matches<T>({{3}, {}}, "no tokens"));
    EXPECT(backward_matches<T>({{3}, {0}}, "one token"));
    EXPECT(backward_matches<T>({{0}, {0, 0}}, "no rows"));
    EXPECT(backward_matches<T>({{65}, std::vector<int64_t>(900, 0)}, "one token of few"));
    EXPECT(backward_matches<T>({{65}, std::vector<int64_t>(1500, 0)}, "one token, many queries"));
    EXPECT(backward_matches<T>({{1}, std::vector<int64_t>(1500, 0)}, "one row, many queries"));
    Shape distinct;
    for (int64_t t = 0; t < kManyTokens + 70; ++t) {
      distinct.rows.push_back(t % 4);
      distinct.ids.push_back(t);
    }
    EXPECT(backward_matches<T>(distinct, "all distinct"));
    // Long gaps of rows that no position asks for, at both ends and between.
    Shape gaps{{300, 2, 500, 70, 400}, {1, 3, 1}};
    EXPECT(backward_matches<T>(gaps, "gaps"));
    gaps.ids.clear();
    EXPECT(backward_matches<T>(gaps, "nothing but a gap"));
  });
}

// --- values --------------------------------------------------------------------------------------
void extreme_scores() {
  for_each_dtype([]<typename T>() {
    for (const bool few : {true, false}) {
      Step<T> step(grid({2, 20, 150}, {2, few ? 12 : 400}));
      // Only one column makes the scores, so that errors of dx are small beside what dx is.
      for (int64_t r = 0; r < step.table_rows; ++r) {
        step.keys[r * 64 + 5] = r % 3 == 1 ? 0.625 : -0.625;
      }
      for (size_t i = 0; i < step.x.size(); ++i) step.x[i] = i % 64 == 5 ? 16384 : 0;
      for (double& v : step.dy) v /= 64;  // or dkeys would pass float16's range
      step.upload();
      EXPECT(close<T>(step.backward(), step.expected_gradients(), "scores of 10240"));
      step.shape.scale = 0;
      EXPECT(close<T>(step.backward(), step.expected_gradients(), "scale 0"));
    }
  });
}

void a_nan_stays_in_its_own_segment() {
  for_each_dtype([]<typename T>() {
    for (const bool few : {true, false}) {
      Step<T> step(grid({2, 20, 150}, {3, few ? 12 : 400}));
      const Gradients before = step.backward();
      const int64_t segment = 3, token = step.segment_tokens[segment];
      const int64_t position = step.permutation[step.segment_queries[segment] + 1];
      step.dy[position * 64 + 7] = kNan;
      step.upload();
      const Gradients after = step.backward();
      bool right = true;
      for (size_t i = 0; i < after.dx.size(); ++i) {
        const bool own = static_cast<int64_t>(i) / 64 == position;
        right = right && (own ? std::isnan(after.dx[i]) : after.dx[i] == before.dx[i]);
      }
      for (size_t i = 0; i < after.dkeys.size(); ++i) {
        const int64_t row = static_cast<int64_t>(i) / 64;
        const bool own = row >= step.offsets[token] && row < step.offsets[token + 1];
        right = right && (own ? std::isnan(after.dkeys[i]) : after.dkeys[i] == before.dkeys[i]);
      }
      EXPECT(right);
    }
  });
}

void positions_of_no_token_give_nothing_to_rows() {
  for_each_dtype([]<typename T>() {
    for (const int64_t invalid : {1, 20, 1100}) {
      Shape shape = grid({0, 1, 2, 40}, {1, 9});
      for (int64_t i = 0; i < invalid; ++i) {
        shape.ids.insert(shape.ids.begin() + (7 * i) % std::ssize(shape.ids), -1);
      }
      EXPECT(backward_matches<T>(shape, "ids that are none"));
    }
  });
}

// --- bits ----------------------------------------------------------------------------------------
void any_order_of_threads_and_any_device_give_the_same_bits() {
  for_each_dtype([]<typename T>() {
    for (const bool few : {true, false}) {
      Step<T> step(with_widths(grid({1, 2, 17, 64, 200}, {1, 9, few ? 20 : 250}), 128, 192));
      const Gradients first = step.backward();
      for (uint64_t seed = 1; seed <= 4; ++seed) {
        l3ext::cuda::emulation().seed = seed;
        l3ext::cuda::emulation().multiprocessors = seed == 4 ? 20 : static_cast<int>(seed);
        EXPECT(same_bits(first, step.backward()));
      }
      l3ext::cuda::emulation() = {};
    }
  });
}

void any_tuning_gives_the_same_bits() {
  for_each_dtype([]<typename T>() {
    Step<T> step(with_widths(grid({2, 17, 150}, {1, 8, 9, 40, 64, 300}), 128, 64));
    EXPECT(step.num_tokens > l3ext::cuda::kDecodeTokens);
    const Gradients wide = step.backward();
    l3ext::cuda::tuning().most_backward_tiles = 1;
    EXPECT(same_bits(wide, step.backward()));
    l3ext::cuda::tuning() = {};
  });
}

void any_promise_of_rows_gives_the_same_bits() {
  for_each_dtype([]<typename T>() {
    for (const bool few : {true, false}) {
      Step<T> step(with_widths(grid({1, 2, 40, 150}, {1, 9, few ? 20 : 400}), 128, 192));
      const Gradients expected = step.backward();
      for (const int64_t rows : {300, 900, 3600}) {
        step.max_rows = rows;
        EXPECT(same_bits(expected, step.backward()));
      }
    }
  });
}

template <typename T>
void expect_same_dx_in_a_batch(const Shape& alone, const std::vector<int64_t>& others) {
  Step<T> small(alone), large(behind(others, alone));
  large.take_last(small);
  const std::vector<double> expected = small.backward().dx, got = large.backward().dx;
  EXPECT(same_bits(expected, {got.end() - std::ssize(expected), got.end()}));
}

void a_batch_does_not_change_a_tokens_dx() {
  for_each_dtype([]<typename T>() {
    Shape shape = with_widths(grid({1, 2, 16, 17, 100, 260}, {1, 3}), 128, 128);
    expect_same_dx_in_a_batch<T>(shape, shuffled_ids({1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}));
    shape.ids = shuffled_ids(std::vector<int64_t>(shape.rows.size(), 60));
    const std::vector<int64_t> more = shuffled_ids(std::vector<int64_t>(shape.rows.size(), 9));
    expect_same_dx_in_a_batch<T>(shape, more);
  });
}

// --- errors --------------------------------------------------------------------------------------
void what_does_not_fit_is_refused_by_name() {
  Step<BFloat16> step(grid({2, 20}, {2, 3}));
  Matrix<BFloat16> dx(step.num_tokens, 64, 64), dtable(step.table_rows, 128, 128),
      dy(step.num_tokens, 64, 64);
  const auto names = [&](const char* argument, auto&& change) {
    l3ext::SegmentedAttentionBackwardParams params{step.inputs(), dy.view(), dx.mutable_view(),
                                                   dtable.mutable_view(), dtable.mutable_view(64)};
    const int64_t bytes = l3ext::cuda::segmented_attention_backward_workspace(params);
    DeviceBuffer<std::byte> workspace(bytes, 256);
    l3ext::cuda::Launch launch{nullptr, workspace.data(), bytes};
    change(params, launch);
    const std::string text =
        EXPECT_THROWS(l3ext::Error, l3ext::cuda::segmented_attention_backward(params, launch));
    return text.find(argument) != std::string::npos && text.find("got") != std::string::npos;
  };
  EXPECT(names("keys", [](auto& p, auto&) { p.d_in = 96; }));
  EXPECT(names("dy", [](auto& p, auto&) { p.dy.stride = 68; }));
  EXPECT(names("dx", [](auto& p, auto&) { p.dx.stride = 68; }));
  EXPECT(names("dkeys", [](auto& p, auto&) { p.dkeys.stride = 68; }));
  EXPECT(names("dvalues", [](auto& p, auto&) { p.dvalues.stride = 68; }));
  EXPECT(names("workspace", [](auto&, auto& launch) { launch.workspace_bytes -= 1; }));
  EXPECT(names("schedule", [](auto& p, auto&) {
    p.plan.num_tokens = 0;
    p.plan.schedule = nullptr;
  }));
  step.max_rows = 4096;  // whose scores and gradients of scores pass the device's shared memory
  const std::string text = EXPECT_THROWS(l3ext::Error, step.backward());
  EXPECT(text.find("shared memory") != std::string::npos);
}

}  // namespace

int main() {
  RUN(any_number_of_rows);
  RUN(any_number_of_queries);
  RUN(any_width);
  RUN(tables_of_any_layout_and_gradients_of_any_kind);
  RUN(extreme_steps);
  RUN(extreme_scores);
  RUN(a_nan_stays_in_its_own_segment);
  RUN(positions_of_no_token_give_nothing_to_rows);
  RUN(any_order_of_threads_and_any_device_give_the_same_bits);
  RUN(any_tuning_gives_the_same_bits);
  RUN(any_promise_of_rows_gives_the_same_bits);
  RUN(a_batch_does_not_change_a_tokens_dx);
  RUN(what_does_not_fit_is_refused_by_name);
  return check::failures == 0 ? 0 : 1;
}
