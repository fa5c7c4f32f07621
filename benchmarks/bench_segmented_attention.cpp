// Segmented attention on the host, float32; attention_workload.hpp says of what ids. Synthetic:
// 16384 ids, 65536 rows; the table (0.4 GB) is larger than most last-level caches. Another step
// every iteration. Counters: bytes is what a forward must move at least, as a rate.
//
//   bench_segmented_attention --benchmark_filter=Forward/4096
//
// In a build with CUDA: bench_segmented_attention_cuda.cpp is in this program too.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "attention/plan_buffers.hpp"
#include "attention/segmented_attention.hpp"
#include "attention_workload.hpp"

namespace {

using l3ext::bench::StepShape;
using l3ext::bench::Workload;

constexpr int64_t kDIn = 1024, kDEmb = 512, kWidth = kDIn + kDEmb;
constexpr int64_t kSteps = 4;

const Workload& workload() {
  static const Workload kWorkload = l3ext::bench::make_workload(16384, 65536, kSteps * 16384);
  return kWorkload;
}

const float* table() {
  static const std::unique_ptr<float[]> kTable = [] {
    const int64_t elements = workload().table_rows() * kWidth;
    std::unique_ptr<float[]> values(new float[elements]);
    std::mt19937 random(1);
    for (int64_t i = 0; i < elements; ++i) values[i] = static_cast<float>(random() % 64) / 1024;
    return values;
  }();
  return kTable.get();
}

int threads() { return static_cast<int>(std::max(1u, std::thread::hardware_concurrency())); }

void BM_Forward(benchmark::State& state) {
  const int64_t n = state.range(0);
  std::vector<l3ext::PlanBuffers> plans(kSteps);
  double bytes = 0;
  for (int64_t i = 0; i < kSteps; ++i) {
    plans[i].make(workload().step(i, n), workload().offsets);
    const StepShape shape(workload().step(i, n), workload().offsets);
    bytes += static_cast<double>(shape.forward(kDIn, kDEmb, sizeof(float)).bytes) / kSteps;
  }
  std::vector<float> x(n * kDIn, 0.5f), y(n * kDEmb);
  int64_t i = 0;
  for (auto _ : state) {
    const l3ext::PlanBuffers& plan = plans[i++ % kSteps];
    l3ext::SegmentedAttentionParams params;
    params.x = {x.data(), kDIn};
    params.keys = {table(), kWidth};
    params.values = {table() + kDIn, kWidth};
    params.y = {y.data(), kDEmb};
    params.plan = plan.view();
    params.table_rows = plan.table_rows;
    params.d_in = kDIn;
    params.d_emb = kDEmb;
    params.num_threads = threads();
    l3ext::segmented_attention(params);
  }
  state.counters["bytes"] =
      benchmark::Counter(bytes, benchmark::Counter::kIsIterationInvariantRate);
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
  l3ext::PlanBuffers plan;
  int64_t i = 0;
  for (auto _ : state) {
    plan.make(workload().step(i++ % kSteps, state.range(0)), workload().offsets, false);
  }
  state.SetItemsProcessed(state.iterations() * state.range(0));
}
BENCHMARK(BM_Plan)->Arg(1)->Arg(32)->Arg(4096)->Arg(16384)->Unit(benchmark::kMicrosecond);

}  // namespace

BENCHMARK_MAIN();
