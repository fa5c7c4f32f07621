// Rows from pinned host memory to the first CUDA device, by size and number of blocks: copy engines
// one by one and in batches, the fetch kernel, a step's fetch by the device alone, and a prefetcher
// over all of it. From the first call to the last byte, by the host's clock; bytes/s of what was
// copied; enqueue_us, how long the calls kept the host.
//
//   bench_prefetch --benchmark_filter=Cuda
#include <benchmark/benchmark.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "core/cuda/check.hpp"
#include "core/cuda_devices.hpp"
#include "cuda_memory.hpp"
#include "runtime/cuda/copy_engines.hpp"
#include "runtime/cuda/fetch_blocks.hpp"
#include "runtime/cuda_device.hpp"
#include "runtime/prefetcher.hpp"

namespace {

using namespace l3ext;
using l3ext::bench::DeviceMemory;
using l3ext::bench::Memory;
using l3ext::bench::on_device;
using Clock = std::chrono::steady_clock;

constexpr size_t kHostBytes = size_t{1} << 30;
constexpr size_t kMostBytes = size_t{256} << 20;  // of one call
constexpr int64_t kRowBytes = 6144;               // d_in 2048, d_emb 1024, bfloat16

// Pinned rows on the host, room for them on the device; made when the first benchmark runs.
struct Bench {
  std::shared_ptr<Device> device = make_cuda_device(0, CopyChoice{});
  std::byte* host = static_cast<std::byte*>(device->allocate_staging(kHostBytes));
  DeviceBuffer rows{device, kMostBytes};
  cudaStream_t stream = nullptr;
  cuda::CopyEngines engines;
  std::mt19937_64 random{1};

  Bench() { L3EXT_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking)); }

  static Bench& get() {
    static auto& bench = *new Bench;  // for good: the driver may be gone before statics
    return bench;
  }

  // Blocks from anywhere on the host, side by side on the device.
  std::vector<Copy> blocks(size_t bytes, int64_t count) {
    std::vector<Copy> copies;
    for (int64_t i = 0; i < count; ++i) {
      const size_t at = random() % ((kHostBytes - bytes) / 256) * 256;
      copies.push_back({rows.data() + static_cast<size_t>(i) * bytes, host + at, bytes});
    }
    return copies;
  }
};

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

// `enqueue(i)` puts the i-th iteration's work into the stream.
template <typename Enqueue>
void run(benchmark::State& state, cudaStream_t stream, int64_t bytes, const Enqueue& enqueue) {
  double enqueued = 0;
  int64_t i = 0;
  for (auto _ : state) {
    const auto begin = Clock::now();
    enqueue(i++);
    enqueued += seconds_since(begin);
    L3EXT_CUDA_CHECK(cudaStreamSynchronize(stream));
    state.SetIterationTime(seconds_since(begin));
  }
  state.SetBytesProcessed(state.iterations() * bytes);
  state.counters["enqueue_us"] =
      benchmark::Counter(enqueued * 1e6, benchmark::Counter::kAvgIterations);
}

enum Way : int64_t { kLoop, kBatch, kKernel };

void copy(benchmark::State& state) {
  const auto way = static_cast<Way>(state.range(0));
  const auto bytes = static_cast<size_t>(state.range(1)) << 10;
  const int64_t count = state.range(2);
  const auto kernel_blocks = static_cast<int>(state.range(3));
  Bench& bench = Bench::get();
  if (way == kBatch && !cuda::has_batches()) {
    state.SkipWithError("this driver has no batches");
    return;
  }
  std::vector<std::vector<Copy>> steps;
  for (int i = 0; i < 8; ++i) steps.push_back(bench.blocks(bytes, count));
  run(state, bench.stream, static_cast<int64_t>(bytes) * count, [&](int64_t i) {
    const std::vector<Copy>& copies = steps[static_cast<size_t>(i) % steps.size()];
    if (way == kLoop) {
      cuda::CopyEngines::copy_loop(copies, bench.stream);
    } else if (way == kBatch) {
      bench.engines.copy_batch(copies, bench.stream);
    } else {
      cuda::fetch_blocks(copies, kernel_blocks, bench.stream);
    }
  });
}

// A step of distinct tokens with 241 rows each, none resident, in two launches.
void fetch_step(benchmark::State& state) {
  constexpr int64_t kBytes = 241 * kRowBytes, kVocab = static_cast<int64_t>(kHostBytes) / kBytes;
  const int64_t count = state.range(0);
  Bench& bench = Bench::get();
  std::vector<int64_t> resident(kVocab), sources(kVocab), bytes(kVocab, kBytes);
  for (int64_t t = 0; t < kVocab; ++t) {
    sources[t] = static_cast<int64_t>(reinterpret_cast<uintptr_t>(bench.host)) + t * kBytes;
  }
  std::vector<int32_t> tokens(kVocab);
  std::iota(tokens.begin(), tokens.end(), 0);
  std::shuffle(tokens.begin(), tokens.end(), bench.random);
  std::sort(tokens.begin(), tokens.begin() + count);
  const auto number = static_cast<int32_t>(count);
  const Memory resident_on = on_device(resident.data(), kVocab);
  const Memory sources_on = on_device(sources.data(), kVocab);
  const Memory bytes_on = on_device(bytes.data(), kVocab);
  const Memory tokens_on = on_device(tokens.data(), count), number_on = on_device(&number, 1);
  const DeviceMemory directory(8 * kVocab);
  const int64_t workspace_bytes = cuda::fetch_step_workspace(count);
  const DeviceMemory workspace(workspace_bytes);
  cuda::FetchStepParams params;
  params.tokens = tokens_on->as<int32_t>();
  params.num_tokens = number_on->as<int32_t>();
  params.most_tokens = count;
  params.vocab_size = kVocab;
  params.resident = resident_on->as<int64_t>();
  params.sources = sources_on->as<int64_t>();
  params.source_bytes = bytes_on->as<int64_t>();
  params.ring = bench.rows.data();
  params.ring_bytes = static_cast<int64_t>(kMostBytes);
  params.directory = directory.as<int64_t>();
  params.blocks = static_cast<int>(state.range(1));
  run(state, bench.stream, count * kBytes, [&](int64_t) {
    cuda::fetch_step(params, workspace.as<void>(), workspace_bytes, bench.stream);
  });
}

// begin, wait, end of steps of random tokens, with 241 rows each, through a prefetcher whose table
// is the pinned memory; copies as the device chooses them.
void prefetch(benchmark::State& state) {
  constexpr int64_t kBytes = 241 * kRowBytes, kVocab = static_cast<int64_t>(kHostBytes) / kBytes;
  Bench& bench = Bench::get();
  static const std::shared_ptr<Device> kDevice = make_cuda_device(0);
  auto owners = std::make_shared<RowOwners>();
  for (int64_t t = 0; t <= kVocab; ++t) owners->offsets.push_back(t * 241);
  Table table;
  table.shape = {DType::kBFloat16, 2048, 1024, false};
  table.owners = std::move(owners);
  table.source = std::make_shared<RamTable>(bench.host, nullptr);
  PrefetchOptions options;
  options.ring_bytes = 2 * static_cast<int64_t>(kMostBytes);
  options.poison = false;
  const auto prefetcher = Prefetcher::create({table}, kDevice, options);
  std::vector<int32_t> ids(static_cast<size_t>(state.range(0)));
  run(state, bench.stream, 0, [&](int64_t) {
    for (int32_t& id : ids) {
      id = static_cast<int32_t>(bench.random() % static_cast<uint64_t>(kVocab));
    }
    Prefetcher::Step step = Prefetcher::begin(prefetcher, ids);
    step.wait(0, bench.stream);
    step.end(bench.stream);
  });
  state.SetBytesProcessed(prefetcher->ledger()->totals().bytes);
  state.SetLabel(copy_choice(*kDevice)->text);
}

// A benchmark that finds a device; the others skip.
template <void (*Run)(benchmark::State&)>
void on_cuda(benchmark::State& state) {
  if (cuda_devices().empty()) {
    state.SkipWithError("no CUDA device here");
    return;
  }
  Run(state);
}

BENCHMARK(on_cuda<copy>)
    ->Name("BM_CudaCopy")
    ->ArgNames({"way", "KiB", "count", "blocks"})
    ->ArgsProduct({{kLoop, kBatch}, {4, 12, 28, 64, 256, 1446}, {1, 8, 64}, {0}})
    ->ArgsProduct({{kKernel}, {4, 12, 28, 64, 256, 1446}, {1, 8, 64}, {4}})
    ->ArgsProduct({{kKernel}, {12, 256}, {64}, {1, 2, 8, 16}})
    ->UseManualTime()
    ->Iterations(50)
    ->Unit(benchmark::kMicrosecond);
BENCHMARK(on_cuda<fetch_step>)
    ->Name("BM_CudaFetchStep")
    ->ArgNames({"tokens", "blocks"})
    ->ArgsProduct({{1, 8, 64}, {2, 4, 8}})
    ->UseManualTime()
    ->Iterations(50)
    ->Unit(benchmark::kMicrosecond);
BENCHMARK(on_cuda<prefetch>)
    ->Name("BM_CudaPrefetch")
    ->ArgName("tokens")
    ->Arg(1)
    ->Arg(8)
    ->Arg(64)
    ->UseManualTime()
    ->Iterations(50)
    ->Unit(benchmark::kMicrosecond);

}  // namespace
