// The kernels that fetch rows, on the emulated device, against plain loops on the host.
#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "device_buffer.hpp"
#include "run_kernel.hpp"
#include "runtime/cuda/fetch_blocks.hpp"

namespace {

namespace cuda = l3ext::cuda;
using cuda::FetchStepParams;
using l3ext::Copy;
using l3ext::Error;

std::vector<std::byte> random_bytes(size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<std::byte> bytes(count);
  for (std::byte& b : bytes) b = static_cast<std::byte>(random());
  return bytes;
}

// --- fetch_blocks
// Any sizes, any alignment of both sides, nothing beside the targets.
void copies_of_any_size_and_alignment() {
  const std::vector<std::byte> content = random_bytes(30000, 1);
  DeviceBuffer<std::byte> source(content);
  for (const int blocks : {1, 3}) {
    for (const size_t bytes : {0, 1, 15, 16, 17, 31, 511, 2047, 2048, 2049, 2064, 9999}) {
      for (const size_t from : {0, 1, 8, 15}) {
        for (const size_t to : {0, 1, 8, 15}) {
          DeviceBuffer<std::byte> target(12000);
          const Copy copy[] = {{target.data() + to, source.data() + from, bytes}};
          cuda::fetch_blocks(copy, blocks, nullptr);
          const std::byte poison{0xff};
          EXPECT(std::equal(content.begin() + from, content.begin() + from + bytes,
                            target.data() + to));
          EXPECT(std::all_of(target.data(), target.data() + to,
                             [&](std::byte b) { return b == poison; }));
          EXPECT(std::all_of(target.data() + to + bytes, target.data() + 12000,
                             [&](std::byte b) { return b == poison; }));
        }
      }
    }
  }
}

// More than one launch holds, of sizes that are no pieces.
void many_copies() {
  for (const int count : {0, 1, 127, 128, 129, 300}) {
    std::mt19937 random(static_cast<unsigned>(count));
    std::vector<size_t> begins = {0};
    for (int i = 0; i < count; ++i) begins.push_back(begins.back() + random() % 5000);
    const std::vector<std::byte> content = random_bytes(begins.back(), 2);
    DeviceBuffer<std::byte> source(content);
    DeviceBuffer<std::byte> target(static_cast<int64_t>(begins.back()));
    std::vector<Copy> copies;
    for (int i = 0; i < count; ++i) {
      copies.push_back(
          {target.data() + begins[i], source.data() + begins[i], begins[i + 1] - begins[i]});
    }
    std::shuffle(copies.begin(), copies.end(), random);
    cuda::fetch_blocks(copies, 2, nullptr);
    EXPECT(target.values() == content);
  }
}

// --- fetch_step
// A vocabulary: some tokens resident, some in host memory, some without rows.
struct Step {
  static constexpr int64_t kVocab = 200;
  std::vector<std::byte> host;
  std::vector<int64_t> resident, sources, bytes;
  DeviceBuffer<int64_t> directory{kVocab}, counters{4};
  std::vector<int32_t> tokens;
  int64_t ring_bytes = 0;
  int blocks = 2;
  bool on_host = false;  // by the kernels' twin
  std::unique_ptr<DeviceBuffer<std::byte>> ring;

  // `hot`: of a hundred tokens. `odd`: rows of any size at any address, else multiples of 16 bytes.
  Step(unsigned seed, unsigned hot, bool odd) : host(random_bytes(900000, seed)) {
    std::mt19937 random(seed);
    size_t at = 16 - reinterpret_cast<uintptr_t>(host.data()) % 16;
    for (int64_t t = 0; t < kVocab; ++t) {
      const size_t size = odd ? random() % 4000 : 16 * (random() % 250);
      const bool is_hot = random() % 100 < hot, absent = random() % 20 == 0;
      resident.push_back(is_hot ? 4096 + 16 * t : 0);
      sources.push_back(
          absent ? 0 : static_cast<int64_t>(reinterpret_cast<uintptr_t>(host.data() + at)));
      bytes.push_back(static_cast<int64_t>(size));
      at += size + (odd ? random() % 3 : 0);
    }
    for (int i = 0; i < 4; ++i) counters[i] = 0;
  }

  // Ascending, as a plan has them; repeats stay.
  void set_tokens(std::vector<int32_t> ids) {
    std::sort(ids.begin(), ids.end());
    tokens = std::move(ids);
  }
  int64_t slot(int32_t token) const { return (bytes[token] + 15) / 16 * 16; }
  bool is_fetched(size_t i) const {
    const int32_t token = tokens[i];
    return token >= 0 && token < kVocab && (i == 0 || tokens[i - 1] != token) &&
           resident[token] == 0 && sources[token] != 0;
  }
  int64_t bytes_needed() const {
    int64_t sum = 0;
    for (size_t i = 0; i < tokens.size(); ++i) sum += is_fetched(i) ? slot(tokens[i]) : 0;
    return sum;
  }

  void run() {
    ring = std::make_unique<DeviceBuffer<std::byte>>(ring_bytes);
    DeviceBuffer<int32_t> ids(std::max<int64_t>(std::ssize(tokens), 1)), count(1);
    std::copy(tokens.begin(), tokens.end(), ids.data());
    count[0] = static_cast<int32_t>(tokens.size());
    DeviceBuffer<int64_t> resident_on(resident), sources_on(sources), bytes_on(bytes);
    FetchStepParams params;
    params.tokens = ids.data();
    params.num_tokens = count.data();
    params.most_tokens = std::ssize(tokens);
    params.vocab_size = kVocab;
    params.resident = resident_on.data();
    params.sources = sources_on.data();
    params.source_bytes = bytes_on.data();
    params.ring = ring->data();
    params.ring_bytes = ring_bytes;
    params.directory = directory.data();
    params.counters = counters.data();
    params.blocks = blocks;
    if (on_host) return cuda::fetch_step_on_host(params);
    const int64_t workspace_bytes = cuda::fetch_step_workspace(params.most_tokens);
    DeviceBuffer<std::byte> workspace(workspace_bytes);
    cuda::fetch_step(params, workspace.data(), workspace_bytes, nullptr);
  }

  // Every entry of the directory and every byte of the ring by a loop; how many tokens stayed in
  // host memory.
  int64_t check() const {
    std::vector<int64_t> expected(kVocab, -1);
    std::vector<std::byte> expected_ring(ring_bytes, std::byte{0xff});
    int64_t begin = 0, left = 0, hot = 0, fetched = 0, fetched_bytes = 0;
    for (size_t i = 0; i < tokens.size(); ++i) {
      const int32_t token = tokens[i];
      if (token < 0 || token >= kVocab || (i > 0 && tokens[i - 1] == token)) continue;
      expected[token] = resident[token];
      hot += resident[token] != 0;
      if (!is_fetched(i)) continue;
      if (begin + bytes[token] <= ring_bytes) {
        expected[token] = static_cast<int64_t>(reinterpret_cast<uintptr_t>(ring->data())) + begin;
        std::memcpy(expected_ring.data() + begin,
                    // NOLINTNEXTLINE(performance-no-int-to-ptr): as the kernel does
                    reinterpret_cast<const std::byte*>(sources[token]), bytes[token]);
        ++fetched;
        fetched_bytes += bytes[token];
      } else {
        expected[token] = sources[token];
        ++left;
      }
      begin += slot(token);
    }
    EXPECT(directory.values() == expected);
    EXPECT(ring->values() == expected_ring);
    EXPECT(counters.values() == (std::vector<int64_t>{hot, fetched, fetched_bytes, left}));
    return left;
  }
};

std::vector<int32_t> random_tokens(unsigned seed, int count) {
  std::mt19937 random(seed);
  std::vector<int32_t> tokens(count);
  for (int32_t& token : tokens) token = static_cast<int32_t>(random() % Step::kVocab);
  return tokens;
}

void steps_are_fetched() {
  for (unsigned seed = 0; seed < 4; ++seed) {
    cuda::emulation().seed = seed;
    for (const bool odd : {false, true}) {
      for (const int count : {1, 2, 31, 150, 700}) {  // with repeats; more than a block has threads
        Step step(seed, 30, odd);
        step.blocks = 1 + static_cast<int>(seed);
        step.set_tokens(random_tokens(seed, count));
        step.ring_bytes = step.bytes_needed() + 100;
        step.run();
        EXPECT(step.check() == 0);
      }
    }
  }
  cuda::emulation().seed = 0;
}

void nothing_to_fetch() {
  Step empty(1, 0, false);
  empty.run();
  EXPECT(empty.check() == 0);

  Step hot(1, 100, false);
  hot.set_tokens(random_tokens(1, 50));
  hot.run();
  EXPECT(hot.check() == 0);

  Step no_tokens(1, 0, false);  // what a plan has for invalid ids, and what is none of the table's
  no_tokens.set_tokens({-1, -1, Step::kVocab, Step::kVocab + 5});
  no_tokens.ring_bytes = 1000;
  no_tokens.run();
  EXPECT(no_tokens.check() == 0);
}

void equal_ids_are_fetched_once() {
  Step step(3, 0, false);
  step.set_tokens(std::vector<int32_t>(600, 7));
  step.ring_bytes = step.bytes[7];
  step.run();
  EXPECT(step.check() == 0);
}

// A full ring: the rest stays in host memory, and what was claimed is right. By one byte, too.
void a_step_larger_than_the_ring() {
  for (const bool odd : {false, true}) {
    Step exact(5, 20, odd);
    exact.set_tokens(random_tokens(5, 100));
    const auto last = std::find_if(exact.tokens.rbegin(), exact.tokens.rend(), [&](int32_t t) {
      return exact.resident[t] == 0 && exact.sources[t] != 0 && exact.bytes[t] > 0;
    });
    const int64_t padding = exact.slot(*last) - exact.bytes[*last];
    exact.ring_bytes = exact.bytes_needed() - padding;
    exact.run();
    EXPECT(exact.check() == 0);

    Step short_by_one(5, 20, odd);
    short_by_one.set_tokens(random_tokens(5, 100));
    short_by_one.ring_bytes = exact.ring_bytes - 1;
    short_by_one.run();
    EXPECT(short_by_one.check() == 1);

    Step half(5, 20, odd);
    half.set_tokens(random_tokens(5, 100));
    half.ring_bytes = exact.ring_bytes / 2;
    half.run();
    EXPECT(half.check() > 10);

    Step none(5, 20, odd);
    none.set_tokens(random_tokens(5, 100));
    none.run();
    EXPECT(none.check() > 40);
  }
}

// The twin does the same, to the byte.
void the_host_does_the_same() {
  for (unsigned seed = 0; seed < 4; ++seed) {
    for (const int count : {0, 1, 31, 700}) {
      Step step(seed, 30, true);
      step.on_host = true;
      step.set_tokens(random_tokens(seed, count));
      if (count == 31) step.tokens.insert(step.tokens.begin(), {-1, -1});
      const int64_t needed = step.bytes_needed();
      for (const int64_t bytes : {needed, needed / 2, int64_t{0}}) {
        step.ring_bytes = bytes;
        step.directory.poison();
        for (int i = 0; i < 4; ++i) step.counters[i] = 0;
        step.run();
        EXPECT((step.check() > 0) == (bytes < needed));
      }
    }
  }
}

// Claims do not depend on the order of threads, nor on how many blocks copy.
void the_same_for_any_order() {
  std::vector<int64_t> first;
  std::unique_ptr<Step> step;
  for (uint64_t seed = 0; seed < 6; ++seed) {
    cuda::emulation().seed = seed;
    step = std::make_unique<Step>(9, 10, true);
    step->set_tokens(random_tokens(9, 120));
    step->ring_bytes = step->bytes_needed() / 2;
    step->blocks = 1 + static_cast<int>(seed);
    step->run();
    step->check();
    std::vector<int64_t> places = step->directory.values();
    for (int64_t& place : places) {  // the ring lies elsewhere every time, host memory too
      const auto ring = static_cast<int64_t>(reinterpret_cast<uintptr_t>(step->ring->data()));
      if (place >= ring && place < ring + step->ring_bytes) {
        place -= ring;
      } else if (place > 100000) {
        place -= static_cast<int64_t>(reinterpret_cast<uintptr_t>(step->host.data()));
      }
    }
    if (first.empty()) first = places;
    EXPECT(places == first);
  }
  cuda::emulation().seed = 0;
}

void counters_add_up_and_may_be_left_out() {
  Step step(2, 50, false);
  step.set_tokens({1, 2, 3, 4, 5, 6, 7, 8});
  step.ring_bytes = step.bytes_needed();
  step.run();
  const std::vector<int64_t> once = step.counters.values();
  step.run();
  for (int i = 0; i < 4; ++i) EXPECT(step.counters[i] == 2 * once[i]);
  FetchStepParams params;
  DeviceBuffer<int32_t> count(1);
  count[0] = 0;
  params.num_tokens = count.data();
  DeviceBuffer<int64_t> directory(1);
  params.directory = directory.data();
  DeviceBuffer<std::byte> workspace(cuda::fetch_step_workspace(0));
  cuda::fetch_step(params, workspace.data(), workspace.size(), nullptr);
}

void wrong_arguments() {
  DeviceBuffer<std::byte> memory(4096);
  DeviceBuffer<int64_t> directory(1), resident(1);
  FetchStepParams params;
  params.most_tokens = 10;
  params.directory = directory.data();
  params.resident = resident.data();
  const int64_t needed = cuda::fetch_step_workspace(10);
  const auto message = [&](void* workspace, int64_t bytes) {
    return EXPECT_THROWS(Error, cuda::fetch_step(params, workspace, bytes, nullptr));
  };
  EXPECT(contains(message(memory.data(), needed - 1), "workspace: expected"));
  EXPECT(contains(message(memory.data() + 8, needed), "aligned to 16"));
  EXPECT(contains(message(nullptr, needed), "workspace"));
  params.ring = memory.data() + 8;
  EXPECT(contains(message(memory.data(), needed), "ring: expected an address aligned"));
  params.ring = memory.data();
  params.ring_bytes = -1;
  EXPECT(contains(message(memory.data(), needed), "ring: expected at least 0 bytes"));
  params.ring_bytes = 0;
  params.resident = params.directory;
  EXPECT(contains(message(memory.data(), needed), "another array"));
  params.blocks = 0;
  EXPECT(contains(message(memory.data(), needed), "blocks: expected at least 1"));
  EXPECT_THROWS(Error, cuda::fetch_step_workspace(-1));
  EXPECT_THROWS(Error, cuda::fetch_blocks({}, 0, nullptr));
}

}  // namespace

int main() {
  RUN(copies_of_any_size_and_alignment);
  RUN(many_copies);
  RUN(steps_are_fetched);
  RUN(nothing_to_fetch);
  RUN(equal_ids_are_fetched_once);
  RUN(a_step_larger_than_the_ring);
  RUN(the_host_does_the_same);
  RUN(the_same_for_any_order);
  RUN(counters_add_up_and_may_be_left_out);
  RUN(wrong_arguments);
  return check::failures == 0 ? 0 : 1;
}
