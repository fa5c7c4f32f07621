#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "attention/cpu/schedule.hpp"
#include "attention/plan_buffers.hpp"
#include "attention/segmented_attention.hpp"
#include "check.hpp"
#include "core/error.hpp"

using l3ext::DType;
using l3ext::Error;

namespace {

// A step with all its buffers exactly as large as needed: a sanitizer sees any over-read.
struct Step {
  std::vector<int64_t> ids;
  std::vector<int64_t> offsets;
  int64_t d_in, d_emb;
  std::vector<float> x, table, y;
  l3ext::PlanBuffers plan;

  Step(std::vector<int64_t> rows_owned, int64_t num_tokens, int64_t in, int64_t emb)
      : d_in(in), d_emb(emb) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    offsets.push_back(0);
    for (const int64_t count : rows_owned) offsets.push_back(offsets.back() + count);
    for (int64_t i = 0; i < num_tokens; ++i) {
      ids.push_back(static_cast<int64_t>(random() % rows_owned.size()));
    }
    x.resize(num_tokens * d_in);
    table.resize(offsets.back() * (d_in + d_emb));
    y.resize(num_tokens * d_emb, NAN);
    for (float& value : x) value = normal(random);
    for (float& value : table) value = normal(random) / std::sqrt(static_cast<float>(d_in));
    plan.make(ids, offsets);
  }

  l3ext::SegmentedAttentionParams forward(int threads) {
    l3ext::SegmentedAttentionParams params;
    params.x = {x.data(), d_in};
    params.keys = {table.data(), d_in + d_emb};
    params.values = {table.data() + d_in, d_in + d_emb};
    params.y = {y.data(), d_emb};
    params.plan = plan.view();
    params.table_rows = plan.table_rows;
    params.d_in = d_in;
    params.d_emb = d_emb;
    params.num_threads = threads;
    return params;
  }

  std::vector<double> reference() const {
    std::vector<double> expected(y.size());
    const int64_t width = d_in + d_emb;
    for (size_t i = 0; i < ids.size(); ++i) {
      const int64_t begin = offsets[ids[i]], end = offsets[ids[i] + 1];
      std::vector<double> weights;
      double sum = 0;
      for (int64_t r = begin; r < end; ++r) {
        double score = 0;
        for (int64_t k = 0; k < d_in; ++k) score += double{x[i * d_in + k]} * table[r * width + k];
        weights.push_back(std::exp(score));
        sum += weights.back();
      }
      for (int64_t r = begin; r < end; ++r) {
        for (int64_t c = 0; c < d_emb; ++c) {
          expected[i * d_emb + c] += weights[r - begin] / sum * table[r * width + d_in + c];
        }
      }
    }
    return expected;
  }
};

void forward_matches_float64_for_any_thread_count() {
  for (const int64_t tokens : {1, 6, 70, 400}) {
    Step step({1, 2, 3, 8, 13, 40, 100}, tokens, 37, 21);
    const std::vector<double> expected = step.reference();
    std::vector<float> first;
    for (const int threads : {1, 2, 5}) {
      std::fill(step.y.begin(), step.y.end(), NAN);
      l3ext::segmented_attention(step.forward(threads));
      double worst = 0;
      for (size_t i = 0; i < expected.size(); ++i) {
        worst = std::max(worst, std::abs(step.y[i] - expected[i]));
      }
      EXPECT(worst < 1e-5);
      if (first.empty()) first = step.y;
      EXPECT(std::memcmp(first.data(), step.y.data(), first.size() * sizeof(float)) == 0);
    }
  }
}

// Threads share a segment of many rows. Some have a score of -infinity, and one has a score that is
// much larger than all others.
void shared_rows_make_one_softmax() {
  for (const int64_t rows : {63, 64, 65, 128, 200, 1000}) {
    for (const int64_t tokens : {1, 3, 20}) {
      Step step({rows, rows / 2}, tokens, 16, 9);
      for (float& value : step.x) value = std::abs(value);
      const int64_t width = step.d_in + step.d_emb;
      std::vector<float> first;
      for (int64_t r = 0; r < rows; ++r) {
        float* key = step.table.data() + r * width;
        if (r < 64 && rows > 64) std::fill_n(key, step.d_in, -INFINITY);
        if (r == rows - 1) std::fill_n(key, step.d_in, 2.0f);
      }
      const std::vector<double> expected = step.reference();
      for (const int threads : {1, 2, 5}) {
        std::fill(step.y.begin(), step.y.end(), NAN);
        l3ext::segmented_attention(step.forward(threads));
        for (size_t i = 0; i < expected.size(); ++i) {
          EXPECT(std::abs(step.y[i] - expected[i]) < 1e-5);
        }
        if (first.empty()) first = step.y;
        EXPECT(std::memcmp(first.data(), step.y.data(), first.size() * sizeof(float)) == 0);
      }
    }
  }
}

void a_query_without_any_weight_is_nan() {
  Step step({200}, 2, 16, 9);
  std::fill(step.x.begin(), step.x.end(), 1.0f);
  const int64_t width = step.d_in + step.d_emb;
  for (int64_t r = 0; r < 200; ++r) {
    std::fill_n(step.table.data() + r * width, step.d_in, -INFINITY);
  }
  l3ext::segmented_attention(step.forward(2));
  for (const float value : step.y) EXPECT(std::isnan(value));
}

// The gradient of the sum of the outputs.
struct Gradients {
  std::vector<float> dy, dx, dtable;
  l3ext::SegmentedAttentionBackwardParams params;

  Gradients(Step& step, int64_t gradient_rows)
      : dy(step.y.size(), 1.0f),
        dx(step.x.size(), NAN),
        dtable(gradient_rows * (step.d_in + step.d_emb), NAN) {
    const int64_t width = step.d_in + step.d_emb;
    params.x = {step.x.data(), step.d_in};
    params.keys = {step.table.data(), width};
    params.values = {step.table.data() + step.d_in, width};
    params.dy = {dy.data(), step.d_emb};
    params.dx = {dx.data(), step.d_in};
    params.dkeys = {dtable.data(), width};
    params.dvalues = {dtable.data() + step.d_in, width};
    params.plan = step.plan.view();
    params.table_rows = step.plan.table_rows;
    params.d_in = step.d_in;
    params.d_emb = step.d_emb;
    params.num_threads = 2;
  }
};

void backward_writes_every_row_and_the_weights_sum_to_one() {
  Step step({2, 1, 5, 64, 3}, 50, 19, 11);
  const int64_t width = step.d_in + step.d_emb;
  Gradients gradients(step, step.plan.table_rows);
  const std::vector<float>&dtable = gradients.dtable, &dx = gradients.dx;
  l3ext::segmented_attention_backward(gradients.params);
  bool finite = true;
  for (const float value : dtable) finite = finite && std::isfinite(value);
  for (const float value : dx) finite = finite && std::isfinite(value);
  EXPECT(finite);
  // Softmax weights of a query sum to 1: with dy = 1 so do its value gradients, per column.
  double sum = 0;
  for (int64_t r = 0; r < step.plan.table_rows; ++r) sum += dtable[r * width + step.d_in];
  EXPECT(std::abs(sum - 50) < 1e-3);
}

void packed_gradient_rows_are_those_of_the_table() {
  Step step({2, 1, 5, 64, 3, 9}, 4, 19, 11);  // at most four of six tokens are in the step
  const int64_t width = step.d_in + step.d_emb;
  Gradients dense(step, step.plan.table_rows);
  l3ext::segmented_attention_backward(dense.params);

  std::vector<int64_t> starts;
  int64_t rows = 0;
  for (int32_t s = 0; s < step.plan.num_segments; ++s) {
    starts.push_back(rows);
    rows += step.plan.segment_rows[2 * s + 1] - step.plan.segment_rows[2 * s];
  }
  Gradients packed(step, rows);
  packed.params.segment_gradients = starts.data();
  packed.params.gradient_rows = rows;
  l3ext::segmented_attention_backward(packed.params);
  EXPECT(packed.dx == dense.dx);
  for (int32_t s = 0; s < step.plan.num_segments; ++s) {
    const int64_t first = step.plan.segment_rows[2 * s],
                  count = step.plan.segment_rows[2 * s + 1] - first;
    EXPECT(std::memcmp(&packed.dtable[starts[s] * width], &dense.dtable[first * width],
                       count * width * sizeof(float)) == 0);
  }

  packed.params.gradient_rows = rows - 1;
  const std::string message =
      EXPECT_THROWS(Error, l3ext::segmented_attention_backward(packed.params));
  EXPECT(message.find("segment_gradients: expected room for") != std::string::npos);
}

void rows_behind_addresses_are_those_of_the_table() {
  for (const int64_t tokens : {5, 400}) {  // few units share threads, many do not
    Step step({2, 1, 5, 64, 3, 0}, tokens, 19, 11);
    l3ext::segmented_attention(step.forward(2));
    const std::vector<float> expected = step.y;
    std::fill(step.y.begin(), step.y.end(), NAN);

    const int64_t width = step.d_in + step.d_emb;
    std::vector<std::vector<float>> blocks;
    std::vector<int64_t> directory;
    for (size_t t = 0; t + 1 < step.offsets.size(); ++t) {
      blocks.emplace_back(step.table.begin() + step.offsets[t] * width,
                          step.table.begin() + step.offsets[t + 1] * width);
      directory.push_back(reinterpret_cast<int64_t>(blocks.back().data()));
    }
    auto params = step.forward(2);
    params.keys = params.values = {nullptr, width};
    params.table_rows = 0;
    params.directory = directory.data();
    params.vocab_size = static_cast<int64_t>(directory.size());
    params.value_offset = step.d_in;
    l3ext::segmented_attention(params);
    EXPECT(step.y == expected);

    directory[step.ids[0]] = 0;
    if (step.offsets[step.ids[0]] == step.offsets[step.ids[0] + 1]) continue;
    const std::string message = EXPECT_THROWS(Error, l3ext::segmented_attention(params));
    EXPECT(message.find("expected the address of the rows of token") != std::string::npos);
  }
}

void units_cover_every_query_once() {
  Step step({1, 300, 7}, 500, 64, 8);
  for (const auto& [lanes, block] : {std::pair{16, 48}, {4, 8}, {1, 1}, {8, 1024}}) {
    const auto units = l3ext::cpu::make_units(step.plan.view(), lanes, block);
    int64_t next = 0;
    for (const auto& unit : units) {
      EXPECT(unit.query_begin == next);
      EXPECT(unit.queries() > 0 && unit.queries() <= block);
      next = unit.query_end;
    }
    EXPECT(next == 500);
    const auto order = l3ext::cpu::longest_first(units);
    const auto cost = [&](int32_t i) { return units[i].rows() * (8 + units[i].queries()); };
    for (size_t i = 1; i < order.size(); ++i) EXPECT(cost(order[i - 1]) >= cost(order[i]));
  }
}

void units_of_a_segment_share_its_queries_evenly() {
  Step step({5}, 97, 8, 8);  // 7 vectors of 16
  const auto units = l3ext::cpu::make_units(step.plan.view(), 16, 48);
  EXPECT(units.size() == 3);
  EXPECT(units[0].queries() == 32 && units[1].queries() == 32 && units[2].queries() == 33);
}

// Units of `queries` queries and `rows` rows.
std::vector<l3ext::cpu::Unit> units_of(const std::vector<std::pair<int64_t, int64_t>>& sizes) {
  std::vector<l3ext::cpu::Unit> units;
  for (const auto& [queries, rows] : sizes) {
    units.push_back({.segment = std::ssize(units), .query_end = queries, .row_end = rows});
  }
  return units;
}

// Of the same cost in the order of the plan, whatever the costs are: nothing, or more than 32 bits.
void the_longest_come_first() {
  std::mt19937 random(2);
  for (const int64_t most : std::vector<int64_t>{1, 3, 300, 70'000, 3'000'000'000}) {
    std::vector<std::pair<int64_t, int64_t>> sizes(1 + random() % 500);
    for (auto& [queries, rows] : sizes) {
      queries = 1 + static_cast<int64_t>(random() % 3);
      rows = static_cast<int64_t>(random()) % most;
    }
    const auto units = units_of(sizes);
    std::vector<int32_t> expected(units.size());
    std::iota(expected.begin(), expected.end(), 0);
    std::stable_sort(expected.begin(), expected.end(),
                     [&](int32_t a, int32_t b) { return units[a].cost() > units[b].cost(); });
    EXPECT(l3ext::cpu::longest_first(units) == expected);
  }
  EXPECT(l3ext::cpu::longest_first({}).empty());
}

void units_of_few_queries_ride_along() {
  std::mt19937 random(1);
  for (int round = 0; round < 200; ++round) {
    std::vector<std::pair<int64_t, int64_t>> sizes(random() % 50);
    for (auto& [queries, rows] : sizes) {
      queries = 1 + static_cast<int64_t>(random() % (round % 2 == 0 ? 6 : 40));
      rows = static_cast<int64_t>(random() % 60);
    }
    const auto units = units_of(sizes);
    const auto few = [&](int32_t i) { return units[i].queries() <= 6; };
    const int64_t most = round % 3 == 0 ? 0 : 100;
    const auto schedule = l3ext::cpu::make_schedule(units, 6, most);
    std::vector<int> seen(units.size());
    for (const int32_t i : schedule.units) ++seen[i];
    EXPECT(std::all_of(seen.begin(), seen.end(), [](int count) { return count == 1; }));
    EXPECT(schedule.tasks.front() == 0 && schedule.tasks.back() == std::ssize(units));
    bool alone = false;  // tasks of few queries: after all others
    for (size_t t = 0; t + 1 < schedule.tasks.size(); ++t) {
      const int64_t begin = schedule.tasks[t], end = schedule.tasks[t + 1];
      EXPECT(begin < end);
      alone = alone || few(schedule.units[begin]);
      EXPECT(few(schedule.units[begin]) == alone);
      EXPECT(!alone || end - begin == 1);
      int64_t rows = 0;
      for (int64_t i = begin + 1; i < end; ++i) {
        EXPECT(few(schedule.units[i]));
        EXPECT(rows < most);
        rows += units[schedule.units[i]].rows();
      }
    }
  }
}

// Riders are dealt out by the products beyond those that their host's own rows need time for.
void riders_are_shared_out_by_products() {
  std::vector<std::pair<int64_t, int64_t>> sizes = {{36, 100}, {16, 100}};
  sizes.resize(42, {1, 10});
  const auto schedule = l3ext::cpu::make_schedule(units_of(sizes), 6, 1000);
  EXPECT((schedule.tasks == std::vector<int64_t>{0, 31, 42}));
}

void a_plan_that_does_not_fit_writes_nothing() {
  Step step({2, 3}, 4, 8, 4);
  auto params = step.forward(1);
  params.table_rows = 4;
  const std::string message = EXPECT_THROWS(Error, l3ext::segmented_attention(params));
  EXPECT(message.find("of a table of 4 rows") != std::string::npos);
  EXPECT(std::isnan(step.y[0]));
}

}  // namespace

int main() {
  RUN(forward_matches_float64_for_any_thread_count);
  RUN(shared_rows_make_one_softmax);
  RUN(a_query_without_any_weight_is_nan);
  RUN(backward_writes_every_row_and_the_weights_sum_to_one);
  RUN(packed_gradient_rows_are_those_of_the_table);
  RUN(rows_behind_addresses_are_those_of_the_table);
  RUN(units_cover_every_query_once);
  RUN(units_of_a_segment_share_its_queries_evenly);
  RUN(the_longest_come_first);
  RUN(units_of_few_queries_ride_along);
  RUN(riders_are_shared_out_by_products);
  RUN(a_plan_that_does_not_fit_writes_nothing);
  return check::failures == 0 ? 0 : 1;
}
