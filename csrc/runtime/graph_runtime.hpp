// Tables in host memory for steps that a graph holds: no host takes part in a replay. The device
// knows which rows it holds and where the others lie; a kernel brings those of a step, on a branch
// of the caller's stream, and publishes for each layer a directory from tokens to rows, which
// attention reads. The prefetcher (prefetcher.hpp) does more, but needs the host in every step.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "core/home_process.hpp"
#include "runtime/device.hpp"
#include "runtime/table.hpp"

namespace l3ext {

struct GraphOptions {
  int64_t cache_bytes = 0;  // for the hot sets, evenly over the layers
  // For the rows of a step, evenly over the layers. What does not fit stays in host memory, and
  // attention reads it there.
  int64_t ring_bytes = int64_t{128} << 20;
  bool in_place = true;  // on the host: rows are read where the table lies
  int fetch_blocks = 4;  // of the kernel that fetches: the multiprocessors it takes
};

// One step at a time: a step begins where all work of the one before stands in its stream, or in a
// stream that its own has waited for. Thread-safe, for what that is worth then. A child of fork()
// gets an error, and may only let go (see DeleteAtHome).
class GraphRuntime {
 public:
  struct LayerPlacement {
    int64_t table_bytes = 0;
    bool in_place = false;
    int64_t hot_tokens = 0, hot_bytes = 0, ring_bytes = 0;
  };

  // Throws kValue, kType, kRuntime. Waits for the device, once.
  GraphRuntime(std::vector<Table> tables, std::shared_ptr<Device> device,
               const GraphOptions& options);

  void check_home() const { home_.check("runtime"); }
  bool is_home() const { return home_.is_here(); }

  int64_t num_layers() const { return static_cast<int64_t>(layers_.size()); }
  int64_t vocab_size() const { return vocab_size_; }
  const Device& device() const { return *device_; }
  const std::vector<LayerPlacement>& placement() const { return placement_; }

  // Enqueues the fetch of all layers, nearest first. `tokens`: a plan's segment_tokens, of which
  // *num_tokens count, at most `most_tokens`, on the device; read until the last layer's wait() or
  // end(). `step`: any address that no other step has before this one is done with; it tells steps
  // apart.
  void begin(const int32_t* tokens, const int32_t* num_tokens, int64_t most_tokens,
             const void* step, void* stream);
  // `stream` goes on when the layer's directory holds where the rows of the step's tokens are.
  // Throws kRuntime where another step has begun since.
  void wait(int64_t layer, const void* step, void* stream);
  // Joins what nobody waited for, as a capture must; of a step that is over, and in a child of
  // fork(): nothing. Idempotent.
  void end(const void* step, void* stream);

  // int64 [V], the address of each token's rows.
  const std::shared_ptr<DeviceBuffer>& directory(int64_t layer) const;
  // int64 [layers, 4]: see cuda::FetchStepParams::counters.
  const std::shared_ptr<DeviceBuffer>& counters() const { return counters_; }

 private:
  struct Layer {
    // Before what reads it: gone after that.
    std::shared_ptr<TableSource> source;
    std::shared_ptr<void> pinned;
    std::shared_ptr<DeviceBuffer> hot, ring;
    std::shared_ptr<DeviceBuffer> resident, sources, source_bytes, directory;  // int64 [V]
  };

  Layer make_layer(const Table& table, int64_t index, int64_t layers, CopyQueue& queue);
  void load_hot_set(const Table& table, const std::vector<int64_t>& hot_rows, Layer& layer,
                    CopyQueue& queue) const;
  std::shared_ptr<DeviceBuffer> upload(const std::vector<int64_t>& values, CopyQueue& queue) const;
  void check_layer(int64_t layer) const;

  const HomeProcess home_;
  const GraphOptions options_;
  const std::shared_ptr<Device> device_;
  int64_t vocab_size_ = 0;
  std::vector<Layer> layers_;
  std::vector<LayerPlacement> placement_;
  std::shared_ptr<DeviceBuffer> counters_, workspace_;
  std::unique_ptr<Branch> branch_;  // null on the host

  std::mutex mutex_;
  const void* step_ = nullptr;  // that began last
  int64_t joined_ = 0;          // its layers before this one
};

}  // namespace l3ext
