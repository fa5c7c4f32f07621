// What every step cost: per layer the distinct tokens, rows, bytes, hits, the time of the fetch
// and the part of it that somebody waited for. Times are nanoseconds since the ledger was made.
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/home_process.hpp"
#include "runtime/device.hpp"

namespace l3ext {

struct WorkerSpan {
  int worker = 0;
  int64_t begin_ns = 0;
  int64_t end_ns = 0;
};

struct LayerRecord {
  int64_t tokens = 0;          // distinct
  int64_t rows = 0;            // that they own
  int64_t bytes = 0;           // fetched from the table
  int64_t hits = 0;            // tokens in the hot set
  int64_t hit_bytes = 0;       // theirs
  int64_t reused = 0;          // tokens that an earlier step had fetched
  int64_t reused_bytes = 0;    // theirs
  int64_t in_place_bytes = 0;  // of rows that are read where the table lies
  int64_t near = 0;            // tokens left to the caller to attend to beside the table
  int64_t near_bytes = 0;      // theirs, not fetched
  bool spilled = false;        // the ring was full: the step got a buffer of its own
  bool cancelled = false;      // the step ended before the rows were there
  int64_t fetch_begin_ns = 0;  // all times 0: did not happen
  int64_t fetch_end_ns = 0;
  int64_t wait_begin_ns = 0;
  int64_t wait_end_ns = 0;
  int64_t exposed_ns = 0;  // spent blocked in wait(), by the host or by a stream
  std::vector<WorkerSpan> spans;
  std::vector<std::shared_ptr<Stall>> stalls;  // of streams, not yet part of exposed_ns

  void time_fetch();  // by the spans
};

struct StepRecord {
  int64_t step = 0;
  int64_t begin_ns = 0;
  int64_t end_ns = 0;
  std::vector<LayerRecord> layers;
};

struct LedgerTotals {
  int64_t steps = 0;
  int64_t tokens = 0;
  int64_t rows = 0;
  int64_t bytes = 0;
  int64_t hits = 0;
  int64_t hit_bytes = 0;
  int64_t reused = 0;
  int64_t reused_bytes = 0;
  int64_t in_place_bytes = 0;
  int64_t near = 0;
  int64_t near_bytes = 0;
  int64_t spilled = 0;  // layers of steps
  int64_t fetch_ns = 0;
  int64_t exposed_ns = 0;
};

// Thread-safe. Keeps the last `capacity` steps; the totals count all of them. In a child of fork()
// all but now() throws kRuntime.
class Ledger {
 public:
  explicit Ledger(int64_t capacity) : capacity_(capacity) {}

  int64_t now() const {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() -
                                                                epoch_)
        .count();
  }
  void add(StepRecord record);
  void clear();
  // A stream's stall is counted once the stream has got past it.
  std::vector<StepRecord> steps() const;
  LedgerTotals totals() const;

  // Writes the kept steps in the Chrome trace format (chrome://tracing, Perfetto): one lane for
  // each worker, and for each step that is open at the same time one for waiting and one for the
  // compute between. Atomic; throws kIo.
  void write_chrome_trace(const std::string& path) const;

 private:
  const std::chrono::steady_clock::time_point epoch_ = std::chrono::steady_clock::now();
  const int64_t capacity_;
  void settle() const;  // with mutex_ held
  std::unique_lock<std::mutex> lock() const;

  const HomeProcess home_;
  mutable std::mutex mutex_;
  mutable std::deque<StepRecord> steps_;
  mutable size_t settled_ = 0;  // so many of the first steps have no stalls any more
  mutable LedgerTotals totals_;
  mutable std::vector<std::shared_ptr<Stall>> stalls_;  // not yet part of the totals
};

}  // namespace l3ext
