// Serves lookup tables that do not live where attention runs. The ids of a step are known before
// its first layer, so begin() starts fetching every layer's rows, nearest layer first, and returns;
// wait() blocks until one layer's rows are there; end() gives their place back.
//
// Each layer has one arena of rows [hot | ring]: the hot set is loaded once and stays, the ring is
// handed from step to step. Attention reads the arena through row ranges, so that a hot token, a
// fetched one and a resident table look the same to it, and fixed pointers stay fixed.
//
// A step that does not fit the ring neither waits nor fails: it gets a buffer of its own for that
// layer, with all its rows in it (the ledger counts it as spilled).
//
// Everything is thread-safe. Ownership: a Step keeps the Prefetcher's memory alive, a DeviceBuffer
// keeps itself; close() stops the workers, and what comes after gets an error.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <thread>
#include <unordered_set>
#include <vector>

#include "runtime/device.hpp"
#include "runtime/fetch_plan.hpp"
#include "runtime/hot_set.hpp"
#include "runtime/ledger.hpp"
#include "runtime/row_ring.hpp"
#include "runtime/table.hpp"

namespace l3ext {

struct PrefetchOptions {
  int64_t cache_bytes = 0;                  // hot sets of all layers together
  int64_t ring_bytes = int64_t{128} << 20;  // rings of all layers together
  int num_workers = 2;
  int64_t piece_bytes = int64_t{256} << 10;  // what one worker reads at a time
  int64_t record_steps = 1024;               // kept by the ledger
  bool poison = false;  // fill rows with NaN when they are given back: shows a use after end()
};

class Prefetcher {
 public:
  class Step;

  // Loads the hot sets, then returns. Throws kValue for options and tables, kIo where a table
  // cannot be read, kRuntime where memory or threads are lacking.
  static std::shared_ptr<Prefetcher> create(std::vector<Table> tables,
                                            std::shared_ptr<Device> device,
                                            const PrefetchOptions& options);
  ~Prefetcher();
  Prefetcher(const Prefetcher&) = delete;
  Prefetcher& operator=(const Prefetcher&) = delete;

  // `token_ids`: any order, repeats allowed. Throws kValue naming the first id outside [0, V)
  // before anything is queued.
  static Step begin(const std::shared_ptr<Prefetcher>& self, std::span<const int32_t> token_ids);

  // Stops the workers and lets go of tables and arenas. Open steps end. Idempotent.
  void close();

  struct LayerPlacement {
    int64_t table_bytes = 0;
    int64_t hot_tokens = 0;
    int64_t hot_bytes = 0;
    int64_t ring_bytes = 0;
  };
  const std::vector<LayerPlacement>& placement() const { return placement_; }
  int64_t num_layers() const { return static_cast<int64_t>(placement_.size()); }
  std::shared_ptr<DeviceBuffer> arena(int64_t layer) const;
  int64_t arena_rows(int64_t layer) const;
  const TableShape& shape(int64_t layer) const;
  const std::shared_ptr<Ledger>& ledger() const { return ledger_; }

 private:
  struct Layer;
  struct Fetch;
  struct StepState;
  struct Worker;

  Prefetcher(std::vector<Table> tables, std::shared_ptr<Device> device,
             const PrefetchOptions& options);

  void start_workers();
  void stop_workers();
  void load_hot_sets();

  void work(int index, Worker& worker);
  static void run_pieces(Fetch& fetch, Worker& worker);
  static void check_block(const Table& table, const Block& block, uint32_t checksum);
  static void check_parts(const Fetch& fetch);

  static std::shared_ptr<Fetch> count(Layer& layer, std::span<const int32_t> tokens);
  static void place(Fetch& fetch, std::span<const int32_t> tokens,
                    const std::shared_ptr<Device>& device);

  // With mutex_ held:
  static void take_rows(Fetch& fetch);
  void enqueue(const std::shared_ptr<Fetch>& fetch);
  void leave(Fetch& fetch, const WorkerSpan& span, const std::exception_ptr& error);
  void end_locked(StepState& step);
  void give_back(Fetch& fetch);
  void check_open() const;

  void check_process() const;
  void check_layer(int64_t layer) const;

  const PrefetchOptions options_;
  const pid_t process_;
  const std::shared_ptr<Device> device_;
  const std::shared_ptr<Ledger> ledger_;
  int64_t vocab_size_ = 0;
  std::vector<LayerPlacement> placement_;

  mutable std::mutex mutex_;      // guards all below and what they point to
  std::condition_variable work_;  // there is something in the queue, or stopping
  std::condition_variable done_;  // a fetch is complete, a step ended, or closed
  std::vector<std::unique_ptr<Layer>> layers_;
  std::deque<std::shared_ptr<Fetch>> queue_;
  std::unordered_set<StepState*> open_steps_;
  int64_t next_step_ = 0;
  bool stopping_ = false;
  bool closed_ = false;
  std::vector<std::thread> workers_;
};

// A handle on one step; ends it when destroyed.
class Prefetcher::Step {
 public:
  Step(Step&&) noexcept = default;
  Step& operator=(Step&&) = delete;
  ~Step();

  const Prefetcher& prefetcher() const { return *prefetcher_; }

  // The distinct ids of the step, ascending: segment s belongs to tokens()[s].
  std::span<const int32_t> tokens() const;

  // Blocks until the rows of `layer` are there. `interrupted` is asked some ten times a second and
  // stops the waiting with kInterrupted. Throws kIo where a read failed or a checksum did not match
  // (the runtime and later steps go on), kValue for the layer, kRuntime after end() or close().
  void wait(int64_t layer, const std::function<bool()>& interrupted = {});

  // After wait(): where segment s lies, rows[2s]..rows[2s+1] of the layer's arena, or of the step's
  // own buffer where spill(layer) is not null.
  void segment_rows(int64_t layer, int64_t* rows) const;
  std::shared_ptr<DeviceBuffer> spill(int64_t layer) const;

  // Gives the rows back; nobody may read them from here on. Idempotent.
  void end();

 private:
  friend class Prefetcher;
  Step(std::shared_ptr<Prefetcher> prefetcher, std::shared_ptr<StepState> state)
      : prefetcher_(std::move(prefetcher)), state_(std::move(state)) {}
  void check_open() const;  // with the prefetcher's mutex_ held

  std::shared_ptr<Prefetcher> prefetcher_;
  std::shared_ptr<StepState> state_;
};

}  // namespace l3ext
