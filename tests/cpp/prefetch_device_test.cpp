// The prefetcher on a device that is not the host: its copies and the caller's streams run late, in
// any order that fences allow, and no call waits for them.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "async_device.hpp"
#include "check.hpp"
#include "faulty_table.hpp"
#include "runtime_examples.hpp"

using namespace l3ext;
using namespace examples;
using std::chrono::microseconds;

namespace {

constexpr int64_t kVocab = 60;

std::shared_ptr<AsyncDevice> make_twin(uint64_t seed) {
  return std::make_shared<AsyncDevice>(AsyncOptions{seed, microseconds(200), 8});
}

// Puts a kernel into the stream that compares the rows of a waited layer with the table's.
void compare_in_stream(AsyncDevice& device, void* stream, const Prefetcher::Step& step,
                       int64_t layer, const Example& example, std::atomic<int>& compared,
                       std::atomic<int>& wrong) {
  std::vector<int64_t> rows(2 * step.tokens().size());
  step.segment_rows(layer, rows.data());
  std::vector<int32_t> tokens(step.tokens().begin(), step.tokens().end());
  const std::byte* base = step.rows(layer)->data();
  device.run(stream, [=, &device, &example, &compared, &wrong] {
    const int64_t row_bytes = example.shape.row_bytes();
    for (size_t s = 0; s < tokens.size(); ++s) {
      const int64_t begin = example.owners->offsets[tokens[s]];
      const auto bytes = static_cast<size_t>(example.owners->rows(tokens[s]) * row_bytes);
      const std::byte* got = device.at(base + rows[2 * s] * row_bytes, bytes);
      wrong += std::memcmp(got, example.rows.data() + begin * example.width(), bytes) != 0;
    }
    ++compared;
  });
}

// Steps of several threads, each on a stream of its own, never waiting for the device.
void the_stream_sees_its_rows(uint64_t seed, PrefetchOptions options, bool from_disk) {
  const Example a = make_example(kVocab, 9, 5, 3, 1);
  const Example b = make_example(kVocab, 4, 7, 2, 2);
  const auto device = make_twin(seed);
  const auto table = [&](const Example& example) {
    return from_disk
               ? table_over(example, std::make_shared<FaultyTable>(
                                         example.rows.data(),
                                         Faults{.depth = 4, .longest_delay = microseconds(50)}))
               : ram_table(example);
  };
  options.piece_bytes = 4096;
  std::atomic<int> compared{0}, wrong{0};
  int expected = 0;
  {
    const auto prefetcher = Prefetcher::create({table(a), table(b)}, device, options);
    EXPECT(!prefetcher->placement()[0].in_place);
    std::vector<std::thread> threads;
    std::atomic<int> waited{0};
    for (unsigned t = 0; t < 2; ++t) {
      threads.emplace_back([&, t] {
        std::mt19937 random(static_cast<unsigned>(seed) * 2 + t);
        void* stream = t == 0 ? nullptr : device->make_stream();
        for (int i = 0; i < 60; ++i) {
          Prefetcher::Step step = Prefetcher::begin(prefetcher, random_ids(random, kVocab, 8));
          for (int64_t layer = 0; layer < 2; ++layer) {
            if (random() % 8 == 0) continue;  // ends without a wait
            step.wait(layer, stream);
            ++waited;
            compare_in_stream(*device, stream, step, layer, layer == 0 ? a : b, compared, wrong);
          }
          step.end(stream);
        }
        device->synchronize(stream);
      });
    }
    for (std::thread& thread : threads) thread.join();
    expected = waited;
    prefetcher->close();
  }
  EXPECT(compared == expected && expected > 100);
  EXPECT(wrong == 0);
  for (const std::string& fault : device->faults()) std::fprintf(stderr, "%s\n", fault.c_str());
  EXPECT(device->faults().empty());
  EXPECT(device->allocated_bytes() == 0 && device->staging_bytes() == 0);
  EXPECT(device->pinned_bytes() == 0);
}

void rows_from_ram() {
  for (uint64_t seed = 0; seed < 4; ++seed) {
    the_stream_sees_its_rows(seed, {.cache_bytes = 2000, .ring_bytes = 6000}, false);
  }
}
void rows_from_ram_with_room() { the_stream_sees_its_rows(5, {}, false); }
void rows_from_ram_without_ring() {
  the_stream_sees_its_rows(6, {.cache_bytes = 2000, .ring_bytes = 0}, false);
}
void rows_from_ram_poisoned() {
  the_stream_sees_its_rows(7, {.cache_bytes = 2000, .ring_bytes = 6000, .poison = true}, false);
  the_stream_sees_its_rows(8, {.ring_bytes = 1000, .poison = true}, false);
}
void rows_from_disk() {
  for (uint64_t seed = 9; seed < 12; ++seed) {
    the_stream_sees_its_rows(seed, {.cache_bytes = 2000, .ring_bytes = 6000, .queue_depth = 3},
                             true);
  }
}

// Copies do not begin: wait(), end() and begin() return all the same.
void no_call_waits_for_the_device() {
  const Example example = make_example(kVocab, 9, 5, 3, 3);
  const auto device = make_twin(12);
  std::atomic<int> compared{0}, wrong{0};
  {
    const auto prefetcher = Prefetcher::create({ram_table(example)}, device, {.ring_bytes = 4000});
    device->pause_queues();
    std::mt19937 random(4);
    for (int i = 0; i < 30; ++i) {
      Prefetcher::Step step = Prefetcher::begin(prefetcher, random_ids(random, kVocab, 6));
      step.wait(0);
      compare_in_stream(*device, nullptr, step, 0, example, compared, wrong);
      step.end();
    }
    EXPECT(compared < 30);
    device->resume_queues();
    device->synchronize(nullptr);
    const LedgerTotals totals = prefetcher->ledger()->totals();
    EXPECT(totals.steps == 30 && totals.exposed_ns > 0);
  }
  EXPECT(compared == 30 && wrong == 0 && device->faults().empty());
}

// What the stream stood still is the step's exposed time, once it is known.
void a_stall_of_the_stream_is_exposed_time() {
  const Example example = make_example(kVocab, 9, 5, 3, 5);
  const auto device = make_twin(13);
  const auto prefetcher = Prefetcher::create({ram_table(example)}, device, {.record_steps = 4});
  device->pause_queues();
  {
    Prefetcher::Step step = Prefetcher::begin(prefetcher, std::vector<int32_t>{1, 2});
    step.wait(0);
    step.end();
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(30));
  EXPECT(prefetcher->ledger()->steps().at(0).layers[0].exposed_ns < 20'000'000);
  device->resume_queues();
  device->synchronize(nullptr);
  const int64_t exposed = prefetcher->ledger()->steps().at(0).layers[0].exposed_ns;
  EXPECT(exposed >= 20'000'000);
  EXPECT(prefetcher->ledger()->totals().exposed_ns == exposed);
}

void a_copy_that_fails_is_told_and_the_next_step_works() {
  const Example example = make_example(kVocab, 9, 5, 3, 6);
  const auto device = make_twin(14);
  std::atomic<int> compared{0}, wrong{0};
  {
    const auto prefetcher = Prefetcher::create({ram_table(example)}, device, {.num_workers = 1});
    device->fail_copy_call(1);
    Prefetcher::Step step = Prefetcher::begin(prefetcher, std::vector<int32_t>{1, 2});
    EXPECT_THROWS(Error, step.wait(0));
    step.end();
    Prefetcher::Step next = Prefetcher::begin(prefetcher, std::vector<int32_t>{1, 2});
    next.wait(0);
    compare_in_stream(*device, nullptr, next, 0, example, compared, wrong);
    next.end();
    device->synchronize(nullptr);
  }
  EXPECT(compared == 1 && wrong == 0 && device->faults().empty());
}

void a_lost_device_is_told_and_everything_ends() {
  const Example example = make_example(kVocab, 9, 5, 3, 7);
  const auto device = make_twin(15);
  const auto prefetcher = Prefetcher::create({ram_table(example)}, device, {.ring_bytes = 4000});
  device->lose_at_copy_call(5);
  std::mt19937 random(5);
  int failed = 0;
  for (int i = 0; i < 40; ++i) {
    try {
      Prefetcher::Step step = Prefetcher::begin(prefetcher, random_ids(random, kVocab, 6));
      step.wait(0);
      device->synchronize(nullptr);
      step.end();
    } catch (const Error& error) {
      EXPECT(error.code() == ErrorCode::kRuntime);
      ++failed;
    }
  }
  EXPECT(failed > 10);
  prefetcher->close();
}

// A read that does not return holds up its own step only, and does not keep others from ending.
void a_stalled_disk_holds_up_who_needs_it() {
  const Example example = make_example(kVocab, 9, 5, 3, 8);
  const int64_t bytes = example.owners->offsets[30] * example.shape.row_bytes();
  const auto source =
      std::make_shared<FaultyTable>(example.rows.data(), Faults{.depth = 4, .stalling = {bytes}});
  const auto prefetcher =
      make_prefetcher({table_over(example, source)}, {.num_workers = 1, .piece_bytes = 4096});
  Prefetcher::Step stalled = Prefetcher::begin(prefetcher, std::vector<int32_t>{30});
  source->wait_until_stalled();
  Prefetcher::Step dropped = Prefetcher::begin(prefetcher, std::vector<int32_t>{30, 40});
  dropped.end();
  try {
    stalled.wait(0, nullptr, [] { return true; });
    EXPECT(!"interrupted");
  } catch (const Error& error) {
    EXPECT(error.code() == ErrorCode::kInterrupted);
  }
  source->release();
  stalled.wait(0);
  EXPECT(holds_the_rows(stalled, 0, example));
  Prefetcher::Step next = Prefetcher::begin(prefetcher, std::vector<int32_t>{30, 40});
  next.wait(0);
  EXPECT(holds_the_rows(next, 0, example));
  EXPECT(source->times_misused() == 0);
}

// Delays, any order, failures at some places: a step has its rows or an error that says where.
void a_bad_disk_costs_the_steps_that_need_it() {
  const Example example = make_example(kVocab, 9, 5, 3, 9);
  const int64_t bad = example.owners->offsets[20] * example.shape.row_bytes();
  const auto source = std::make_shared<FaultyTable>(
      example.rows.data(),
      Faults{.depth = 8, .seed = 3, .longest_delay = microseconds(60), .failing = {bad}});
  const auto prefetcher = make_prefetcher(
      {table_over(example, source)},
      {.ring_bytes = 6000, .num_workers = 2, .queue_depth = 8, .piece_bytes = 4096});
  std::mt19937 random(9);
  int failed = 0;
  for (int i = 0; i < 400; ++i) {
    const auto ids = random_ids(random, kVocab, 8);
    Prefetcher::Step step = Prefetcher::begin(prefetcher, ids);
    const bool needs_bad = std::ranges::find(ids, 20) != ids.end();
    try {
      step.wait(0);
      EXPECT(!needs_bad && holds_the_rows(step, 0, example));
    } catch (const Error& error) {
      // Its neighbours in the table may be read with it.
      EXPECT(error.code() == ErrorCode::kIo && error.path() == "faulty");
      EXPECT(needs_bad || std::ranges::find(ids, 19) != ids.end());
      ++failed;
    }
  }
  EXPECT(failed > 20 && source->most_on_their_way() > 1 && source->times_misused() == 0);
}

void workers_that_cannot_read_are_told_at_the_start() {
  const Example example = make_example(kVocab, 9, 5, 3, 10);
  const auto source =
      std::make_shared<FaultyTable>(example.rows.data(), Faults{.no_readers = true});
  EXPECT(EXPECT_THROWS(Error, make_prefetcher({table_over(example, source)}, {})) ==
         "no reader can be made");
}

}  // namespace

int main() {
  RUN(rows_from_ram);
  RUN(rows_from_ram_with_room);
  RUN(rows_from_ram_without_ring);
  RUN(rows_from_ram_poisoned);
  RUN(rows_from_disk);
  RUN(no_call_waits_for_the_device);
  RUN(a_stall_of_the_stream_is_exposed_time);
  RUN(a_copy_that_fails_is_told_and_the_next_step_works);
  RUN(a_lost_device_is_told_and_everything_ends);
  RUN(a_stalled_disk_holds_up_who_needs_it);
  RUN(a_bad_disk_costs_the_steps_that_need_it);
  RUN(workers_that_cannot_read_are_told_at_the_start);
  return check::failures == 0 ? 0 : 1;
}
