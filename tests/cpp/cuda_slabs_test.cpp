// Tied tables on the emulated device, whose rows pass through shared memory slab by slab, against a
// plain computation in double.
#include <cmath>
#include <cstdint>
#include <vector>

#include "attention/cuda/layout.hpp"
#include "check.hpp"
#include "cuda_step.hpp"

using namespace step;

namespace {

// Tied, and with enough positions of a token of one row before it to be no decode step.
Shape tied(Shape shape, int64_t width) {
  shape.tied = true;
  shape.rows.push_back(1);
  const std::vector<int64_t> others(l3ext::cuda::kDecodeTokens, std::ssize(shape.rows) - 1);
  return with_widths(behind(others, std::move(shape)), width, width);
}

template <typename T>
int64_t slab(int64_t width) {
  return l3ext::cuda::slab_rows(static_cast<int>(width * sizeof(T)));
}

template <typename T>
bool matches(const Shape& shape, const char* what) {
  Step<T> step(shape);
  return close(step.forward(), step.expected_y(), kTolerance<T>, what);
}

// --- shapes --------------------------------------------------------------------------------------
void any_number_of_rows() {
  for_each_dtype([]<typename T>() {
    for (const int64_t width : {64, 512}) {
      const int64_t s = slab<T>(width);
      const std::vector<int64_t> rows = {
          0, 1, 2, 15, 16, 17, s - 1, s, s + 1, 2 * s - 1, 2 * s, 2 * s + 1, 3 * s + 17, 511, 512};
      EXPECT(matches<T>(tied(grid(rows, {1, 9}), width), "rows"));
    }
  });
}

void any_number_of_queries() {
  for_each_dtype([]<typename T>() {
    const std::vector<int64_t> queries = {1,  2,  3,  4,  5,  6,  7,  8,  9,  15,
                                          16, 17, 24, 32, 63, 64, 65, 72, 73, 129};
    EXPECT(matches<T>(tied(grid({2, 17, 150}, queries), 64), "queries"));
  });
}

// The widest that slabs hold, and beyond, where rows are read twice.
void any_width() {
  for_each_dtype([]<typename T>() {
    for (const int64_t width : {128, 192, 576, 1024, 1088, 1984, 2048, 2112}) {
      const int64_t s = slab<T>(width);
      EXPECT(matches<T>(tied(grid({2, s, s + 1, 2 * s + 3}, {3}), width), "width"));
    }
  });
}

void any_layout_and_scale() {
  for_each_dtype([]<typename T>() {
    Shape shape = tied(grid({0, 1, 2, 33, 140, 300}, {1, 7, 12, 20}), 128);
    shape.ids.insert(shape.ids.begin() + 40, {-1, -1});
    for (const Layout layout : {Layout::kTable, Layout::kDirectory}) {
      shape.layout = layout;
      for (const double scale : {1.0, 3.0, -0.5, 0.0}) {
        shape.scale = scale;
        EXPECT(matches<T>(shape, "layout"));
      }
    }
  });
}

// Less shared memory than a slab and its queries need.
void a_device_without_room_reads_rows_twice() {
  l3ext::cuda::emulation().shared_bytes = 48 * 1024;
  for_each_dtype([]<typename T>() {
    EXPECT(matches<T>(tied(grid({2, 17, 140}, {3, 12, 20}), 512), "little shared memory"));
  });
  l3ext::cuda::emulation() = {};
}

// --- values --------------------------------------------------------------------------------------
// The score of row r of a segment is of_row(r), for all queries.
template <typename T, typename F>
void set_scores(Step<T>& step, F&& of_row) {
  const int64_t width = step.shape.d_in;
  for (size_t t = 0; t < step.shape.rows.size(); ++t) {
    for (int64_t r = 0; r < step.shape.rows[t]; ++r) {
      step.keys[(step.offsets[t] + r) * width + 5] = of_row(r) / 16;
    }
  }
  for (size_t i = 0; i < step.x.size(); ++i) step.x[i] = i % width == 5 ? 16 : 0;
  step.upload();
}

void maxima_that_move_from_slab_to_slab() {
  for_each_dtype([]<typename T>() {
    const int64_t width = 512, s = slab<T>(width);
    Step<T> step(tied(grid({s + 1, 5 * s - 3}, {1, 12}), width));
    const auto expect_close = [&](const char* what) {
      EXPECT(close(step.forward(), step.expected_y(), kTolerance<T>, what));
    };
    // Slabs that all count: every one weighs e or so times the one before, or 1 / e.
    set_scores(step, [&](int64_t r) { return double(r / s); });
    expect_close("rising");
    set_scores(step, [&](int64_t r) { return -double(r / s); });
    expect_close("falling");
    set_scores(step, [&](int64_t r) { return r / s % 2 * 1.5 + (r % s == s - 1); });
    expect_close("up and down");
    for (const double large : {1e4, -1e4}) {
      set_scores(step, [&](int64_t r) { return double(r / s) * large / 4; });
      expect_close("leaps");
      set_scores(step, [&](int64_t r) { return r / s == 1 ? large : r % 3; });
      expect_close("one slab");
      set_scores(step, [&](int64_t r) { return large + r % 4; });
      expect_close("all far from zero");
    }
  });
}

// Scores that pass the range of float32 have no weight, and leave that of the others alone.
void slabs_of_minus_infinity() {
  const auto check = []<typename T>() {
    const int64_t width = 512, s = slab<T>(width);
    for (const int64_t far : {0, 1, 2}) {
      Step<T> step(tied(grid({3 * s}, {3}), width));
      set_scores(step, [&](int64_t r) { return r / s == far ? -1.0 : r % 5 * 1e-25; });
      for (double& v : step.keys) v *= 1e20;
      for (double& v : step.x) v *= 1e25;
      step.upload();
      EXPECT(close(step.forward(), step.expected_y(), kTolerance<T>, "minus infinity"));
    }
  };
  check.template operator()<float>();
  check.template operator()<BFloat16>();
}

void a_nan_stays_in_its_own_output() {
  for_each_dtype([]<typename T>() {
    const int64_t width = 64;
    Step<T> step(tied(grid({2, 20, 300}, {3, 12}), width));
    const std::vector<double> before = step.forward();
    const int64_t position = step.permutation[step.segment_queries[4] + 1];
    step.x[position * width + 7] = kNan;
    step.upload();
    const std::vector<double> after = step.forward();
    bool right = true;
    for (size_t i = 0; i < after.size(); ++i) {
      const bool own = static_cast<int64_t>(i) / width == position;
      right = right && (own ? std::isnan(after[i]) : after[i] == before[i]);
    }
    EXPECT(right);
  });
}

// --- bits ----------------------------------------------------------------------------------------
void any_order_of_threads_and_any_device_give_the_same_bits() {
  for_each_dtype([]<typename T>() {
    Step<T> step(tied(grid({1, 2, 17, 64, 200}, {1, 9, 16, 40}), 320));
    const std::vector<double> first = step.forward();
    for (uint64_t seed = 1; seed <= 6; ++seed) {
      l3ext::cuda::emulation().seed = seed;
      l3ext::cuda::emulation().multiprocessors = seed == 6 ? 20 : static_cast<int>(seed);
      EXPECT(same_bits(first, step.forward()));
    }
    l3ext::cuda::emulation() = {};
  });
}

void any_promise_of_rows_gives_the_same_bits() {
  for_each_dtype([]<typename T>() {
    Step<T> step(tied(grid({2, 40, 150}, {1, 9, 80}), 128));
    const std::vector<double> expected = step.forward();
    for (const int64_t rows : {300, 700, 1800, 4096}) {
      step.max_rows = rows;
      EXPECT(same_bits(expected, step.forward()));
    }
  });
}

// As long as no more than 16 positions share the token.
void a_batch_does_not_change_a_tokens_bits() {
  for_each_dtype([]<typename T>() {
    const Shape alone = tied(grid({2, 16, 17, 100, 260}, {1, 3}), 128);
    std::vector<int64_t> others;
    for (int64_t id = 0; id < std::ssize(alone.rows); ++id) others.insert(others.end(), 11, id);
    Step<T> small(alone), large(behind(others, alone));
    large.take_last(small);
    const std::vector<double> expected = small.forward(), got = large.forward();
    EXPECT(same_bits(expected, {got.end() - std::ssize(expected), got.end()}));
  });
}

}  // namespace

int main() {
  RUN(any_number_of_rows);
  RUN(any_number_of_queries);
  RUN(any_width);
  RUN(any_layout_and_scale);
  RUN(a_device_without_room_reads_rows_twice);
  RUN(maxima_that_move_from_slab_to_slab);
  RUN(slabs_of_minus_infinity);
  RUN(a_nan_stays_in_its_own_output);
  RUN(any_order_of_threads_and_any_device_give_the_same_bits);
  RUN(any_promise_of_rows_gives_the_same_bits);
  RUN(a_batch_does_not_change_a_tokens_bits);
  return check::failures == 0 ? 0 : 1;
}
