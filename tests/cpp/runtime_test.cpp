#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "check.hpp"
#include "runtime_examples.hpp"

using namespace l3ext;
using namespace examples;

namespace {

// Sanitizers make everything some ten times slower.
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr int kSlowdown = 10;
#else
constexpr int kSlowdown = 1;
#endif

// A table in RAM whose reads take a random time, so that workers finish in any order.
class SlowTable final : public BlockingTable {
 public:
  SlowTable(const void* data, int max_us) : ram_(data, nullptr), max_us_(max_us) {}
  const std::byte* read(int64_t begin, int64_t bytes, std::byte* scratch) override {
    thread_local std::mt19937 random(
        static_cast<unsigned>(std::hash<std::thread::id>{}(std::this_thread::get_id())));
    std::this_thread::sleep_for(std::chrono::microseconds(random() % (max_us_ + 1)));
    return ram_.read(begin, bytes, scratch);
  }
  Error corrupt(int64_t begin, const std::string& what) const override {
    return ram_.corrupt(begin, what);
  }

 private:
  RamTable ram_;
  unsigned max_us_;
};

// A table whose reads fail while told to.
class FailingTable final : public BlockingTable {
 public:
  explicit FailingTable(const void* data) : ram_(data, nullptr) {}
  const std::byte* read(int64_t begin, int64_t bytes, std::byte* scratch) override {
    if (failing) throw Error::io("/the/table", EIO, concat("offset ", begin, ": broken"));
    return ram_.read(begin, bytes, scratch);
  }
  Error corrupt(int64_t begin, const std::string& what) const override {
    return ram_.corrupt(begin, what);
  }
  std::atomic<bool> failing{false};

 private:
  RamTable ram_;
};

// A table whose reads do not return until it is opened.
class GatedTable final : public BlockingTable {
 public:
  explicit GatedTable(const void* data) : ram_(data, nullptr) {}
  const std::byte* read(int64_t begin, int64_t bytes, std::byte* scratch) override {
    std::unique_lock lock(mutex_);
    ++waiting_;
    changed_.notify_all();
    changed_.wait(lock, [&] { return open_; });
    return ram_.read(begin, bytes, scratch);
  }
  Error corrupt(int64_t begin, const std::string& what) const override {
    return ram_.corrupt(begin, what);
  }
  void open() {
    const std::scoped_lock lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }
  void await_reader() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return waiting_ > 0; });
  }

 private:
  RamTable ram_;
  std::mutex mutex_;
  std::condition_variable changed_;
  int waiting_ = 0;
  bool open_ = false;
};

// Two layers, slow reads in any order, small rings: every step sees its own rows and nothing else.
void rows_are_exact(int64_t cache_bytes, int64_t ring_bytes, int workers) {
  const Example a = make_example(60, 9, 5, 3, 1);
  const Example b = make_example(60, 4, 7, 2, 2);
  const auto prefetcher =
      make_prefetcher({table_over(a, std::make_shared<SlowTable>(a.rows.data(), 40)),
                       table_over(b, std::make_shared<SlowTable>(b.rows.data(), 40))},
                      {.cache_bytes = cache_bytes,
                       .ring_bytes = ring_bytes,
                       .num_workers = workers,
                       .piece_bytes = 4096,
                       .poison = true});
  std::mt19937 random(3);
  std::vector<Prefetcher::Step> open;
  for (int i = 0; i < 300; ++i) {
    open.push_back(Prefetcher::begin(prefetcher, random_ids(random, 60, 8)));
    if (open.size() < 4 && i < 299) continue;
    while (open.size() > 2) {  // the newest first: ends out of order
      Prefetcher::Step step = std::move(open.back());
      open.pop_back();
      if (random() % 5 == 0) continue;  // dropped without a wait
      for (const int64_t layer : {1, 0}) {
        step.wait(layer);
        EXPECT(holds_the_rows(step, layer, layer == 0 ? a : b));
      }
    }
  }
  open.clear();
  EXPECT(prefetcher->ledger()->totals().steps == 300);
  // All is given back: a ring with room takes a step again.
  Prefetcher::Step last = Prefetcher::begin(prefetcher, std::vector<int32_t>{0});
  last.wait(0);
  EXPECT(holds_the_rows(last, 0, a));
}
void rows_are_exact_without_cache() { rows_are_exact(0, 1 << 20, 3); }
void rows_are_exact_with_some_cache() { rows_are_exact(4000, 2000, 2); }
void rows_are_exact_when_all_is_hot() { rows_are_exact(1 << 20, 1 << 20, 1); }
void rows_are_exact_without_ring() { rows_are_exact(4000, 0, 4); }

void steps_of_several_threads_do_not_mix() {
  const Example example = make_example(80, 12, 6, 6, 4);
  const auto prefetcher =
      make_prefetcher({ram_table(example), ram_table(example)}, {.cache_bytes = 6000,
                                                                 .ring_bytes = 8000,
                                                                 .num_workers = 2,
                                                                 .piece_bytes = 4096,
                                                                 .poison = true});
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (unsigned seed = 0; seed < 4; ++seed) {
    threads.emplace_back([&, seed] {
      std::mt19937 random(seed);
      for (int i = 0; i < 200; ++i) {
        Prefetcher::Step step = Prefetcher::begin(prefetcher, random_ids(random, 80, 6));
        for (int64_t layer = 0; layer < 2; ++layer) {
          step.wait(layer);
          wrong += !holds_the_rows(step, layer, example);
        }
        if (i % 2) step.end();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT(wrong == 0);
  EXPECT(prefetcher->ledger()->totals().steps == 800);
}

void bad_ids_are_named_and_nothing_is_queued() {
  const Example example = make_example(10, 3, 4, 4, 5);
  const auto prefetcher = make_prefetcher({ram_table(example)}, {});
  for (const int32_t bad : {-1, 10, std::numeric_limits<int32_t>::min()}) {
    const std::string message =
        EXPECT_THROWS(Error, Prefetcher::begin(prefetcher, std::vector<int32_t>{3, 9, 0, bad}));
    EXPECT(message == concat("token_ids[3]: expected an id in [0, 10), got ", bad));
  }
  EXPECT(prefetcher->ledger()->totals().steps == 0);
  Prefetcher::Step step = Prefetcher::begin(prefetcher, std::vector<int32_t>{9, 0, 9, 9});
  EXPECT(step.tokens().size() == 2 && step.tokens()[0] == 0 && step.tokens()[1] == 9);
  step.wait(0);
  EXPECT(holds_the_rows(step, 0, example));
  EXPECT(EXPECT_THROWS(Error, step.wait(1)).find("layer: expected 0 to 0, got 1") == 0);
  Prefetcher::Step empty = Prefetcher::begin(prefetcher, {});
  empty.wait(0);
  EXPECT(empty.tokens().empty());
}

void a_failed_read_is_told_by_wait_and_the_next_step_works() {
  const Example example = make_example(10, 3, 4, 4, 6);
  const auto source = std::make_shared<FailingTable>(example.rows.data());
  const auto prefetcher = make_prefetcher({table_over(example, source)}, {});
  source->failing = true;
  Prefetcher::Step step = Prefetcher::begin(prefetcher, std::vector<int32_t>{1});
  EXPECT(EXPECT_THROWS(Error, step.wait(0)).find("broken") != std::string::npos);
  EXPECT(EXPECT_THROWS(Error, step.wait(0)).find("broken") != std::string::npos);
  source->failing = false;
  Prefetcher::Step next = Prefetcher::begin(prefetcher, std::vector<int32_t>{1});
  next.wait(0);
  EXPECT(holds_the_rows(next, 0, example));
  source->failing = true;
  EXPECT(
      EXPECT_THROWS(Error, make_prefetcher({table_over(example, source)}, {.cache_bytes = 1 << 20}))
          .find("broken") != std::string::npos);
}

void rows_still_being_read_are_not_handed_out_again() {
  const Example example = make_example(4, 1, 8, 8, 7);
  const auto source = std::make_shared<GatedTable>(example.rows.data());
  const auto prefetcher = make_prefetcher(
      {table_over(example, source)}, {.ring_bytes = example.shape.row_bytes(), .num_workers = 2});
  Prefetcher::Step first = Prefetcher::begin(prefetcher, std::vector<int32_t>{0});
  source->await_reader();
  first.end();  // a worker is inside; the ring's only row is not free yet
  Prefetcher::Step second = Prefetcher::begin(prefetcher, std::vector<int32_t>{1});
  EXPECT(second.spilled(0));
  source->open();
  second.wait(0);
  EXPECT(holds_the_rows(second, 0, example));
  second.end();
  bool reused = false;  // once the abandoned read is through, the ring serves again
  for (int i = 0; i < 2000 && !reused; ++i) {
    Prefetcher::Step third = Prefetcher::begin(prefetcher, std::vector<int32_t>{2});
    third.wait(0);
    EXPECT(holds_the_rows(third, 0, example));
    reused = !third.spilled(0);
    if (!reused) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  EXPECT(reused);
}

// What an earlier step fetched is found again, also while it is still on its way, and also where
// that step has ended.
void rows_are_fetched_once_for_several_steps() {
  const Example example = make_example(10, 3, 8, 8, 20);
  const auto source = std::make_shared<GatedTable>(example.rows.data());
  const auto prefetcher = make_prefetcher({table_over(example, source)}, {.num_workers = 1});
  Prefetcher::Step first = Prefetcher::begin(prefetcher, std::vector<int32_t>{2, 4});
  source->await_reader();
  Prefetcher::Step second = Prefetcher::begin(prefetcher, std::vector<int32_t>{4, 6});
  first.end();
  source->open();
  second.wait(0);
  EXPECT(holds_the_rows(second, 0, example));
  second.end();
  Prefetcher::Step third = Prefetcher::begin(prefetcher, std::vector<int32_t>{2, 4, 6});
  third.wait(0);
  EXPECT(holds_the_rows(third, 0, example));
  third.end();
  const auto steps = prefetcher->ledger()->steps();
  EXPECT(steps.at(0).layers[0].reused == 0 && steps.at(1).layers[0].reused == 1);
  EXPECT(steps.at(2).layers[0].reused == 3 && steps.at(2).layers[0].bytes == 0);
}

// Nobody counts on rows whose step ended before they were there.
void cancelled_rows_are_fetched_again() {
  const Example example = make_example(10, 3, 8, 8, 21);
  const auto source = std::make_shared<GatedTable>(example.rows.data());
  const auto prefetcher = make_prefetcher({table_over(example, source)}, {.num_workers = 2});
  Prefetcher::Step first = Prefetcher::begin(prefetcher, std::vector<int32_t>{2, 4, 6});
  source->await_reader();
  first.end();
  Prefetcher::Step second = Prefetcher::begin(prefetcher, std::vector<int32_t>{2, 4, 6});
  source->open();
  second.wait(0);
  EXPECT(holds_the_rows(second, 0, example));
  second.end();
  const auto steps = prefetcher->ledger()->steps();
  EXPECT(steps.at(0).layers[0].cancelled && steps.at(1).layers[0].reused == 0);
}

// The ledger has the part that was fetched, and no time after the step's end.
void a_cancelled_step_is_entered_with_what_it_cost() {
  const Example example = make_example(10, 3, 8, 8, 21);
  const auto source = std::make_shared<GatedTable>(example.rows.data());
  const auto prefetcher = make_prefetcher({table_over(example, source)}, {.num_workers = 1});
  Prefetcher::Step step = Prefetcher::begin(prefetcher, std::vector<int32_t>{2, 4, 6});
  source->await_reader();  // of the first token's rows
  step.end();
  source->open();
  const StepRecord record = prefetcher->ledger()->steps().at(0);
  const LayerRecord& layer = record.layers[0];
  EXPECT(layer.cancelled && layer.bytes == example.owners->rows(2) * example.shape.row_bytes());
  EXPECT(layer.spans.size() == 1 && layer.spans[0].end_ns == record.end_ns);
  EXPECT(layer.fetch_begin_ns == layer.spans[0].begin_ns && layer.fetch_end_ns == record.end_ns);
}

class FullDevice final : public HostDevice {
 public:
  void* allocate(size_t bytes) override {
    if (full) throw Error(ErrorCode::kRuntime, "no memory");
    return HostDevice::allocate(bytes);
  }
  std::atomic<bool> full{false};
};

void a_step_that_finds_no_memory_leaves_the_others_alone() {
  const Example example = make_example(4, 1, 8, 8, 22);
  const auto device = std::make_shared<FullDevice>();
  const int64_t row_bytes = example.shape.row_bytes();
  const auto prefetcher = Prefetcher::create(
      {ram_table(example)}, device,
      {.cache_bytes = 2 * row_bytes, .ring_bytes = 0, .in_place = false, .poison = true});
  const std::vector<int32_t> all = {0, 1, 2, 3};
  device->full = true;
  const std::string message = EXPECT_THROWS(Error, Prefetcher::begin(prefetcher, all));
  EXPECT(message == "no memory");
  device->full = false;
  Prefetcher::Step step = Prefetcher::begin(prefetcher, all);
  step.wait(0);
  EXPECT(step.spilled(0) && holds_the_rows(step, 0, example));
}

void a_failed_fetch_fails_those_who_share_it_and_nobody_else() {
  const Example example = make_example(10, 3, 8, 8, 22);
  const auto source = std::make_shared<FailingTable>(example.rows.data());
  const auto prefetcher = make_prefetcher({table_over(example, source)}, {.num_workers = 1});
  source->failing = true;
  Prefetcher::Step first = Prefetcher::begin(prefetcher, std::vector<int32_t>{2, 4});
  EXPECT_THROWS(Error, first.wait(0));
  source->failing = false;
  Prefetcher::Step second = Prefetcher::begin(prefetcher, std::vector<int32_t>{2, 4});
  second.wait(0);  // while the first is still open
  EXPECT(holds_the_rows(second, 0, example));
}

void a_table_in_ram_is_read_where_it_lies() {
  const Example example = make_example(12, 4, 6, 6, 23);
  const auto prefetcher = Prefetcher::create({ram_table(example)}, std::make_shared<HostDevice>(),
                                             {.cache_bytes = 1 << 20});
  EXPECT(prefetcher->placement()[0].in_place && prefetcher->placement()[0].hot_bytes == 0);
  EXPECT(prefetcher->arena_rows(0) == example.owners->total_rows());
  Prefetcher::Step step = Prefetcher::begin(prefetcher, std::vector<int32_t>{3, 11, 0});
  step.wait(0);
  EXPECT(holds_the_rows(step, 0, example));
  EXPECT(reinterpret_cast<const float*>(step.rows(0)->data()) == example.rows.data());
  step.end();
  const LayerRecord layer = prefetcher->ledger()->steps().at(0).layers.at(0);
  EXPECT(layer.bytes == 0 && layer.hits == 0 && layer.exposed_ns == 0);
  EXPECT(layer.in_place_bytes == layer.rows * example.shape.row_bytes());
}

void buffers_of_steps_that_spilled_serve_again() {
  const Example example = make_example(12, 1, 6, 6, 24);
  const auto prefetcher = make_prefetcher({ram_table(example)}, {.ring_bytes = 0});
  const auto address = [&](const std::vector<int32_t>& ids) {
    Prefetcher::Step step = Prefetcher::begin(prefetcher, ids);
    step.wait(0);
    EXPECT(step.spilled(0) && holds_the_rows(step, 0, example));
    return step.rows(0);
  };
  const std::byte* first = address({0, 1, 2})->data();
  EXPECT(address({3, 4})->data() == first);
  const auto held = address({5});  // as a tensor does
  EXPECT(held->data() == first);
  EXPECT(address({6})->data() != first);
}

// Steps of several threads against the table itself, for long: rows of earlier steps are used
// again.
void a_hundred_thousand_random_steps() {
  const Example example = make_example(100, 6, 4, 4, 25);
  const auto prefetcher =
      make_prefetcher({ram_table(example),
                       table_over(example, std::make_shared<SlowTable>(example.rows.data(), 0))},
                      {.cache_bytes = 4000, .ring_bytes = 16000, .num_workers = 2});
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (unsigned seed = 0; seed < 2; ++seed) {
    threads.emplace_back([&, seed] {
      std::mt19937 random(seed);
      for (int i = 0; i < 50'000 / kSlowdown; ++i) {
        Prefetcher::Step step = Prefetcher::begin(prefetcher, random_ids(random, 100, 5));
        if (random() % 8 == 0) continue;  // dropped
        for (int64_t layer = 0; layer < 2; ++layer) {
          step.wait(layer);
          wrong += !holds_the_rows(step, layer, example);
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT(wrong == 0);
  const LedgerTotals totals = prefetcher->ledger()->totals();
  EXPECT(totals.steps == 100'000 / kSlowdown);
  EXPECT(totals.reused > totals.steps / 10 && totals.bytes > 0 && totals.hits > 0);
}

void released_rows_are_poisoned() {
  const Example example = make_example(4, 3, 8, 8, 8);
  const auto prefetcher = make_prefetcher({ram_table(example)}, {.poison = true});
  Prefetcher::Step step = Prefetcher::begin(prefetcher, std::vector<int32_t>{2});
  step.wait(0);
  int64_t rows[2];
  step.segment_rows(0, rows);
  const auto arena = prefetcher->arena(0);
  step.end();
  const auto* row = reinterpret_cast<const float*>(arena->data()) + rows[0] * example.width();
  EXPECT(std::isnan(row[0]) && std::isnan(row[example.width() - 1]));
}

void close_with_open_steps_and_waiters_is_safe() {
  const Example example = make_example(20, 3, 8, 8, 9);
  const auto source = std::make_shared<GatedTable>(example.rows.data());
  auto prefetcher = make_prefetcher({table_over(example, source)}, {});
  Prefetcher::Step step = Prefetcher::begin(prefetcher, std::vector<int32_t>{1, 3, 5});
  source->await_reader();
  std::string message;
  std::thread waiter([&] {
    try {
      step.wait(0);
    } catch (const Error& error) {
      message = error.what();
    }
  });
  std::thread closer([&] { prefetcher->close(); });
  waiter.join();  // woken although the read never returned
  EXPECT(message == "the runtime is closed");
  source->open();
  closer.join();
  prefetcher->close();
  EXPECT(EXPECT_THROWS(Error, Prefetcher::begin(prefetcher, std::vector<int32_t>{1})) ==
         "the runtime is closed");
  step.end();
  prefetcher.reset();  // the step holds the last reference
}

void a_step_that_ended_says_so() {
  const Example example = make_example(5, 2, 4, 4, 10);
  const auto prefetcher = make_prefetcher({ram_table(example)}, {});
  Prefetcher::Step step = Prefetcher::begin(prefetcher, std::vector<int32_t>{1});
  step.end();
  step.end();
  EXPECT(EXPECT_THROWS(Error, step.wait(0)) == "the step has ended");
}

void a_wait_can_be_interrupted() {
  const Example example = make_example(5, 2, 4, 4, 11);
  const auto source = std::make_shared<GatedTable>(example.rows.data());
  const auto prefetcher = make_prefetcher({table_over(example, source)}, {});
  Prefetcher::Step step = Prefetcher::begin(prefetcher, std::vector<int32_t>{1});
  try {
    step.wait(0, nullptr, [] { return true; });
    EXPECT(!"an exception");
  } catch (const Error& error) {
    EXPECT(error.code() == ErrorCode::kInterrupted);
  }
  source->open();
  step.wait(0);
  EXPECT(holds_the_rows(step, 0, example));
}

void the_ledger_counts_exactly() {
  Example example = make_example(4, 1, 2, 2, 13);  // one row of 16 bytes each
  example.owners->frequency = {0, 0, 7, 0};
  const auto prefetcher = make_prefetcher({ram_table(example)},
                                          {.cache_bytes = 16, .ring_bytes = 32, .record_steps = 3});
  for (int i = 0; i < 2; ++i) {
    Prefetcher::Step step = Prefetcher::begin(prefetcher, std::vector<int32_t>{2, 1, 2, 3});
    step.wait(0);
  }
  {
    Prefetcher::Step step = Prefetcher::begin(prefetcher, std::vector<int32_t>{0, 1, 2, 3});
    step.wait(0);
    EXPECT(holds_the_rows(step, 0, example));
  }
  const auto steps = prefetcher->ledger()->steps();
  EXPECT(steps.size() == 3 && steps[0].step == 0 && steps[2].step == 2);
  const LayerRecord& fits = steps[0].layers[0];
  EXPECT(fits.tokens == 3 && fits.rows == 3 && fits.bytes == 32 && fits.hits == 1);
  EXPECT(fits.hit_bytes == 16 && fits.reused == 0 && !fits.spilled && !fits.cancelled);
  EXPECT(fits.fetch_end_ns >= fits.fetch_begin_ns && fits.fetch_begin_ns >= steps[0].begin_ns);
  EXPECT(fits.wait_end_ns >= fits.fetch_end_ns && steps[0].end_ns >= fits.wait_end_ns);
  const LayerRecord& again = steps[1].layers[0];
  EXPECT(again.hits == 1 && again.reused == 2 && again.reused_bytes == 32 && again.bytes == 0);
  EXPECT(again.fetch_end_ns == 0 && !again.cancelled);
  EXPECT(steps[2].layers[0].spilled && steps[2].layers[0].bytes == 48);
  const LedgerTotals totals = prefetcher->ledger()->totals();
  EXPECT(totals.steps == 3 && totals.bytes == 80 && totals.hits == 3 && totals.spilled == 1);
  EXPECT(totals.reused == 2 && totals.reused_bytes == 32 && totals.in_place_bytes == 0);
  prefetcher->ledger()->clear();
  EXPECT(prefetcher->ledger()->steps().empty() && prefetcher->ledger()->totals().bytes == 0);
}

// However many steps it keeps.
void a_full_ledger_costs_as_little() {
  constexpr int kSteps = 20'000, kSample = 1000;
  Ledger ledger(kSteps);
  const auto least_ns = [&] {  // of some samples, as other programs run as well
    int64_t least = std::numeric_limits<int64_t>::max();
    for (int i = 0; i < kSteps / kSample; ++i) {
      const int64_t begin = ledger.now();
      for (int step = 0; step < kSample; ++step) {
        StepRecord record;
        record.layers.resize(2);
        ledger.add(std::move(record));
      }
      least = std::min(least, ledger.now() - begin);
    }
    return least;
  };
  const int64_t empty = least_ns(), full = least_ns();
  EXPECT(full < 10 * empty);
  EXPECT(ledger.steps().size() == kSteps && ledger.totals().steps == 2 * kSteps);
}

void exposed_time_is_the_part_of_the_fetch_that_was_waited_for() {
  constexpr int64_t kHold = 40'000'000;  // ns that a read takes
  const Example example = make_example(4, 1, 8, 8, 17);
  for (const bool computes : {false, true}) {
    const auto source = std::make_shared<GatedTable>(example.rows.data());
    const auto prefetcher = make_prefetcher({table_over(example, source)}, {});
    Prefetcher::Step step = Prefetcher::begin(prefetcher, std::vector<int32_t>{0, 1});
    source->await_reader();
    std::thread opener([&] {
      std::this_thread::sleep_for(std::chrono::nanoseconds(kHold));
      source->open();
    });
    if (computes) {  // longer than the fetch: all of it is hidden
      opener.join();
      std::this_thread::sleep_for(std::chrono::nanoseconds(kHold));
    }
    step.wait(0);
    if (!computes) opener.join();
    step.end();
    const LayerRecord layer = prefetcher->ledger()->steps().at(0).layers.at(0);
    EXPECT(layer.fetch_end_ns - layer.fetch_begin_ns >= kHold);
    EXPECT(computes ? layer.exposed_ns == 0 : layer.exposed_ns >= kHold / 2);
    EXPECT(layer.exposed_ns <= layer.wait_end_ns - layer.wait_begin_ns);
  }
}

}  // namespace

int main() {
  RUN(rows_are_exact_without_cache);
  RUN(rows_are_exact_with_some_cache);
  RUN(rows_are_exact_when_all_is_hot);
  RUN(rows_are_exact_without_ring);
  RUN(steps_of_several_threads_do_not_mix);
  RUN(bad_ids_are_named_and_nothing_is_queued);
  RUN(a_failed_read_is_told_by_wait_and_the_next_step_works);
  RUN(rows_still_being_read_are_not_handed_out_again);
  RUN(rows_are_fetched_once_for_several_steps);
  RUN(cancelled_rows_are_fetched_again);
  RUN(a_cancelled_step_is_entered_with_what_it_cost);
  RUN(a_step_that_finds_no_memory_leaves_the_others_alone);
  RUN(a_failed_fetch_fails_those_who_share_it_and_nobody_else);
  RUN(a_table_in_ram_is_read_where_it_lies);
  RUN(buffers_of_steps_that_spilled_serve_again);
  RUN(a_hundred_thousand_random_steps);
  RUN(released_rows_are_poisoned);
  RUN(close_with_open_steps_and_waiters_is_safe);
  RUN(a_step_that_ended_says_so);
  RUN(a_wait_can_be_interrupted);
  RUN(the_ledger_counts_exactly);
  RUN(a_full_ledger_costs_as_little);
  RUN(exposed_time_is_the_part_of_the_fetch_that_was_waited_for);
  return check::failures == 0 ? 0 : 1;
}
