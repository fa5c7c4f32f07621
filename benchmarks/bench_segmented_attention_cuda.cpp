// Segmented attention on the first CUDA device, bfloat16; attention_workload.hpp says of what ids.
// Synthetic: 180000 ids, 710000 rows of 2048 + 1024 elements (4.4 GB). Another step every
// iteration, the second-level cache cold, timed by events. Counters: bytes/s and flops/s of the
// least that the call must move and multiply; copied/s of a copy of 1 GiB, read and written, in the
// same process; floor, the share of the time that the bytes would take at that rate.
//
//   bench_segmented_attention --benchmark_filter=Cuda
#include <benchmark/benchmark.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>
#include <span>
#include <vector>

#include "attention/cuda/schedule.hpp"
#include "attention/cuda/segmented_attention.hpp"
#include "attention/plan_buffers.hpp"
#include "attention_workload.hpp"
#include "core/cuda/check.hpp"
#include "core/cuda_devices.hpp"
#include "cuda_memory.hpp"
#include "cuda_probes.hpp"

namespace {

namespace cuda = l3ext::cuda;
using l3ext::bench::Cost;
using l3ext::bench::DeviceMemory;
using l3ext::bench::Memory;
using l3ext::bench::on_device;
using l3ext::bench::StepShape;
using l3ext::bench::Workload;

constexpr int64_t kDIn = 2048, kDEmb = 1024, kWidth = kDIn + kDEmb, kElementBytes = 2;
constexpr int64_t kSteps = 4;
constexpr int64_t kGraphCalls = 16;  // what a replay itself costs is shared out among them
constexpr int64_t kFlushBytes = int64_t{512} << 20;
constexpr int64_t kCopyBytes = int64_t{1} << 30;

// Matrices of bfloat16 between 1/128 and 1/32: one random block of 64 MiB again and again, since
// zeros would draw less power than data does.
Memory random_matrix(int64_t rows, int64_t columns) {
  static const std::vector<uint16_t> kBlock = [] {
    std::vector<uint16_t> values(int64_t{32} << 20);
    std::mt19937 random(1);
    for (uint16_t& v : values) v = static_cast<uint16_t>((random() & 0x80ff) | 0x3c00);
    return values;
  }();
  const int64_t count = rows * columns, block = std::ssize(kBlock);
  auto matrix = std::make_unique<DeviceMemory>(count * kElementBytes);
  for (int64_t i = 0; i < count; i += block) {
    L3EXT_CUDA_CHECK(cudaMemcpy(matrix->as<uint16_t>() + i, kBlock.data(),
                                static_cast<size_t>(std::min(block, count - i) * kElementBytes),
                                cudaMemcpyHostToDevice));
  }
  return matrix;
}

class Event {
 public:
  Event() { L3EXT_CUDA_CHECK(cudaEventCreate(&event_)); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  void record(cudaStream_t stream) { L3EXT_CUDA_CHECK(cudaEventRecord(event_, stream)); }
  double seconds_since(const Event& begin) {
    L3EXT_CUDA_CHECK(cudaEventSynchronize(event_));
    float milliseconds = 0;
    L3EXT_CUDA_CHECK(cudaEventElapsedTime(&milliseconds, begin.event_, event_));
    return milliseconds / 1e3;
  }

 private:
  cudaEvent_t event_ = nullptr;
};

// What all benchmarks share; made when the first of them runs.
struct Device {
  Workload workload = l3ext::bench::make_workload(180000, 710000, kSteps * 65536);
  int64_t max_rows = workload.max_rows();
  cudaStream_t stream = nullptr;
  Memory offsets = on_device(workload.offsets.data(), std::ssize(workload.offsets));
  Memory table = random_matrix(workload.table_rows(), kWidth);
  Memory flush = std::make_unique<DeviceMemory>(kFlushBytes);
  double copied = 0;  // bytes/s

  Device() {
    L3EXT_CUDA_CHECK(cudaMemset(flush->as<void>(), 0, kFlushBytes));
    L3EXT_CUDA_CHECK(cudaStreamCreate(&stream));  // waits for cudaMemcpy and cudaMemset
    const DeviceMemory from(kCopyBytes), to(kCopyBytes);
    std::vector<double> seconds;
    for (int i = 0; i < 10; ++i) {
      seconds.push_back(measure([&] {
        L3EXT_CUDA_CHECK(cudaMemcpyAsync(to.as<void>(), from.as<void>(), kCopyBytes,
                                         cudaMemcpyDeviceToDevice, stream));
      }));
    }
    std::nth_element(seconds.begin(), seconds.begin() + 5, seconds.end());
    copied = 2 * kCopyBytes / seconds[5];
  }

  // Seconds of what `run` enqueues, the cache cold and the host ahead.
  template <typename F>
  double measure(F&& run) {
    Event begin, end;
    l3ext::bench::read_all(flush->as<void>(), kFlushBytes, stream);
    begin.record(stream);
    run();
    end.record(stream);
    return end.seconds_since(begin);
  }

  static Device& get() {
    static Device device;
    return device;
  }
};

// A step on the device: its ids, and a plan of them that can be made again.
class DeviceStep {
 public:
  DeviceStep(Device& device, std::span<const int64_t> ids)
      : shape(ids, device.workload.offsets),
        device_(device),
        n_(std::ssize(ids)),
        ids_(on_device(ids.data(), n_)),
        permutation_(std::make_unique<DeviceMemory>(4 * n_)),
        tokens_(std::make_unique<DeviceMemory>(4 * n_)),
        queries_(std::make_unique<DeviceMemory>(4 * (n_ + 1))),
        rows_(std::make_unique<DeviceMemory>(16 * n_)),
        counts_(std::make_unique<DeviceMemory>(16)),
        schedule_(std::make_unique<DeviceMemory>(4 * cuda::schedule_entries(n_))),
        workspace_bytes_(cuda::plan_workspace(plan_params())),
        workspace_(std::make_unique<DeviceMemory>(workspace_bytes_)) {
    plan();
  }

  void plan() {
    cuda::plan(plan_params(), schedule_->as<int32_t>(),
               {device_.stream, workspace_->as<void>(), workspace_bytes_});
  }
  l3ext::PlanView view() const {
    l3ext::PlanView view;
    view.permutation = permutation_->as<int32_t>();
    view.segment_queries = queries_->as<int32_t>();
    view.segment_rows = rows_->as<int64_t>();
    view.segment_tokens = tokens_->as<int32_t>();
    view.num_tokens = n_;
    view.schedule = schedule_->as<int32_t>();
    view.max_rows = device_.max_rows;
    return view;
  }

  StepShape shape;

 private:
  l3ext::PlanParams plan_params() const {
    l3ext::PlanParams params;
    params.token_ids = ids_->as<void>();
    params.num_tokens = n_;
    params.offsets = device_.offsets->as<int64_t>();
    params.vocab_size = device_.workload.vocab_size();
    params.check_offsets = false;
    params.permutation = permutation_->as<int32_t>();
    params.segment_tokens = tokens_->as<int32_t>();
    params.segment_queries = queries_->as<int32_t>();
    params.segment_rows = rows_->as<int64_t>();
    params.num_segments = counts_->as<int32_t>();
    params.table_rows = counts_->as<int64_t>() + 1;
    return params;
  }

  Device& device_;
  int64_t n_;
  Memory ids_, permutation_, tokens_, queries_, rows_, counts_, schedule_;
  int64_t workspace_bytes_;
  Memory workspace_;
};

std::vector<std::unique_ptr<DeviceStep>> make_steps(Device& device, int64_t count, int64_t n) {
  std::vector<std::unique_ptr<DeviceStep>> steps;
  for (int64_t i = 0; i < count; ++i) {
    steps.push_back(std::make_unique<DeviceStep>(device, device.workload.step(i, n)));
  }
  return steps;
}

void read_table(const Device& device, const DeviceStep& step, const Memory& x,
                l3ext::SegmentedAttentionInputs& inputs) {
  const auto* table = device.table->as<uint16_t>();
  inputs.dtype = l3ext::DType::kBFloat16;
  inputs.x = {x->as<void>(), kDIn};
  inputs.keys = {table, kWidth};
  inputs.values = {table + kDIn, kWidth};
  inputs.plan = step.view();
  inputs.table_rows = device.workload.table_rows();
  inputs.d_in = kDIn;
  inputs.d_emb = kDEmb;
}

// A forward over one step at a time; x and y are those of all.
class Forward {
 public:
  Forward(Device& device, const DeviceStep& largest, int64_t n)
      : device_(device),
        x_(random_matrix(n, kDIn)),
        y_(std::make_unique<DeviceMemory>(n * kDEmb * kElementBytes)),
        workspace_bytes_(cuda::segmented_attention_workspace(params(largest))),
        workspace_(std::make_unique<DeviceMemory>(workspace_bytes_)) {}

  void operator()(const DeviceStep& step) {
    cuda::segmented_attention(params(step),
                              {device_.stream, workspace_->as<void>(), workspace_bytes_});
  }

 private:
  l3ext::SegmentedAttentionParams params(const DeviceStep& step) const {
    l3ext::SegmentedAttentionParams params;
    read_table(device_, step, x_, params);
    params.y = {y_->as<void>(), kDEmb};
    return params;
  }

  Device& device_;
  Memory x_, y_;
  int64_t workspace_bytes_;
  Memory workspace_;
};

// Times every iteration, then reports the steps' mean cost beside the mean time of a call.
template <typename Enqueue>
void time_iterations(benchmark::State& state, Device& device, const std::vector<Cost>& costs,
                     int64_t calls, Enqueue&& enqueue) {
  double seconds = 0;
  int64_t i = 0;
  for (auto _ : state) {
    const double taken = device.measure([&] { enqueue(i); }) / static_cast<double>(calls);
    state.SetIterationTime(taken);
    seconds += taken;
    ++i;
  }
  if (costs.empty()) return;
  seconds /= static_cast<double>(i);
  double bytes = 0, flops = 0;
  for (const Cost& cost : costs) {
    bytes += static_cast<double>(cost.bytes) / static_cast<double>(costs.size());
    flops += static_cast<double>(cost.flops) / static_cast<double>(costs.size());
  }
  state.counters["bytes/s"] = bytes / seconds;
  state.counters["flops/s"] = flops / seconds;
  state.counters["floor"] = bytes / device.copied / seconds;
  state.counters["copied/s"] = device.copied;
}

std::vector<Cost> forward_costs(const std::vector<std::unique_ptr<DeviceStep>>& steps) {
  std::vector<Cost> costs;
  for (const auto& step : steps)
    costs.push_back(step->shape.forward(kDIn, kDEmb, kElementBytes, kElementBytes));
  return costs;
}

// Runs a benchmark where there is a device; where there is none, or it fails, says so.
template <void (*Body)(benchmark::State&, Device&)>
void on_cuda(benchmark::State& state) {
  if (l3ext::cuda_devices().empty()) return state.SkipWithError("no CUDA device here");
  try {
    Body(state, Device::get());
  } catch (const l3ext::Error& error) {
    state.SkipWithError(error.what());
  }
}

void forward(benchmark::State& state, Device& device) {
  const int64_t n = state.range(0);
  const auto steps = make_steps(device, kSteps, n);
  Forward run(device, *steps[0], n);
  run(*steps[0]);  // loads the kernels
  time_iterations(state, device, forward_costs(steps), 1,
                  [&](int64_t i) { run(*steps[i % kSteps]); });
}

// Row gradients of the touched rows alone, packed.
void backward(benchmark::State& state, Device& device) {
  const int64_t n = state.range(0);
  const auto steps = make_steps(device, kSteps, n);
  const Memory x = random_matrix(n, kDIn), dy = random_matrix(n, kDEmb);
  const DeviceMemory dx(n * kDIn * kElementBytes);
  int64_t most_rows = 0;
  std::vector<Memory> first_rows;
  for (int64_t i = 0; i < kSteps; ++i) {
    l3ext::PlanBuffers plan;
    plan.make(device.workload.step(i, n), device.workload.offsets, false);
    std::vector<int64_t> first(static_cast<size_t>(n));
    int64_t rows = 0;
    for (int64_t s = 0; s < plan.num_segments; ++s) {
      first[s] = rows;
      rows += plan.segment_rows[2 * s + 1] - plan.segment_rows[2 * s];
    }
    most_rows = std::max(most_rows, rows);
    first_rows.push_back(on_device(first.data(), n));
  }
  const DeviceMemory gradients(most_rows * kWidth * kElementBytes);

  const auto params_of = [&](int64_t i) {
    l3ext::SegmentedAttentionBackwardParams params;
    read_table(device, *steps[i], x, params);
    params.dy = {dy->as<void>(), kDEmb};
    params.dx = {dx.as<void>(), kDIn};
    params.dkeys = {gradients.as<uint16_t>(), kWidth};
    params.dvalues = {gradients.as<uint16_t>() + kDIn, kWidth};
    params.segment_gradients = first_rows[i]->as<int64_t>();
    params.gradient_rows = most_rows;
    return params;
  };
  const int64_t bytes = cuda::segmented_attention_backward_workspace(params_of(0));
  const DeviceMemory workspace(bytes);
  const auto run = [&](int64_t i) {
    cuda::segmented_attention_backward(params_of(i), {device.stream, workspace.as<void>(), bytes});
  };
  run(0);
  std::vector<Cost> costs;
  for (const auto& step : steps) costs.push_back(step->shape.backward(kDIn, kDEmb, kElementBytes));
  time_iterations(state, device, costs, 1, [&](int64_t i) { run(i % kSteps); });
}

void plan(benchmark::State& state, Device& device) {
  const auto steps = make_steps(device, kSteps, state.range(0));
  time_iterations(state, device, {}, 1, [&](int64_t i) { steps[i % kSteps]->plan(); });
}

// One call of a graph that makes kGraphCalls, each over another batch; with range(1) != 0 each
// makes its plan too.
void decode(benchmark::State& state, Device& device) {
  const int64_t n = state.range(0);
  const auto steps = make_steps(device, kGraphCalls, n);
  Forward run(device, *steps[0], n);
  run(*steps[0]);
  L3EXT_CUDA_CHECK(cudaStreamSynchronize(device.stream));
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  L3EXT_CUDA_CHECK(cudaStreamBeginCapture(device.stream, cudaStreamCaptureModeThreadLocal));
  for (const auto& step : steps) {
    if (state.range(1) != 0) step->plan();
    run(*step);
  }
  L3EXT_CUDA_CHECK(cudaStreamEndCapture(device.stream, &graph));
  L3EXT_CUDA_CHECK(cudaGraphInstantiate(&executable, graph, 0));
  time_iterations(state, device, forward_costs(steps), kGraphCalls,
                  [&](int64_t) { L3EXT_CUDA_CHECK(cudaGraphLaunch(executable, device.stream)); });
  L3EXT_CUDA_CHECK(cudaGraphExecDestroy(executable));
  L3EXT_CUDA_CHECK(cudaGraphDestroy(graph));
}

BENCHMARK(on_cuda<forward>)
    ->Name("BM_CudaForward")
    ->Arg(8192)
    ->Arg(16384)
    ->Arg(65536)
    ->UseManualTime()
    ->Iterations(100)
    ->Unit(benchmark::kMicrosecond);
BENCHMARK(on_cuda<backward>)
    ->Name("BM_CudaBackward")
    ->Arg(16384)
    ->Arg(65536)
    ->UseManualTime()
    ->Iterations(100)
    ->Unit(benchmark::kMicrosecond);
BENCHMARK(on_cuda<decode>)
    ->Name("BM_CudaDecode")
    ->ArgNames({"batch", "with_plan"})
    ->ArgsProduct({{1, 8, 64, 300, 512}, {0, 1}})
    ->UseManualTime()
    ->Iterations(100)
    ->Unit(benchmark::kMicrosecond);
BENCHMARK(on_cuda<plan>)
    ->Name("BM_CudaPlan")
    ->Arg(512)
    ->Arg(65536)
    ->UseManualTime()
    ->Iterations(100)
    ->Unit(benchmark::kMicrosecond);

}  // namespace
