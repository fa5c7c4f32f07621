// Steps that a graph holds, on the fake CUDA runtime, whose streams and graphs do their work late
// and in random order, and on the host. The kernels' twin fetches; cuda_fetch_test compares them.
#include "runtime/graph_runtime.hpp"

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"
#include "core/cuda/check.hpp"
#include "core/error.hpp"
#include "fake_cudart.hpp"
#include "runtime/cuda/fetch_blocks.hpp"
#include "runtime/cuda_device.hpp"
#include "runtime_examples.hpp"

namespace l3ext::cuda {

int unpinned_reads = 0;

// In the place of the kernels, which the fake runtime cannot run.
void fetch_blocks(std::span<const Copy>, int, void*) {}
int64_t fetch_step_workspace(int64_t most_tokens) { return 16 + 24 * most_tokens; }
void fetch_step(const FetchStepParams& params, void*, int64_t workspace_bytes, void* stream) {
  EXPECT(workspace_bytes >= fetch_step_workspace(params.most_tokens));
  fake_cudart::run(static_cast<cudaStream_t>(stream), [params] {
    for (int64_t i = 0; i < std::min<int64_t>(*params.num_tokens, params.most_tokens); ++i) {
      const int32_t token = params.tokens[i];
      if (token < 0 || params.sources[token] == 0) continue;
      cudaPointerAttributes attributes = {};
      // NOLINTNEXTLINE(performance-no-int-to-ptr): an address
      cudaPointerGetAttributes(&attributes, reinterpret_cast<void*>(params.sources[token]));
      unpinned_reads += attributes.type != cudaMemoryTypeHost;
    }
    fetch_step_on_host(params);
  });
}

}  // namespace l3ext::cuda

namespace {

using namespace l3ext;
using namespace examples;

constexpr int64_t kVocab = 60;

bool contains(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}

struct Stream {
  Stream() { L3EXT_CUDA_CHECK(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, 0)); }
  ~Stream() { cudaStreamDestroy(stream); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  cudaStream_t stream = nullptr;
};

// A step's tokens where the device reads them, as a plan names them: ascending, invalid ones last.
struct Tokens {
  static constexpr int64_t kMost = kVocab + 2;
  std::vector<int32_t> ids = std::vector<int32_t>(kMost);
  int32_t count = 0;

  void draw(unsigned seed, size_t most) {
    std::mt19937 random(seed);
    std::vector<int32_t> drawn(most);
    for (int32_t& id : drawn) id = static_cast<int32_t>(random() % kVocab);
    std::sort(drawn.begin(), drawn.end());
    drawn.erase(std::unique(drawn.begin(), drawn.end()), drawn.end());
    drawn.push_back(-1);
    count = static_cast<int32_t>(drawn.size());
    std::copy(drawn.begin(), drawn.end(), ids.begin());
  }
};

// Two layers of different tables over one runtime, and attention that only looks at rows.
struct Fixture {
  Example tables[2] = {make_example(kVocab, 5, 8, 8, 1), make_example(kVocab, 9, 12, 4, 2)};
  Tokens tokens;
  std::unique_ptr<GraphRuntime> runtime;
  const int64_t* directories[2] = {};
  int64_t right = 0, wrong = 0;

  Fixture(std::shared_ptr<Device> device, const GraphOptions& options) {
    runtime = std::make_unique<GraphRuntime>(
        std::vector<Table>{ram_table(tables[0]), ram_table(tables[1])}, std::move(device), options);
    for (int layer = 0; layer < 2; ++layer) {
      directories[layer] = reinterpret_cast<const int64_t*>(runtime->directory(layer)->data());
    }
  }

  // Reads rows where the directory says, when its turn comes.
  void attend(int64_t layer) {
    const Example& table = tables[layer];
    const int64_t* directory = directories[layer];
    for (int32_t i = 0; i < tokens.count; ++i) {
      const int32_t token = tokens.ids[i];
      if (token < 0) continue;
      const float* rows = table.rows.data() + table.owners->offsets[token] * table.width();
      const auto bytes = static_cast<size_t>(table.owners->rows(token) * table.shape.row_bytes());
      // NOLINTNEXTLINE(performance-no-int-to-ptr): an address
      const auto* there = reinterpret_cast<const void*>(directory[token]);
      const bool same = there != nullptr && std::memcmp(there, rows, bytes) == 0;
      ++(same ? right : wrong);
    }
  }
  // `layers`: how many are attended to.
  void step(cudaStream_t stream, int layers = 2, bool end = true) {
    const void* name = &name_of_steps[++steps % 2];
    runtime->begin(tokens.ids.data(), &tokens.count, Tokens::kMost, name, stream);
    for (int layer = 0; layer < layers; ++layer) {
      runtime->wait(layer, name, stream);
      fake_cudart::run(stream, [this, layer] { attend(layer); });
    }
    if (end) runtime->end(name, stream);
  }
  std::vector<int64_t> counters() const {
    const auto* begin = reinterpret_cast<const int64_t*>(runtime->counters()->data());
    return {begin, begin + 8};
  }
  int64_t bytes(int layer) const {
    return tables[layer].owners->total_rows() * tables[layer].shape.row_bytes();
  }

  char name_of_steps[2] = {};
  size_t steps = 0;
};

void without_faults(const fake_cudart::Options& options, void (*test)()) {
  fake_cudart::reset(options);
  cuda::unpinned_reads = 0;
  test();
  fake_cudart::finish_all();
  const auto counts = fake_cudart::counts();
  EXPECT(counts.events == 0 && counts.allocations == 0 && counts.registrations == 0);
  EXPECT(counts.streams == 0 && cuda::unpinned_reads == 0);
  for (const std::string& fault : fake_cudart::take_faults()) {
    std::fprintf(stderr, "%s\n", fault.c_str());
    EXPECT(fault.empty());
  }
}
template <void (*Test)()>
void checked() {
  for (uint64_t seed = 0; seed < 20; ++seed) without_faults({.seed = seed}, Test);
}

// Rings for all, for some and for none of a step's rows, with and without a hot set.
const GraphOptions kOptions[] = {{},
                                 {.cache_bytes = 4000},
                                 {.ring_bytes = 3000},
                                 {.ring_bytes = 0},
                                 {.cache_bytes = 2000, .ring_bytes = 2000}};

void check_counters(const Fixture& fixture, const GraphOptions& options) {
  const std::vector<int64_t> counters = fixture.counters();
  for (int layer = 0; layer < 2; ++layer) {
    const int64_t* counts = counters.data() + 4 * layer;
    EXPECT((counts[0] > 0) == (options.cache_bytes > 0));
    EXPECT((counts[1] > 0) == (options.ring_bytes > 0) && (counts[2] > 0) == (counts[1] > 0));
    EXPECT((counts[3] > 0) == (options.ring_bytes < 10000));
  }
  EXPECT(counters[0] + counters[1] + counters[3] + counters[4] + counters[5] + counters[7] ==
         fixture.right);
}

// Steps follow each other at once, and the ids of each are there when the device reads them.
void steps_on_a_stream() {
  for (const GraphOptions& options : kOptions) {
    Fixture fixture(make_cuda_device(0, CopyChoice{}), options);
    const Stream own;
    for (const cudaStream_t stream : {own.stream, cudaStream_t{nullptr}}) {
      for (unsigned i = 0; i < 5; ++i) {
        fake_cudart::run(stream, [&, i] { fixture.tokens.draw(i, 5 + 10 * i); });
        fixture.step(stream);
      }
      fake_cudart::finish_all();
    }
    EXPECT(fixture.wrong == 0 && fixture.right > 200);
    check_counters(fixture, options);
  }
}

// What was captured once serves unrelated ids, beside steps that are not captured.
void a_graph_of_a_step() {
  for (const GraphOptions& options : kOptions) {
    Fixture fixture(make_cuda_device(0, CopyChoice{}), options);
    const Stream stream;
    fixture.tokens.draw(9, 30);
    fixture.step(stream.stream);  // as one warms up
    fake_cudart::begin_capture(stream.stream);
    fixture.step(stream.stream);
    const auto graph = fake_cudart::end_capture(stream.stream);
    EXPECT(graph != nullptr);
    if (graph == nullptr) return;
    for (unsigned i = 0; i < 4; ++i) {
      fake_cudart::run(stream.stream, [&, i] { fixture.tokens.draw(i, 40); });
      fake_cudart::replay(graph, stream.stream);
      if (i == 1) fixture.step(stream.stream);
    }
    fake_cudart::finish_all();
    EXPECT(fixture.wrong == 0 && fixture.right > 200);
    check_counters(fixture, options);
  }
}

// Layers that nobody attends to are joined by end(), or a capture would be refused.
void a_capture_without_attention() {
  Fixture fixture(make_cuda_device(0, CopyChoice{}), {});
  const Stream stream;
  for (const int layers : {0, 1}) {
    fake_cudart::begin_capture(stream.stream);
    fixture.step(stream.stream, layers);
    EXPECT(fake_cudart::end_capture(stream.stream) != nullptr);
  }
  fake_cudart::begin_capture(stream.stream);
  fixture.step(stream.stream, 1, false);
  EXPECT(fake_cudart::end_capture(stream.stream) == nullptr);
  const auto faults = fake_cudart::take_faults();
  EXPECT(faults.size() == 1 && contains(faults[0], "without a stream that it forked"));
  fake_cudart::begin_capture(stream.stream);  // the last layer is enough
  fixture.step(stream.stream, 2, false);
  EXPECT(fake_cudart::end_capture(stream.stream) != nullptr);
}

// Layers in another order, one of them twice, or none: the host never waits and makes nothing.
void a_step_costs_the_host_nothing() {
  Fixture fixture(make_cuda_device(1, CopyChoice{}), {});
  const Stream stream;
  fixture.tokens.draw(1, 10);
  const auto before = fake_cudart::counts();
  for (int i = 0; i < 10; ++i) {
    char name = 0;
    fixture.runtime->begin(fixture.tokens.ids.data(), &fixture.tokens.count, Tokens::kMost, &name,
                           nullptr);
    for (const int64_t layer : {1, 0, 1}) fixture.runtime->wait(layer, &name, nullptr);
    fake_cudart::run(nullptr, [&] { fixture.attend(0); });
    fixture.runtime->end(&name, nullptr);
    fixture.runtime->end(&name, nullptr);
  }
  const auto after = fake_cudart::counts();
  EXPECT(after.host_waits == before.host_waits && after.events_made == before.events_made);
  EXPECT(after.allocations == before.allocations && after.streams == before.streams);
  int current = -1;
  EXPECT(cudaGetDevice(&current) == cudaSuccess && current == 0);
  fake_cudart::finish_all();
}

void memory_is_gone_when_the_work_is_done() {
  auto fixture = std::make_unique<Fixture>(make_cuda_device(0, CopyChoice{}), GraphOptions{});
  fixture->tokens.draw(1, 30);
  fixture->step(nullptr);
  fixture->runtime.reset();  // with the step on its way: freeing waits for it
  EXPECT(fake_cudart::counts().registrations == 0);
  EXPECT(fixture->wrong == 0 && fixture->right > 0);
}

void the_host_is_the_twin() {
  for (const bool in_place : {false, true}) {
    for (GraphOptions options : kOptions) {
      options.in_place = in_place;
      Fixture fixture(std::make_shared<HostDevice>(), options);
      for (unsigned i = 0; i < 5; ++i) {
        fixture.tokens.draw(i, 10 * i);
        char name = 0;
        fixture.runtime->begin(fixture.tokens.ids.data(), &fixture.tokens.count, Tokens::kMost,
                               &name, nullptr);
        for (int64_t layer = 0; layer < 2; ++layer) {
          fixture.runtime->wait(layer, &name, nullptr);
          fixture.attend(layer);
        }
        fixture.runtime->end(&name, nullptr);
      }
      EXPECT(fixture.wrong == 0 && fixture.right > 100);
      const auto& place = fixture.runtime->placement();
      EXPECT(place[0].in_place == in_place && place[0].table_bytes == fixture.bytes(0));
      if (in_place) {
        EXPECT(fixture.counters()[0] + fixture.counters()[4] == fixture.right);
        EXPECT(place[0].ring_bytes == 0 && place[0].hot_bytes == 0);
      } else {
        check_counters(fixture, options);
        EXPECT(place[1].ring_bytes <= fixture.bytes(1) + 16 * kVocab);
      }
    }
  }
}

void an_earlier_step_is_refused() {
  Fixture fixture(std::make_shared<HostDevice>(), {});
  fixture.tokens.draw(1, 3);
  char first = 0, second = 0;
  GraphRuntime& runtime = *fixture.runtime;
  EXPECT_THROWS(Error, runtime.wait(0, &first, nullptr));
  EXPECT_THROWS(Error, runtime.wait(0, nullptr, nullptr));
  const auto begin = [&](const void* name) {
    runtime.begin(fixture.tokens.ids.data(), &fixture.tokens.count, Tokens::kMost, name, nullptr);
  };
  begin(&first);
  begin(&second);
  EXPECT(contains(EXPECT_THROWS(Error, runtime.wait(0, &first, nullptr)), "an earlier one"));
  runtime.end(&first, nullptr);  // of a step that is over: nothing
  runtime.wait(1, &second, nullptr);
  runtime.end(&second, nullptr);
  EXPECT_THROWS(Error, runtime.wait(0, &second, nullptr));
  EXPECT(contains(EXPECT_THROWS(Error, runtime.wait(2, &second, nullptr)), "layer: expected 0"));
  EXPECT_THROWS(Error, runtime.directory(-1));
}

void tables_that_no_kernel_can_read() {
  const auto device = make_cuda_device(0, CopyChoice{});
  const auto refused = [&](const Table& table, const GraphOptions& options = {}) {
    return EXPECT_THROWS(Error, GraphRuntime({table}, device, options));
  };
  Example example = make_example(kVocab, 5, 8, 8, 1);
  struct File final : BlockingTable {
    const std::byte* read(int64_t, int64_t, std::byte*) override { return nullptr; }
    Error corrupt(int64_t, const std::string& what) const override {
      return Error::io("", 0, what);
    }
  };
  EXPECT(contains(refused(table_over(example, std::make_shared<File>())),
                  "tables[0]: expected a "
                  "table in host memory"));
  EXPECT(contains(
      refused(table_over(example, std::make_shared<RamTable>(example.rows.data() + 1, nullptr))),
      "tables[0]: expected rows aligned to 16 bytes for cuda:0"));
  Table odd = ram_table(make_example(kVocab, 5, 8, 7, 1));
  EXPECT(contains(refused(odd), "got rows of 60 bytes"));
  Table quantized = ram_table(example);
  quantized.shape.dtype = DType::kInt8;
  EXPECT(contains(refused(quantized), "expected float32, bfloat16 or float16 on cuda:0, got int8"));
  EXPECT(contains(refused(ram_table(example), {.cache_bytes = -1}), "cache_bytes"));
  EXPECT(contains(refused(ram_table(example), {.ring_bytes = -1}), "ring_bytes"));
  EXPECT(contains(refused(ram_table(example), {.fetch_blocks = 0}), "fetch_blocks"));
  EXPECT(contains(EXPECT_THROWS(Error, GraphRuntime({}, device, {})), "at least one"));
  const Example other = make_example(kVocab + 1, 5, 8, 8, 1);
  EXPECT(contains(
      EXPECT_THROWS(Error, GraphRuntime({ram_table(example), ram_table(other)}, device, {})),
      "tables[1]: expected a vocabulary of 60"));
}

void devices_that_cannot_read_the_host() {
  const Example example = make_example(kVocab, 5, 8, 8, 1);
  const auto device = make_cuda_device(0, CopyChoice{});
  EXPECT(contains(EXPECT_THROWS(Error, GraphRuntime({ram_table(example)}, device, {})),
                  "expected one whose kernels read host memory, got cuda:0"));
}

void memory_that_cannot_be_pinned() {
  const Example example = make_example(kVocab, 5, 8, 8, 1);
  const auto device = make_cuda_device(0, CopyChoice{});
  EXPECT(
      contains(EXPECT_THROWS(Error, GraphRuntime({ram_table(example)}, device, {})), "cannot pin"));
}

// Tokens without rows have an address all the same: 0 would say that rows are missing.
void tokens_without_rows() {
  Example example = make_example(kVocab, 5, 8, 8, 1);
  auto& offsets = example.owners->offsets;
  for (size_t t = 20; t < offsets.size(); ++t) offsets[t] = offsets[20];
  example.rows.resize(offsets.back() * example.width());
  for (const bool in_place : {false, true}) {
    GraphRuntime runtime({ram_table(example)}, std::make_shared<HostDevice>(),
                         {.cache_bytes = 1000, .ring_bytes = 1000, .in_place = in_place});
    const int32_t tokens[] = {3, 30, 59}, count = 3;
    runtime.begin(tokens, &count, 3, tokens, nullptr);
    const auto* directory = reinterpret_cast<const int64_t*>(runtime.directory(0)->data());
    for (const int32_t token : tokens) EXPECT(directory[token] != 0);
    runtime.end(tokens, nullptr);
  }
}

}  // namespace

int main() {
  RUN(checked<steps_on_a_stream>);
  RUN(checked<a_graph_of_a_step>);
  RUN(checked<a_capture_without_attention>);
  RUN(checked<a_step_costs_the_host_nothing>);
  RUN(checked<memory_is_gone_when_the_work_is_done>);
  RUN(the_host_is_the_twin);
  RUN(an_earlier_step_is_refused);
  RUN(([] { without_faults({}, tables_that_no_kernel_can_read); }));
  RUN(([] { without_faults({.host_pointers = false}, devices_that_cannot_read_the_host); }));
  RUN(([] { without_faults({.lockable = 100}, memory_that_cannot_be_pinned); }));
  RUN(tokens_without_rows);
  return check::failures == 0 ? 0 : 1;
}
