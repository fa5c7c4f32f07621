// The forward kernels on the emulated device against a plain computation in double.
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

constexpr int64_t kManyTokens = l3ext::cuda::kDecodeTokens + 1;
const std::vector<int64_t> kRows = {0, 1, 2, 15, 16, 17, 63, 64, 65, 128, 129, 511, 512, 700};

template <typename T>
bool forward_matches(const Shape& shape, const char* what) {
  Step<T> step(shape);
  return close(step.forward(), step.expected_y(), kTolerance<T>, what);
}

// --- shapes --------------------------------------------------------------------------------------
void few_tokens_of_any_number_of_rows() {
  for_each_dtype(
      []<typename T>() { EXPECT(forward_matches<T>(grid(kRows, {1, 3, 8, 9}), "decode")); });
}

void many_tokens_of_any_number_of_rows() {
  for_each_dtype(
      []<typename T>() { EXPECT(forward_matches<T>(grid(kRows, {1, 8, 9, 63}), "many")); });
}

void any_number_of_queries() {
  for_each_dtype([]<typename T>() {
    const std::vector<int64_t> queries = {1, 2, 3, 8, 9, 16, 32, 33, 63, 64, 65, 72, 73, 129};
    EXPECT(forward_matches<T>(grid({0, 1, 2, 17, 130}, queries), "many tokens"));
    EXPECT(forward_matches<T>(grid({0, 1, 2, 17}, {1, 2, 3, 8, 9, 16, 33, 65}), "decode"));
  });
}

void any_width() {
  for_each_dtype([]<typename T>() {
    const Shape few = grid({1, 3, 20, 150}, {1, 5, 10});
    const Shape many = grid({1, 5, 40, 140, 300}, {1, 6, 70, 150});
    for (const int64_t d_in : {64, 128, 192, 320}) {
      const int64_t d_emb = 384 - d_in;
      EXPECT(forward_matches<T>(with_widths(few, d_in, d_emb), "decode"));
      EXPECT(forward_matches<T>(with_widths(many, d_in, d_emb), "many"));
    }
    EXPECT(forward_matches<T>(with_widths(grid({2, 70}, {3}), 1024, 2048), "decode, wide"));
  });
}

void tables_of_any_layout() {
  for_each_dtype([]<typename T>() {
    for (const bool decode : {true, false}) {
      Shape shape = grid({0, 1, 2, 33, 140}, {1, 7, decode ? 20 : 210});
      for (const Layout layout : {Layout::kTable, Layout::kSeparate, Layout::kDirectory}) {
        for (const bool tied : {false, true}) {
          if (tied && layout == Layout::kSeparate) continue;
          shape.layout = layout;
          shape.tied = tied;
          EXPECT(forward_matches<T>(with_widths(shape, 128, tied ? 128 : 64), "layout"));
        }
      }
    }
  });
}

void extreme_steps() {
  for_each_dtype([]<typename T>() {
    EXPECT(forward_matches<T>({{3}, {}}, "no tokens"));
    EXPECT(forward_matches<T>({{3}, {0}}, "one token"));
    EXPECT(forward_matches<T>({{0}, {0, 0}}, "no rows"));
    EXPECT(forward_matches<T>({{65}, std::vector<int64_t>(900, 0)}, "one token, decode"));
    EXPECT(forward_matches<T>({{65}, std::vector<int64_t>(1500, 0)}, "one token, many queries"));
    Shape distinct;
    for (int64_t t = 0; t < kManyTokens + 70; ++t) {
      distinct.rows.push_back(t % 4);
      distinct.ids.push_back(t);
    }
    EXPECT(forward_matches<T>(distinct, "all distinct"));
    distinct.ids.resize(500);
    EXPECT(forward_matches<T>(distinct, "all distinct, decode"));
  });
}

// A decode step that would fill the device, beside work that has a part of it, or all.
void bits_do_not_depend_on_the_room() {
  for_each_dtype([]<typename T>() {
    Shape shape = grid({1, 20, 150}, {2, 12});
    shape.layout = Layout::kDirectory;
    const std::vector<double> all = Step<T>(shape).forward();
    for (const int spare : {1, 2, 3, 100}) {
      shape.spare_multiprocessors = spare;
      EXPECT(same_bits(Step<T>(shape).forward(), all));
    }
  });
}

// --- values --------------------------------------------------------------------------------------
void extreme_scores() {
  for_each_dtype([]<typename T>() {
    for (const bool decode : {true, false}) {
      Step<T> step(grid({2, 20, 150}, {2, decode ? 12 : 400}));
      const auto set_keys = [&](auto&& value) {
        for (int64_t r = 0; r < step.table_rows; ++r) {
          for (int64_t c = 0; c < 64; ++c) step.keys[r * 64 + c] = value(r, c);
        }
        for (size_t i = 0; i < step.x.size(); ++i) step.x[i] = i % 64 == 5 ? 128 : 0;
        step.upload();
      };
      set_keys([](int64_t r, int64_t c) { return c == 5 && r % 3 == 1 ? 80.0 : 0.0; });
      EXPECT(close(step.forward(), step.expected_y(), kTolerance<T>, "scores of 10240"));
      set_keys([](int64_t, int64_t c) { return c == 5 ? -80.0 : 1.0; });
      EXPECT(close(step.forward(), step.expected_y(), kTolerance<T>, "all scores -10240"));
      set_keys([](int64_t r, int64_t c) { return c == 5 ? (r % 7 - 3) * 0.5 : 0.0; });
      step.shape.scale = -0.01;
      EXPECT(close(step.forward(), step.expected_y(), kTolerance<T>, "negative scale"));
      step.shape.scale = 0;
      EXPECT(close(step.forward(), step.expected_y(), kTolerance<T>, "scale 0"));
    }
  });
}

void a_nan_stays_in_its_own_output() {
  for_each_dtype([]<typename T>() {
    for (const bool decode : {true, false}) {
      Step<T> step(grid({2, 20, 150}, {3, decode ? 12 : 400}));
      const std::vector<double> before = step.forward();
      const int64_t position = step.permutation[step.segment_queries[3] + 1];
      step.x[position * 64 + 7] = kNan;
      step.upload();
      const std::vector<double> after = step.forward();
      bool right = true;
      for (int64_t i = 0; i < step.num_tokens; ++i) {
        for (int64_t c = 0; c < 64; ++c) {
          const double a = after[i * 64 + c];
          right = right && (i == position ? std::isnan(a) : a == before[i * 64 + c]);
        }
      }
      EXPECT(right);
    }
  });
}

// --- what a plan may hold ------------------------------------------------------------------------
void positions_of_no_token_get_nan() {
  for_each_dtype([]<typename T>() {
    for (const int64_t invalid : {1, 20, 1100}) {
      Shape shape = grid({0, 1, 2, 40}, {1, 9});
      for (int64_t i = 0; i < invalid; ++i) {
        shape.ids.insert(shape.ids.begin() + (7 * i) % std::ssize(shape.ids), -1);
      }
      EXPECT(forward_matches<T>(shape, "ids that are none"));
      shape.layout = Layout::kDirectory;
      EXPECT(forward_matches<T>(shape, "ids that are none, directory"));
    }
  });
}

void rows_without_an_address_and_too_many_rows_give_nan() {
  for (const int64_t queries : {5, 700}) {
    Shape shape = grid({3, 40}, {queries, queries});
    shape.layout = Layout::kDirectory;
    Step<BFloat16> step(shape);
    std::vector<double> expected = step.expected_y();
    step.directory[0] = 0;
    step.max_rows = 39;  // token 0 has 3, tokens 4 and 6 have 40
    for (int64_t i = 0; i < step.num_tokens; ++i) {
      if (shape.ids[i] == 2) continue;
      std::fill_n(expected.begin() + i * shape.d_emb, shape.d_emb, kNan);
    }
    EXPECT(close(step.forward(), expected, kTolerance<BFloat16>, "no address"));
  }
}

// --- bits ----------------------------------------------------------------------------------------
void any_order_of_threads_and_any_device_give_the_same_bits() {
  const l3ext::cuda::Emulation as_before = l3ext::cuda::emulation();
  for_each_dtype([]<typename T>() {
    for (const bool decode : {true, false}) {
      Step<T> step(with_widths(grid({1, 2, 17, 64, 200}, {1, 9, decode ? 20 : 250}), 128, 192));
      const std::vector<double> first = step.forward();
      for (uint64_t seed = 1; seed <= 4; ++seed) {
        l3ext::cuda::emulation().seed = seed;
        l3ext::cuda::emulation().multiprocessors = seed == 4 ? 20 : static_cast<int>(seed);
        EXPECT(same_bits(first, step.forward()));
      }
      l3ext::cuda::emulation() = {};
    }
  });
  l3ext::cuda::emulation() = as_before;
}

template <typename T>
void expect_same_bits_in_a_batch(const Shape& alone, const std::vector<int64_t>& others) {
  Step<T> small(alone), large(behind(others, alone));
  large.take_last(small);
  const std::vector<double> expected = small.forward(), got = large.forward();
  EXPECT(same_bits(expected, {got.end() - std::ssize(expected), got.end()}));
}

void a_batch_does_not_change_a_tokens_bits() {
  for_each_dtype([]<typename T>() {
    Shape shape = with_widths(grid({1, 2, 16, 17, 100, 260}, {1, 3}), 128, 128);
    expect_same_bits_in_a_batch<T>(shape, {});
    expect_same_bits_in_a_batch<T>(shape, shuffled_ids({1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}));
    // Among many, segments of a stream chunk become dense ones.
    shape.ids = shuffled_ids(std::vector<int64_t>(shape.rows.size(), 60));
    const std::vector<int64_t> more = shuffled_ids(std::vector<int64_t>(shape.rows.size(), 9));
    expect_same_bits_in_a_batch<T>(shape, more);
  });
}

// Rooms for more rows than there are: other tiles, other slices, the same bits.
void any_promise_of_rows_gives_the_same_bits() {
  for_each_dtype([]<typename T>() {
    for (const bool decode : {true, false}) {
      Step<T> step(with_widths(grid({1, 2, 40, 150}, {1, 9, decode ? 20 : 400}), 128, 192));
      const std::vector<double> expected = step.forward();
      for (const int64_t rows : {300, 700, 1800, 4096}) {
        step.max_rows = rows;
        EXPECT(same_bits(expected, step.forward()));
      }
    }
  });
}

void any_tuning_gives_the_same_bits() {
  l3ext::cuda::Tuning& tuning = l3ext::cuda::tuning();
  for_each_dtype([&]<typename T>() {
    Step<T> many(with_widths(grid({2, 17, 150}, {1, 8, 9, 40, 64, 300}), 128, 192));
    EXPECT(many.num_tokens > l3ext::cuda::kDecodeTokens);
    const std::vector<double> dense = many.forward();
    for (const int tiles : {4, 1}) {
      tuning.most_forward_tiles = tiles;
      EXPECT(same_bits(dense, many.forward()));
    }
    tuning = {};
    Step<T> few(with_widths(grid({1, 2, 40, 150}, {1, 9, 20}), 128, 192));
    const std::vector<double> decoded = few.forward();
    for (const int turns : {1, 16, 1000}) {
      tuning.decode_turns = turns;
      EXPECT(same_bits(decoded, few.forward()));
    }
    tuning.most_decode_tokens = 0;
    EXPECT(close(few.forward(), few.expected_y(), kTolerance<T>, "few, by the kernel of many"));
    tuning = {};
  });
}

// --- addresses -----------------------------------------------------------------------------------
// A table of zeros of which only the last rows take memory, past 2^31 elements; and queries so far
// apart that position times stride passes 2^31.
void addresses_pass_2_to_the_31() {
  constexpr int64_t kStride = 1 << 20, kTokens = 2100;
  Shape shape{{5, 40}, std::vector<int64_t>(kTokens, 0)};
  for (int64_t i = 0; i < kTokens; i += 3) shape.ids[i] = 1;
  Step<BFloat16> step(shape);
  l3ext::cuda::emulated::GuardedPages x(kTokens * kStride * 2), table(3000 * kStride * 2),
      y(kTokens * kStride * 2);
  const auto at = [](const l3ext::cuda::emulated::GuardedPages& pages, int64_t row) {
    return reinterpret_cast<BFloat16*>(pages.begin()) + row * kStride;
  };
  const int64_t first_row = 2500;
  for (int64_t r = 0; r < step.table_rows; ++r) {
    for (int64_t c = 0; c < 64; ++c) {
      at(table, first_row + r)[c] = element<BFloat16>(step.keys[r * 64 + c]);
      at(table, first_row + r)[64 + c] = element<BFloat16>(step.values[r * 64 + c]);
    }
  }
  for (int64_t i = 0; i < kTokens; ++i) {
    for (int64_t c = 0; c < 64; ++c) at(x, i)[c] = element<BFloat16>(step.x[i * 64 + c]);
  }
  for (int64_t i = 0; i < 2 * step.num_segments; ++i) step.segment_rows[i] += first_row;
  l3ext::SegmentedAttentionParams params{step.inputs(), {at(y, 0), kStride}};
  params.x = {at(x, 0), kStride};
  params.keys = {at(table, 0), kStride};
  params.values = {at(table, 0) + 64, kStride};
  params.table_rows = 3000;
  const int64_t bytes = l3ext::cuda::segmented_attention_workspace(params);
  DeviceBuffer<std::byte> workspace(bytes, 256);
  l3ext::cuda::segmented_attention(params, {nullptr, workspace.data(), bytes});
  std::vector<double> got;
  for (int64_t i = 0; i < kTokens; ++i) {
    for (int64_t c = 0; c < 64; ++c) got.push_back(value_of(at(y, i)[c]));
  }
  EXPECT(close(got, step.expected_y(), kTolerance<BFloat16>, "far addresses"));
}

// --- errors --------------------------------------------------------------------------------------
void what_does_not_fit_is_refused_by_name() {
  Step<BFloat16> step(grid({2, 20}, {2, 3}));
  Matrix<BFloat16> y(step.num_tokens, 64, 64);
  const auto message = [&](auto&& change) {
    l3ext::SegmentedAttentionParams params{step.inputs(), y.mutable_view()};
    const int64_t bytes = l3ext::cuda::segmented_attention_workspace(params);
    DeviceBuffer<std::byte> workspace(bytes, 256);
    l3ext::cuda::Launch launch{nullptr, workspace.data(), bytes};
    change(params, launch);
    return EXPECT_THROWS(l3ext::Error, l3ext::cuda::segmented_attention(params, launch));
  };
  const auto names = [&](const char* argument, auto&& change) {
    const std::string text =
        message([&](l3ext::SegmentedAttentionParams& p, l3ext::cuda::Launch&) { change(p); });
    return text.find(argument) != std::string::npos && text.find("got") != std::string::npos;
  };
  EXPECT(names("keys", [](auto& p) { p.d_in = 96; }));
  EXPECT(names("keys", [](auto& p) { p.d_in = 8256; }));
  EXPECT(names("values", [](auto& p) { p.d_emb = 32; }));
  EXPECT(names("max_rows", [](auto& p) { p.plan.max_rows = 4097; }));
  EXPECT(names("float64", [](auto& p) { p.dtype = DType::kFloat64; }));
  EXPECT(names("x", [](auto& p) { p.x.stride = 68; }));
  EXPECT(
      names("keys", [](auto& p) { p.keys.data = static_cast<const BFloat16*>(p.keys.data) + 4; }));
  EXPECT(names("y", [](auto& p) { p.y.stride = 63; }));
  const std::string workspace =
      message([](l3ext::SegmentedAttentionParams&, l3ext::cuda::Launch& launch) {
        launch.workspace_bytes -= 1;
      });
  EXPECT(workspace.find("workspace") != std::string::npos);
}

}  // namespace

int main() {
  RUN(few_tokens_of_any_number_of_rows);
  RUN(many_tokens_of_any_number_of_rows);
  RUN(any_number_of_queries);
  RUN(any_width);
  RUN(tables_of_any_layout);
  RUN(extreme_steps);
  RUN(bits_do_not_depend_on_the_room);
  RUN(extreme_scores);
  RUN(a_nan_stays_in_its_own_output);
  RUN(positions_of_no_token_get_nan);
  RUN(rows_without_an_address_and_too_many_rows_give_nan);
  RUN(any_order_of_threads_and_any_device_give_the_same_bits);
  RUN(a_batch_does_not_change_a_tokens_bits);
  RUN(any_promise_of_rows_gives_the_same_bits);
  RUN(any_tuning_gives_the_same_bits);
  RUN(addresses_pass_2_to_the_31);
  RUN(what_does_not_fit_is_refused_by_name);
  return check::failures == 0 ? 0 : 1;
}
