// Segmented attention on the host: one step of N tokens with Zipf(1) ids over a table of 4 V rows,
// V = 16384, at most 512 rows a token. Another step every iteration; the table (0.4 GB in float32)
// is larger than most last-level caches. Counters: bytes is what a forward must move at least
// (each distinct token's rows, x and y once), as a rate.
//
//   bench_segmented_attention --benchmark_filter=Forward/4096
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "attention/plan_buffers.hpp"
#include "attention/segmented_attention.hpp"

namespace {

constexpr int64_t kVocab = 16384, kMaxRows = 512, kDIn = 1024, kDEmb = 512, kWidth = kDIn + kDEmb;
constexpr int64_t kSteps = 4;

struct Step {
  std::vector<int64_t> ids;
  l3ext::PlanBuffers plan;
};

// The table of every benchmark, zeros and ones by row: the arithmetic does not depend on values.
struct World {
  std::vector<double> cumulative;
  std::vector<int64_t> offsets{0};
  std::unique_ptr<float[]> table;

  World() {
    double sum = 0;
    for (int64_t t = 0; t < kVocab; ++t) cumulative.push_back(sum += 1.0 / (t + 1));
    for (int64_t t = 0; t < kVocab; ++t) {
      const double share = 6.5 * kVocab / ((t + 1) * sum);
      offsets.push_back(offsets.back() + std::clamp<int64_t>(std::llround(share), 1, kMaxRows));
    }
    const int64_t elements = offsets.back() * kWidth;
    table.reset(new float[elements]);
    std::mt19937 random(1);
    for (int64_t i = 0; i < elements; ++i) table[i] = static_cast<float>(random() % 64) / 1024;
  }
  std::vector<Step> steps(int64_t n) const {
    std::mt19937_64 random(2);
    std::uniform_real_distribution<double> uniform(0, cumulative.back());
    std::vector<Step> steps(kSteps);
    for (Step& step : steps) {
      for (int64_t i = 0; i < n; ++i) {
        const auto it = std::lower_bound(cumulative.begin(), cumulative.end(), uniform(random));
        step.ids.push_back(it - cumulative.begin());
      }
      step.plan.make(step.ids, offsets, false);
    }
    return steps;
  }
  static const World& get() {
    static const World world;
    return world;
  }
};

int threads() { return static_cast<int>(std::max(1u, std::thread::hardware_concurrency())); }

void BM_Forward(benchmark::State& state) {
  const World& world = World::get();
  const int64_t n = state.range(0);
  const std::vector<Step> steps = world.steps(n);
  std::vector<float> x(n * kDIn, 0.5f), y(n * kDEmb);
  int64_t i = 0, bytes = 0;
  for (auto _ : state) {
    const Step& step = steps[i++ % kSteps];
    l3ext::SegmentedAttentionParams params;
    params.x = {x.data(), kDIn};
    params.keys = {world.table.get(), kWidth};
    params.values = {world.table.get() + kDIn, kWidth};
    params.y = {y.data(), kDEmb};
    params.plan = step.plan.view();
    params.table_rows = step.plan.table_rows;
    params.d_in = kDIn;
    params.d_emb = kDEmb;
    params.num_threads = threads();
    l3ext::segmented_attention(params);
    for (int64_t s = 0; s < step.plan.num_segments; ++s) {
      bytes += (step.plan.segment_rows[2 * s + 1] - step.plan.segment_rows[2 * s]) * kWidth * 4;
    }
    bytes += n * kWidth * 4;
  }
  state.counters["bytes"] =
      benchmark::Counter(static_cast<double>(bytes), benchmark::Counter::kIsRate);
  state.SetItemsProcessed(state.iterations() * n);
}
BENCHMARK(BM_Forward)
    ->Arg(1)
    ->Arg(8)
    ->Arg(32)
    ->Arg(4096)
    ->UseRealTime()
    ->Unit(benchmark::kMicrosecond);

void BM_Plan(benchmark::State& state) {
  const World& world = World::get();
  std::vector<Step> steps = world.steps(state.range(0));
  int64_t i = 0;
  for (auto _ : state) {
    Step& step = steps[i++ % kSteps];
    step.plan.make(step.ids, world.offsets, false);
  }
  state.SetItemsProcessed(state.iterations() * state.range(0));
}
BENCHMARK(BM_Plan)->Arg(1)->Arg(32)->Arg(4096)->Arg(16384)->Unit(benchmark::kMicrosecond);

}  // namespace

BENCHMARK_MAIN();
