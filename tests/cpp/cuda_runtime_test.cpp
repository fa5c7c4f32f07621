// The runtime's CUDA device on a real one: copies, fences, pinned memory, the fetch kernels, and a
// prefetcher over all of it; small enough for compute-sanitizer. Skipped (exit code 77) where there
// is no device. What needs no device is tested by cuda_streams_test and cuda_fetch_test.
#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../benchmarks/cuda_memory.hpp"
#include "check.hpp"
#include "core/cuda_devices.hpp"
#include "runtime/cuda/copy_engines.hpp"
#include "runtime/cuda/fetch_blocks.hpp"
#include "runtime/cuda_device.hpp"
#include "runtime/graph_runtime.hpp"
#include "runtime_examples.hpp"

namespace {

using namespace l3ext;
using l3ext::bench::DeviceMemory;
using l3ext::bench::Memory;
using l3ext::bench::on_device;

bool contains(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}

struct Stream {
  Stream() { L3EXT_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking)); }
  ~Stream() { cudaStreamDestroy(stream); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  void synchronize() const { L3EXT_CUDA_CHECK(cudaStreamSynchronize(stream)); }
  cudaStream_t stream = nullptr;
};

std::vector<std::byte> to_host(const void* data, size_t bytes) {
  std::vector<std::byte> values(bytes);
  L3EXT_CUDA_CHECK(cudaMemcpy(values.data(), data, bytes, cudaMemcpyDeviceToHost));
  return values;
}

std::vector<std::byte> random_bytes(size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<std::byte> bytes(count);
  for (std::byte& b : bytes) b = static_cast<std::byte>(random());
  return bytes;
}

// All ways that this device and driver have.
std::vector<CopyChoice> choices() {
  std::vector<CopyChoice> ways(2);
  ways[1].kernel_below = size_t{1} << 40;
  if (cuda::has_batches()) ways.push_back({true, 3000, 2, {}});
  return ways;
}

// Blocks of odd sizes, in any order, a thousand times over the same rows: each copy waits for the
// reader of the one before.
void copies_and_their_order() {
  constexpr size_t kBytes = 100000;
  for (const CopyChoice& choice : choices()) {
    const auto device = make_cuda_device(0, choice);
    const auto queue = device->make_queue();
    const Stream stream;
    const DeviceBuffer rows(device, kBytes);
    const Memory seen = std::make_unique<DeviceMemory>(kBytes);
    const std::vector<std::byte> sources[] = {random_bytes(kBytes, 1), random_bytes(kBytes, 2)};
    const std::shared_ptr<void> pins[] = {device->pin(sources[0].data(), kBytes),
                                          device->pin(sources[1].data(), kBytes)};
    std::mt19937 random(3);
    FencePtr read;
    bool right = true;
    for (int round = 0; round < 50; ++round) {
      const std::vector<std::byte>& source = sources[round % 2];
      std::vector<Copy> copies;
      for (size_t at = 0; at < kBytes;) {
        const size_t bytes = std::min<size_t>(random() % 7000, kBytes - at);
        copies.push_back({rows.data() + at, source.data() + at, bytes});
        at += bytes;
      }
      std::shuffle(copies.begin(), copies.end(), random);
      queue->wait(read);
      queue->copy(copies);
      const FencePtr there = queue->record();
      device->wait(stream.stream, {&there, 1});
      L3EXT_CUDA_CHECK(cudaMemcpyAsync(seen->as<void>(), rows.data(), kBytes,
                                       cudaMemcpyDeviceToDevice, stream.stream));
      read = device->record(stream.stream);
      if (round % 10 == 0) {
        read->wait();
        right = right && to_host(seen->as<void>(), kBytes) == source;
      }
    }
    EXPECT(right);
    queue->fill(rows.data() + 5, 7, 100);
    queue->record()->wait();
    const auto filled = to_host(rows.data(), kBytes);
    EXPECT(std::all_of(filled.begin() + 5, filled.begin() + 105,
                       [](std::byte b) { return b == std::byte{7}; }));
  }
}

// A stream that has to wait says how long; the host does not wait for it.
void stalls_are_timed() {
  constexpr size_t kBytes = size_t{64} << 20;
  const auto device = make_cuda_device(0, CopyChoice{});
  const auto queue = device->make_queue();
  const Stream stream;
  const DeviceBuffer rows(device, kBytes);
  void* staging = device->allocate_staging(kBytes);
  for (int i = 0; i < 4; ++i) {
    const Copy copy[] = {{rows.data(), staging, kBytes}};
    queue->copy(copy);
  }
  const FencePtr there = queue->record();
  const auto stall = device->wait(stream.stream, {&there, 1});
  EXPECT(stall != nullptr);
  stream.synchronize();
  EXPECT(there->passed());
  EXPECT(stall != nullptr &&
         stall->ns().value_or(0) > 100000);  // 256 MB: no link does it in 0.1 ms
  EXPECT(device->wait(stream.stream, {&there, 1}) == nullptr);
  device->deallocate_staging(staging, kBytes);
}

void memory_is_pinned() {
  const auto device = make_cuda_device(0, CopyChoice{});
  const DeviceBuffer rows(device, 8192);
  const auto queue = device->make_queue();
  void* mapped = ::mmap(nullptr, 8192, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  try {
    const auto pin = device->pin(mapped, 8192), again = device->pin(mapped, 4096);
    const Copy copy[] = {{rows.data(), mapped, 8192}};
    queue->copy(copy);
    queue->record()->wait();
    EXPECT(to_host(rows.data(), 8192) == std::vector<std::byte>(8192));
  } catch (const Error& error) {  // where CUDA cannot pin what is mapped to be read
    EXPECT(contains(error.what(), "cannot pin 8192 bytes"));
  }
  ::munmap(mapped, 8192);

  std::vector<std::byte> own(5000);
  L3EXT_CUDA_CHECK(cudaHostRegister(own.data(), own.size(), 0));
  EXPECT(device->pin(own.data(), own.size()) != nullptr);
  L3EXT_CUDA_CHECK(cudaHostUnregister(own.data()));

  // Two tables in one page: CUDA says of the second that it is pinned, or refuses to pin it.
  void* page = ::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  {
    const auto first = device->pin(page, 100);
    const auto* second = static_cast<const std::byte*>(page) + 200;
    try {
      EXPECT(device->pin(second, 100) != nullptr);
      std::printf("       the second table of a pinned page counts as pinned\n");
    } catch (const Error& error) {
      EXPECT(contains(error.what(), "with whole pages of its own"));
      std::printf("       the second table of a pinned page is refused\n");
    }
  }
  ::munmap(page, 4096);
  EXPECT(contains(EXPECT_THROWS(Error, device->allocate(size_t{1} << 46)), "are free"));
  const DeviceBuffer still_works(device, 100);
}

void a_device_measures_its_copies() {
  const auto device = make_cuda_device(0);
  std::printf("       %s\n", copy_choice(*device)->text.c_str());
  EXPECT(contains(copy_choice(*device)->text, "GB/s"));
}

// Another thread's capture, in the mode of torch, survives a worker, and the worker the capture.
void workers_beside_a_capture() {
  const auto device = make_cuda_device(0, CopyChoice{});
  const Stream stream;
  const std::vector<std::byte> source = random_bytes(5000, 1);
  const auto pin = device->pin(source.data(), source.size());
  const Memory target = std::make_unique<DeviceMemory>(5000);
  std::vector<std::byte> seen;
  L3EXT_CUDA_CHECK(cudaStreamBeginCapture(stream.stream, cudaStreamCaptureModeGlobal));
  std::thread worker([&] {
    const auto queue = device->make_queue();
    const DeviceBuffer rows(device, 5000);
    const Copy copy[] = {{rows.data(), source.data(), source.size()}};
    queue->copy(copy);
    const FencePtr fence = queue->record();
    fence->passed();
    fence->wait();
    void* staging = device->allocate_staging(5000);
    device->deallocate_staging(staging, 5000);
  });
  worker.join();
  L3EXT_CUDA_CHECK(cudaMemsetAsync(target->as<void>(), 5, 5000, stream.stream));
  const FencePtr none;
  EXPECT(contains(EXPECT_THROWS(Error, device->record(stream.stream)), "captures no graph"));
  EXPECT_THROWS(Error, device->wait(stream.stream, {&none, 1}));
  cudaGraph_t graph = nullptr;
  EXPECT(cudaStreamEndCapture(stream.stream, &graph) == cudaSuccess && graph != nullptr);
  cudaGraphDestroy(graph);
}

// --- the kernels
void blocks_of_any_size_and_alignment() {
  const auto device = make_cuda_device(0, CopyChoice{});
  const std::vector<std::byte> source = random_bytes(400000, 4);
  const auto pin = device->pin(source.data(), source.size());
  const DeviceBuffer rows(device, 400000);
  L3EXT_CUDA_CHECK(cudaMemset(rows.data(), 0xff, 400000));
  std::vector<std::byte> expected(400000, std::byte{0xff});
  std::vector<Copy> copies;
  std::mt19937 random(5);
  for (size_t at = 0; at < 390000;) {
    const size_t bytes = random() % 5000, from = random() % 390000;
    copies.push_back({rows.data() + at, source.data() + from, bytes});
    std::copy_n(source.begin() + static_cast<std::ptrdiff_t>(from), bytes,
                expected.begin() + static_cast<std::ptrdiff_t>(at));
    at += bytes + random() % 20;
  }
  for (const int blocks : {1, 4}) {
    cuda::fetch_blocks(copies, blocks, nullptr);
    EXPECT(to_host(rows.data(), 400000) == expected);
  }
}

// A graph of fetch_step, replayed for other ids: rows are where the directory says, in the ring or,
// where that is full, in host memory, read at the address that the device has.
void a_captured_step() {
  constexpr int64_t kVocab = 100, kTokens = 40;
  const auto device = make_cuda_device(0, CopyChoice{});
  const std::vector<std::byte> table = random_bytes(kVocab * 3000, 6);
  const auto pin = device->pin(table.data(), table.size());
  std::vector<int64_t> resident(kVocab), sources(kVocab), bytes(kVocab);
  for (int64_t t = 0; t < kVocab; ++t) {
    resident[t] = t % 10 == 0 ? 4096 * (t + 1) : 0;
    sources[t] = static_cast<int64_t>(reinterpret_cast<uintptr_t>(table.data())) + 3000 * t;
    bytes[t] = 3000 - t;
  }
  for (const int64_t ring_bytes : {int64_t{kTokens * 3008}, int64_t{20000}}) {
    const Memory ring = std::make_unique<DeviceMemory>(ring_bytes);
    const Memory resident_on = on_device(resident.data(), kVocab);
    const Memory sources_on = on_device(sources.data(), kVocab);
    const Memory bytes_on = on_device(bytes.data(), kVocab);
    const Memory directory = std::make_unique<DeviceMemory>(8 * kVocab);
    L3EXT_CUDA_CHECK(cudaMemset(directory->as<void>(), 0, 8 * kVocab));
    const Memory tokens = std::make_unique<DeviceMemory>(4 * kTokens);
    const Memory count = std::make_unique<DeviceMemory>(4);
    const int64_t workspace_bytes = cuda::fetch_step_workspace(kTokens);
    const Memory workspace = std::make_unique<DeviceMemory>(workspace_bytes);
    cuda::FetchStepParams params;
    params.tokens = tokens->as<int32_t>();
    params.num_tokens = count->as<int32_t>();
    params.most_tokens = kTokens;
    params.vocab_size = kVocab;
    params.resident = resident_on->as<int64_t>();
    params.sources = sources_on->as<int64_t>();
    params.source_bytes = bytes_on->as<int64_t>();
    params.ring = ring->as<std::byte>();
    params.ring_bytes = ring_bytes;
    params.directory = directory->as<int64_t>();

    const Stream stream;
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t replay = nullptr;
    L3EXT_CUDA_CHECK(cudaStreamBeginCapture(stream.stream, cudaStreamCaptureModeGlobal));
    cuda::fetch_step(params, workspace->as<void>(), workspace_bytes, stream.stream);
    L3EXT_CUDA_CHECK(cudaStreamEndCapture(stream.stream, &graph));
    L3EXT_CUDA_CHECK(cudaGraphInstantiate(&replay, graph, 0));
    bool right = true;
    for (unsigned step = 0; step < 4; ++step) {
      std::mt19937 random(step);
      std::vector<int32_t> ids(step == 3 ? 0 : kTokens);
      for (int32_t& id : ids) id = static_cast<int32_t>(random() % kVocab);
      std::sort(ids.begin(), ids.end());
      const auto number = static_cast<int32_t>(ids.size());
      L3EXT_CUDA_CHECK(
          cudaMemcpy(tokens->as<void>(), ids.data(), 4 * ids.size(), cudaMemcpyHostToDevice));
      L3EXT_CUDA_CHECK(cudaMemcpy(count->as<void>(), &number, 4, cudaMemcpyHostToDevice));
      L3EXT_CUDA_CHECK(cudaGraphLaunch(replay, stream.stream));
      stream.synchronize();
      std::vector<int64_t> places(kVocab);
      L3EXT_CUDA_CHECK(
          cudaMemcpy(places.data(), directory->as<void>(), 8 * kVocab, cudaMemcpyDeviceToHost));
      int64_t begin = 0;
      ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
      for (const int32_t id : ids) {
        if (resident[id] != 0) {
          right = right && places[id] == resident[id];
          continue;
        }
        if (begin + bytes[id] > ring_bytes) {
          right = right && places[id] == sources[id];
        } else {
          const std::byte* slot = ring->as<std::byte>() + begin;
          const auto rows = to_host(slot, static_cast<size_t>(bytes[id]));
          right = right && places[id] == static_cast<int64_t>(reinterpret_cast<uintptr_t>(slot)) &&
                  std::equal(rows.begin(), rows.end(), table.begin() + 3000 * id);
        }
        begin += (bytes[id] + 15) / 16 * 16;
      }
    }
    EXPECT(right);
    cudaGraphExecDestroy(replay);
    cudaGraphDestroy(graph);
  }
}

// --- all of it
// A graph of two layers' fetches, forked and joined, replayed for other ids: in the hot set, in the
// ring, and where that is full or absent in host memory.
void a_graph_runtime_in_a_graph() {
  using namespace examples;
  constexpr int64_t kVocab = 200, kTokens = 40;
  const Example tables[] = {make_example(kVocab, 20, 64, 64, 1),
                            make_example(kVocab, 9, 64, 128, 2)};
  const auto device = make_cuda_device(0, CopyChoice{});
  for (const GraphOptions& options :
       {GraphOptions{.cache_bytes = 100000}, {.ring_bytes = 100000}, {.ring_bytes = 0}}) {
    GraphRuntime runtime({ram_table(tables[0]), ram_table(tables[1])}, device, options);
    const Memory tokens = std::make_unique<DeviceMemory>(4 * kTokens);
    const Memory count = std::make_unique<DeviceMemory>(4);
    const Memory seen[] = {std::make_unique<DeviceMemory>(8 * kVocab),
                           std::make_unique<DeviceMemory>(8 * kVocab)};
    const Stream stream;
    const char step = 0;
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t replay = nullptr;
    L3EXT_CUDA_CHECK(cudaStreamBeginCapture(stream.stream, cudaStreamCaptureModeGlobal));
    runtime.begin(tokens->as<int32_t>(), count->as<int32_t>(), kTokens, &step, stream.stream);
    for (int layer = 0; layer < 2; ++layer) {
      runtime.wait(layer, &step, stream.stream);
      L3EXT_CUDA_CHECK(cudaMemcpyAsync(seen[layer]->as<void>(), runtime.directory(layer)->data(),
                                       8 * kVocab, cudaMemcpyDeviceToDevice, stream.stream));
    }
    runtime.end(&step, stream.stream);
    L3EXT_CUDA_CHECK(cudaStreamEndCapture(stream.stream, &graph));
    L3EXT_CUDA_CHECK(cudaGraphInstantiate(&replay, graph, 0));
    bool right = true;
    for (unsigned seed = 0; seed < 4; ++seed) {
      std::mt19937 random(seed);
      std::vector<int32_t> ids(kTokens);
      for (int32_t& id : ids) id = static_cast<int32_t>(random() % kVocab);
      std::ranges::sort(ids);
      ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
      const auto number = static_cast<int32_t>(ids.size());
      L3EXT_CUDA_CHECK(
          cudaMemcpy(tokens->as<void>(), ids.data(), 4 * ids.size(), cudaMemcpyHostToDevice));
      L3EXT_CUDA_CHECK(cudaMemcpy(count->as<void>(), &number, 4, cudaMemcpyHostToDevice));
      L3EXT_CUDA_CHECK(cudaGraphLaunch(replay, stream.stream));
      stream.synchronize();
      for (int layer = 0; layer < 2; ++layer) {
        const Example& table = tables[layer];
        std::vector<int64_t> places(kVocab);
        L3EXT_CUDA_CHECK(
            cudaMemcpy(places.data(), seen[layer]->as<void>(), 8 * kVocab, cudaMemcpyDeviceToHost));
        for (const int32_t id : ids) {
          const int64_t bytes = table.owners->rows(id) * table.shape.row_bytes();
          std::vector<std::byte> rows(static_cast<size_t>(bytes));
          // NOLINTNEXTLINE(performance-no-int-to-ptr): a directory holds addresses
          const auto* there = reinterpret_cast<const void*>(places[id]);
          L3EXT_CUDA_CHECK(cudaMemcpy(rows.data(), there, rows.size(), cudaMemcpyDefault));
          right =
              right && std::memcmp(rows.data(),
                                   table.rows.data() + table.owners->offsets[id] * table.width(),
                                   rows.size()) == 0;
        }
      }
    }
    EXPECT(right);
    cudaGraphExecDestroy(replay);
    cudaGraphDestroy(graph);
  }
}

void a_prefetcher_serves_a_stream() {
  using namespace examples;
  const Example example = make_example(200, 20, 64, 64, 1);
  const auto device = make_cuda_device(0);
  PrefetchOptions options;
  options.ring_bytes = 300 * example.shape.row_bytes();
  options.cache_bytes = 100 * example.shape.row_bytes();
  const auto prefetcher =
      Prefetcher::create({ram_table(example), ram_table(example)}, device, options);
  const Stream stream;
  std::mt19937 random(3);
  bool right = true;
  for (int i = 0; i < 100; ++i) {
    auto step = Prefetcher::begin(prefetcher, random_ids(random, 200, 20));
    std::vector<std::unique_ptr<DeviceMemory>> copies;  // what the stream read, and when
    std::vector<std::vector<float>> expected;
    for (int64_t layer = 0; layer < 2; ++layer) {
      step.wait(layer, stream.stream);
      std::vector<int64_t> rows(2 * step.tokens().size());
      step.segment_rows(layer, rows.data());
      const auto buffer = step.rows(layer);
      const int64_t row_bytes = example.shape.row_bytes();
      for (size_t s = 0; s < step.tokens().size(); ++s) {
        const int64_t count = rows[2 * s + 1] - rows[2 * s];
        const float* begin =
            example.rows.data() + example.owners->offsets[step.tokens()[s]] * example.width();
        expected.emplace_back(begin, begin + count * example.width());
        copies.push_back(std::make_unique<DeviceMemory>(count * row_bytes));
        L3EXT_CUDA_CHECK(cudaMemcpyAsync(
            copies.back()->as<void>(), buffer->data() + rows[2 * s] * row_bytes,
            static_cast<size_t>(count * row_bytes), cudaMemcpyDeviceToDevice, stream.stream));
      }
    }
    step.end(stream.stream);
    stream.synchronize();
    for (size_t c = 0; c < copies.size(); ++c) {
      const auto got = to_host(copies[c]->as<void>(), expected[c].size() * sizeof(float));
      right = right && std::memcmp(got.data(), expected[c].data(), got.size()) == 0;
    }
  }
  EXPECT(right);
}

}  // namespace

int main() {
  if (l3ext::cuda_devices().empty()) {
    std::puts("skipped: no CUDA device here");
    return 77;
  }
  RUN(copies_and_their_order);
  RUN(stalls_are_timed);
  RUN(memory_is_pinned);
  RUN(a_device_measures_its_copies);
  RUN(workers_beside_a_capture);
  RUN(blocks_of_any_size_and_alignment);
  RUN(a_captured_step);
  RUN(a_graph_runtime_in_a_graph);
  RUN(a_prefetcher_serves_a_stream);
  return check::failures == 0 ? 0 : 1;
}
