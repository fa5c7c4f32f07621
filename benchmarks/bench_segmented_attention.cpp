// Segmented attention on the host; attention_workload.hpp says of what ids. Synthetic: 16384 ids,
// 65536 rows; the table (0.4 GB in float32) is larger than most last-level caches. Another step
// every iteration. Counters: bytes and flops are the least that a step must move and multiply, as
// rates; of_read is bytes over the read bandwidth that the same threads measured first. Rows in 8
// bits: x and y in float32, the scales beside each row. Backward: the gradients of the touched
// rows, packed. Plain calls, as an embedding program makes them: what
// torch adds to one, `l3ext bench attention` shows.
//
//   bench_segmented_attention --benchmark_filter='Forward<BFloat16>/4096'
//
// In a build with CUDA: bench_segmented_attention_cuda.cpp is in this program too.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <new>
#include <numeric>
#include <random>
#include <thread>
#include <type_traits>
#include <vector>

#include "attention/plan_buffers.hpp"
#include "attention/segmented_attention.hpp"
#include "attention_workload.hpp"
#include "core/dtype.hpp"
#include "core/parallel.hpp"

namespace {

using l3ext::BFloat16;
using l3ext::DType;
using l3ext::Float8E4M3;
using l3ext::bench::Cost;
using l3ext::bench::StepShape;
using l3ext::bench::Workload;

constexpr int64_t kDIn = 1024, kDEmb = 512, kWidth = kDIn + kDEmb;
constexpr int64_t kStreamTokens = 65536;

const Workload& workload() {
  static const Workload kWorkload = l3ext::bench::make_workload(16384, 65536, kStreamTokens);
  return kWorkload;
}

int threads() { return static_cast<int>(std::max(1u, std::thread::hardware_concurrency())); }

float as(float value, const float*) { return value; }
BFloat16 as(float value, const BFloat16*) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return {static_cast<uint16_t>(bits >> 16)};
}
int8_t as(float value, const int8_t*) { return static_cast<int8_t>(value * 1024); }
Float8E4M3 as(float value, const Float8E4M3*) { return {static_cast<uint8_t>(value * 1024)}; }

// How keys and values are stored, and what queries and outputs are beside them.
template <typename Row>
constexpr bool kQuantized = sizeof(Row) == 1;
template <typename Row>
using Query = std::conditional_t<kQuantized<Row>, float, Row>;
// Elements from one row to the next. Behind a row in 8 bits are its scales.
template <typename Row>
constexpr int64_t kStride = kQuantized<Row> ? kWidth + 2 * int64_t{sizeof(float)} : kWidth;

// Where cache lines begin, as tensors lie.
template <typename T>
struct LineAllocator {
  using value_type = T;
  LineAllocator() = default;
  template <typename U>
  explicit LineAllocator(const LineAllocator<U>& /*other*/) {}
  T* allocate(size_t count) {
    return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{64}));
  }
  void deallocate(T* p, size_t /*count*/) { ::operator delete(p, std::align_val_t{64}); }
  bool operator==(const LineAllocator& /*other*/) const { return true; }
};
template <typename T>
using Matrix = std::vector<T, LineAllocator<T>>;

// Multiples of 1/1024 below 1/16.
template <typename T>
Matrix<T> matrix(int64_t rows, int64_t columns) {
  Matrix<T> values(static_cast<size_t>(rows * columns));
  std::mt19937 random(1);
  for (T& v : values)
    v = as(static_cast<float>(random() % 64) / 1024, static_cast<const T*>(nullptr));
  return values;
}

template <typename Row>
const Matrix<Row>& table() {
  static const Matrix<Row> kTable = [] {
    Matrix<Row> rows = matrix<Row>(workload().table_rows(), kStride<Row>);
    if constexpr (kQuantized<Row>) {
      constexpr float kScales[2] = {1.0f / 1024, 1.0f / 1024};
      for (auto r = rows.begin(); r != rows.end(); r += kStride<Row>) {
        std::memcpy(&*r + kWidth, kScales, sizeof(kScales));
      }
    }
    return rows;
  }();
  return kTable;
}

// Bytes a second that all threads read of the table in large pieces.
double read_bandwidth() {
  static const double kBandwidth = [] {
    const Matrix<float>& values = table<float>();
    constexpr int64_t kPiece = int64_t{1} << 18;
    const auto pieces = static_cast<int64_t>(values.size()) / kPiece;
    std::vector<float> sums(static_cast<size_t>(pieces));
    double best = 0;
    for (int run = 0; run < 7; ++run) {
      const auto begin = std::chrono::steady_clock::now();
      l3ext::parallel_for(threads(), pieces, [&](int64_t i) {
        float lanes[64] = {};
        for (int64_t k = i * kPiece; k < (i + 1) * kPiece; k += 64) {
          for (int64_t j = 0; j < 64; ++j) lanes[j] += values[static_cast<size_t>(k + j)];
        }
        sums[static_cast<size_t>(i)] = std::accumulate(lanes, lanes + 64, 0.0f);
      });
      const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
      benchmark::DoNotOptimize(sums.data());
      best = std::max(best, static_cast<double>(pieces * kPiece) * sizeof(float) / took.count());
    }
    return best;
  }();
  return kBandwidth;
}

template <typename T>
constexpr DType kDType = std::is_same_v<T, float>      ? DType::kFloat32
                         : std::is_same_v<T, BFloat16> ? DType::kBFloat16
                         : std::is_same_v<T, int8_t>   ? DType::kInt8
                                                       : DType::kFloat8E4M3;

// Steps of `n` ids with their plans, inputs, and what they cost at least.
template <typename Row>
struct Steps {
  explicit Steps(int64_t n)
      : x(matrix<Query<Row>>(n, kDIn)), plans(std::clamp<int64_t>(kStreamTokens / n, 1, 256)) {
    table<Row>();  // made before the clock starts
    for (size_t i = 0; i < plans.size(); ++i) {
      const auto ids = workload().step(static_cast<int64_t>(i), n);
      plans[i].make(ids, workload().offsets);
      shapes.emplace_back(ids, workload().offsets);
    }
  }

  void read(l3ext::SegmentedAttentionInputs& inputs, const l3ext::PlanBuffers& plan) const {
    const Row* const rows = table<Row>().data();
    inputs.dtype = kDType<Query<Row>>;
    inputs.x = {x.data(), kDIn};
    inputs.keys = {rows, kStride<Row>};
    inputs.values = {rows + kDIn, kStride<Row>};
    if constexpr (kQuantized<Row>) {
      const auto* scales = reinterpret_cast<const std::byte*>(rows + kWidth);
      inputs.quantization = {.dtype = kDType<Row>,
                             .keys = {scales, kStride<Row>},
                             .values = {scales + sizeof(float), kStride<Row>}};
    }
    inputs.plan = plan.view();
    inputs.table_rows = plan.table_rows;
    inputs.d_in = kDIn;
    inputs.d_emb = kDEmb;
    inputs.num_threads = threads();
  }

  void count(benchmark::State& state, int64_t n, auto cost_of) const {
    double bytes = 0, flops = 0;
    for (const StepShape& shape : shapes) {
      const Cost cost = cost_of(shape);
      bytes += static_cast<double>(cost.bytes) / static_cast<double>(shapes.size());
      flops += static_cast<double>(cost.flops) / static_cast<double>(shapes.size());
    }
    using benchmark::Counter;
    state.counters["bytes"] = Counter(bytes, Counter::kIsIterationInvariantRate);
    state.counters["flops"] = Counter(flops, Counter::kIsIterationInvariantRate);
    state.counters["of_read"] =
        Counter(bytes / read_bandwidth(), Counter::kIsIterationInvariantRate);
    state.SetItemsProcessed(state.iterations() * n);
  }

  Matrix<Query<Row>> x;
  std::vector<l3ext::PlanBuffers> plans;
  std::vector<StepShape> shapes;
};

template <typename Row>
void Forward(benchmark::State& state) {
  const int64_t n = state.range(0);
  const Steps<Row> steps(n);
  Matrix<Query<Row>> y(static_cast<size_t>(n * kDEmb));
  size_t i = 0;
  for (auto _ : state) {
    l3ext::SegmentedAttentionParams params;
    steps.read(params, steps.plans[i++ % steps.plans.size()]);
    params.y = {y.data(), kDEmb};
    l3ext::segmented_attention(params);
  }
  steps.count(state, n, [](const StepShape& s) {
    return s.forward(kDIn, kDEmb, sizeof(Row), sizeof(Query<Row>));
  });
}

template <typename T>
void Backward(benchmark::State& state) {
  const int64_t n = state.range(0);
  const Steps<T> steps(n);
  const Matrix<T> dy = matrix<T>(n, kDEmb);
  Matrix<T> dx(static_cast<size_t>(n * kDIn));
  int64_t most_rows = 0;
  for (const StepShape& shape : steps.shapes) most_rows = std::max(most_rows, shape.rows);
  Matrix<T> gradients(static_cast<size_t>(most_rows * kWidth));
  std::vector<std::vector<int64_t>> places;  // where the gradients of each step's segments begin
  for (const l3ext::PlanBuffers& plan : steps.plans) {
    std::vector<int64_t>& begin = places.emplace_back();
    int64_t next = 0;
    for (int64_t s = 0; s < plan.num_segments; ++s) {
      begin.push_back(next);
      next += plan.segment_rows[2 * s + 1] - plan.segment_rows[2 * s];
    }
  }
  size_t i = 0;
  for (auto _ : state) {
    const size_t step = i++ % steps.plans.size();
    l3ext::SegmentedAttentionBackwardParams params;
    steps.read(params, steps.plans[step]);
    params.dy = {dy.data(), kDEmb};
    params.dx = {dx.data(), kDIn};
    params.dkeys = {gradients.data(), kWidth};
    params.dvalues = {gradients.data() + kDIn, kWidth};
    params.segment_gradients = places[step].data();
    params.gradient_rows = steps.shapes[step].rows;
    l3ext::segmented_attention_backward(params);
  }
  steps.count(state, n, [](const StepShape& s) { return s.backward(kDIn, kDEmb, sizeof(T)); });
}

void Plan(benchmark::State& state) {
  l3ext::PlanBuffers plan;
  int64_t i = 0;
  for (auto _ : state) {
    plan.make(workload().step(i++, state.range(0)), workload().offsets, false);
  }
  state.SetItemsProcessed(state.iterations() * state.range(0));
}

void decode_sizes(benchmark::internal::Benchmark* b) {
  b->Arg(1)->Arg(8)->Arg(32)->UseRealTime()->Unit(benchmark::kMicrosecond);
}
void prefill_sizes(benchmark::internal::Benchmark* b) {
  b->Arg(4096)->Arg(16384)->UseRealTime()->Unit(benchmark::kMicrosecond);
}

BENCHMARK(Forward<float>)->Apply(decode_sizes)->Apply(prefill_sizes);
BENCHMARK(Forward<BFloat16>)->Apply(decode_sizes)->Apply(prefill_sizes);
BENCHMARK(Forward<int8_t>)->Apply(decode_sizes)->Apply(prefill_sizes);
BENCHMARK(Forward<Float8E4M3>)->Apply(decode_sizes)->Apply(prefill_sizes);
BENCHMARK(Backward<float>)->Apply(prefill_sizes);
BENCHMARK(Backward<BFloat16>)->Apply(prefill_sizes);
BENCHMARK(Plan)->Arg(1)->Arg(32)->Arg(4096)->Arg(16384)->Unit(benchmark::kMicrosecond);

}  // namespace

BENCHMARK_MAIN();
