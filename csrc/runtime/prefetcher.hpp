// Serves lookup tables that do not live where attention runs. The ids of a step are known before
// its first layer, so begin() starts fetching every layer's rows, nearest layer first, and returns;
// wait() makes sure that one layer's rows are there; end() gives their place back.
//
// Each layer has one arena of rows [hot | ring]: the hot set is loaded once and stays; the ring
// holds what open steps fetched, and remembers what earlier steps did until it comes round.
// Attention reads the arena through row ranges, so that a hot token, a fetched one and a resident
// table look the same to it, and fixed pointers stay fixed. A table in RAM whose device is the host
// needs none of this: it is its own arena, and is read where it lies.
//
// A step that does not fit the ring neither waits nor fails: it gets a buffer of its own for that
// layer, with all its rows in it (the ledger counts it as spilled).
//
// Near data: of tokens that choose_near() picks no rows are brought. Their segments are empty here,
// and who attends adds what they get from the table, beside its memory.
//
// On a device with streams no call waits for the device: wait() makes the caller's stream wait,
// end() marks the point of the stream after which rows may be overwritten, and copies start there.
//
// Everything is thread-safe. Ownership: a Step keeps the Prefetcher's memory alive, a DeviceBuffer
// keeps itself; close() stops the workers, and what comes after gets an error. In a child of fork()
// everything gets one at once, but for what lets go, close(), end() and destructors: they do
// nothing there, and what they would have given back stays the parent's.
#pragma once

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

#include "core/home_process.hpp"
#include "runtime/device.hpp"
#include "runtime/ledger.hpp"
#include "runtime/near_data.hpp"
#include "runtime/table.hpp"

namespace l3ext {

struct Block;
struct Fetch;
struct PrefetchLayer;
struct RingBlock;
struct StepLayer;
struct StepState;

struct PrefetchOptions {
  int64_t cache_bytes = 0;                  // hot sets of all layers together
  int64_t ring_bytes = int64_t{128} << 20;  // rings of all layers together
  int num_workers = 2;
  int queue_depth = 16;                      // reads of one worker on their way at once
  int64_t piece_bytes = int64_t{256} << 10;  // the most that one read brings
  int64_t record_steps = 1024;               // kept by the ledger
  bool in_place = true;  // read tables in RAM where they lie, if the device is the host
  // Fill rows with NaN when they are given back, and forget them: shows a use after end().
  bool poison = false;
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

  // From the next step on leaves rows in the table where that costs less (nothing: never). Tables
  // that are read in place have no part in it. Throws kValue for the costs, and where a table is
  // not in host memory.
  void use_near_data(const std::optional<NearDataCosts>& costs);

  // `token_ids`: any order; a token's repeats are the queries that near data weighs. Throws kValue
  // naming the first id outside [0, V) before anything is queued.
  static Step begin(const std::shared_ptr<Prefetcher>& self, std::span<const int32_t> token_ids);

  // Stops the workers and lets go of tables and arenas, once the device has read what ended steps
  // left it. Open steps end, and nothing may be reading their rows. Idempotent.
  void close();

  // Throws kRuntime in a child of fork(). For callers who would otherwise do something first.
  void check_home() const { home_.check("runtime"); }
  bool is_home() const { return home_.is_here(); }

  struct LayerPlacement {
    int64_t table_bytes = 0;
    bool in_place = false;
    int64_t hot_tokens = 0;
    int64_t hot_bytes = 0;
    int64_t ring_bytes = 0;
  };
  const std::vector<LayerPlacement>& placement() const { return placement_; }
  int64_t num_layers() const { return static_cast<int64_t>(placement_.size()); }
  std::shared_ptr<DeviceBuffer> arena(int64_t layer) const;
  int64_t arena_rows(int64_t layer) const;
  const TableShape& shape(int64_t layer) const;
  const Device& device() const { return *device_; }
  const std::shared_ptr<Ledger>& ledger() const { return ledger_; }

 private:
  struct Spare;
  struct Worker;

  Prefetcher(std::vector<Table> tables, std::shared_ptr<Device> device,
             const PrefetchOptions& options);

  std::unique_ptr<PrefetchLayer> make_layer(Table table, int64_t index, int64_t layers);
  void start_workers();
  void stop_workers();
  void load_hot_sets();
  void wait_for_the_device() noexcept;

  void work(int index, Worker& worker);
  void take_reads(int index, Worker& worker, std::unique_lock<std::mutex>& lock);
  bool take_copies(int index, Worker& worker, std::unique_lock<std::mutex>& lock);
  void complete_read(int index, Worker& worker, std::unique_lock<std::mutex>& lock);

  // With mutex_ held:
  std::shared_ptr<Fetch> next_fetch();
  void started(Fetch& fetch, int worker, std::vector<FencePtr>& after);
  void finished(Fetch& fetch, int worker, int64_t pieces, const FencePtr& copied,
                const std::exception_ptr& error);
  void cancel(Fetch& fetch);
  void complete(Fetch& fetch);
  void place(StepLayer& layer, std::span<const int32_t> tokens, std::span<const int64_t> queries);
  void place_near(StepLayer& layer, std::span<const int32_t> tokens,
                  std::span<const int64_t> queries);
  bool place_in_ring(StepLayer& layer, std::span<const int32_t> tokens);
  void place_in_own_buffer(StepLayer& layer, std::span<const int32_t> tokens);
  std::shared_ptr<DeviceBuffer> take_spare(size_t bytes, std::vector<FencePtr>& fences);
  void enqueue(const std::shared_ptr<Fetch>& fetch);
  void end_locked(StepState& step, const FencePtr& read);
  void leave(Fetch& fetch);
  void unpin(PrefetchLayer& layer, RingBlock& block);
  void retire(Fetch& fetch);
  void check_open() const;

  void check_layer(int64_t layer) const;

  const PrefetchOptions options_;
  const HomeProcess home_;
  const std::shared_ptr<Device> device_;
  const std::shared_ptr<Ledger> ledger_;
  int64_t vocab_size_ = 0;
  std::vector<LayerPlacement> placement_;

  mutable std::mutex mutex_;      // guards all below and what they point to
  std::condition_variable work_;  // there is something in the queue, or stopping
  std::condition_variable done_;  // a fetch is complete, a step ended, or closed
  std::vector<std::unique_ptr<PrefetchLayer>> layers_;
  std::deque<std::shared_ptr<Fetch>> queue_;
  std::unordered_set<StepState*> open_steps_;
  std::vector<Spare> spares_;
  size_t lent_ = 0;  // buffers of their own that fetches have
  std::optional<NearDataCosts> near_data_;
  std::unique_ptr<CopyQueue> fills_;  // of what is poisoned
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

  // On the host blocks until the rows of `layer` are there. On a device with streams blocks until
  // their copies are issued, and makes `stream` wait for these (null: the device's default stream).
  // `interrupted` is asked some ten times a second and stops the waiting with kInterrupted. Throws
  // kIo where a read failed or a checksum did not match (the runtime and later steps go on), kValue
  // for the layer, kRuntime after end() or close() and where the device failed.
  void wait(int64_t layer, void* stream = nullptr, const std::function<bool()>& interrupted = {});

  // After wait(): segment s lies in rows rows[2s]..rows[2s+1] of this buffer. It is the layer's
  // arena, the same for every step, unless the step has a buffer of its own.
  std::shared_ptr<DeviceBuffer> rows(int64_t layer) const;
  void segment_rows(int64_t layer, int64_t* rows) const;
  bool spilled(int64_t layer) const;
  // The segments whose rows were left in the table, ascending; empty ones here.
  std::vector<int64_t> near_segments(int64_t layer) const;

  // Gives the rows back: nobody may read them from here on but what has been put into `stream`
  // (null: the device's default stream). Idempotent.
  void end(void* stream = nullptr);

 private:
  friend class Prefetcher;
  Step(std::shared_ptr<Prefetcher> prefetcher, std::shared_ptr<StepState> state)
      : prefetcher_(std::move(prefetcher)), state_(std::move(state)) {}
  void check_open() const;  // with the prefetcher's mutex_ held
  // That mutex, of a step that is open.
  std::unique_lock<std::mutex> lock_open() const;

  std::shared_ptr<Prefetcher> prefetcher_;
  std::shared_ptr<StepState> state_;
};

}  // namespace l3ext
