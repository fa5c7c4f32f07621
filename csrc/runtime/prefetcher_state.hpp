// What the prefetcher's translation units share; no part of its interface.
#pragma once

#include <cstdint>
#include <exception>
#include <memory>
#include <span>
#include <vector>

#include "runtime/block_ring.hpp"
#include "runtime/fetch_plan.hpp"
#include "runtime/hot_set.hpp"
#include "runtime/prefetcher.hpp"

namespace l3ext {

struct PrefetchLayer {
  int64_t index = 0;
  Table table;
  int64_t row_bytes = 0;
  bool in_place = false;  // the arena is the table
  HotSet hot;
  std::unique_ptr<BlockRing> ring;
  int64_t arena_rows = 0;  // hot, then ring; or the table's
  std::shared_ptr<DeviceBuffer> arena;
  std::shared_ptr<void> pinned;  // of a table in RAM that copies read
};

// The rows that one layer of one step has to bring, on their way. Workers take piece after piece;
// who finishes the last one completes the fetch. Others may need its rows too: steps that began
// while it was on its way and found their tokens' blocks in the ring.
struct Fetch {
  PrefetchLayer* layer = nullptr;
  std::vector<Block> blocks;
  std::vector<Piece> pieces;
  std::vector<uint32_t> part_checksums;  // of pieces that are parts, each set by its worker
  std::vector<RingBlock*> brings;        // pinned by this fetch until it is complete
  std::shared_ptr<DeviceBuffer> target;  // the arena, or the step's own buffer
  std::vector<FencePtr> after;           // must pass before rows of the target are overwritten
  std::vector<FencePtr> copies;          // one of each worker; pass when the rows have landed
  FencePtr read;                         // passes when the step has read its own buffer
  int64_t next = 0;                      // piece to take
  int64_t active = 0;                    // pieces taken and not finished
  int64_t finished = 0;
  int64_t users = 0;  // open steps that need it
  bool queued = false;
  bool complete = false;  // nothing more will happen, for better or worse
  std::exception_ptr error;
  LayerRecord record;

  int64_t num_pieces() const { return static_cast<int64_t>(pieces.size()); }
  bool exhausted() const { return next >= num_pieces(); }
  bool whole() const { return queued && !error && finished == num_pieces(); }
};

// What a step holds of one layer.
struct StepLayer {
  std::shared_ptr<Fetch> fetch;
  std::vector<std::shared_ptr<Fetch>> needs;  // of other steps
  std::vector<RingBlock*> holds;              // pinned by this step
  std::vector<FencePtr> landed;               // of blocks that were there already
  std::vector<bool> near;                     // of each segment: its rows stay in the table
  std::vector<int64_t> first_row;             // of each segment, in fetch->target
};

// A buffer of a step that has ended. Kept, since fresh memory costs page faults.
struct Prefetcher::Spare {
  std::shared_ptr<DeviceBuffer> buffer;
  std::vector<FencePtr> fences;  // must pass before it is overwritten
};

// What one worker reads into and copies with.
struct Prefetcher::Worker {
  struct Slot {
    std::byte* scratch = nullptr;
    FencePtr copied;  // null, or passes when the scratch is free again
    std::shared_ptr<Fetch> fetch;
    int64_t piece = 0;
    std::exception_ptr error;  // of a read that could not be started
  };

  // Throws kRuntime.
  Worker(std::shared_ptr<Device> device, std::span<const std::unique_ptr<PrefetchLayer>> layers,
         int depth, int64_t piece_bytes);
  ~Worker();
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  std::shared_ptr<Device> device;
  std::unique_ptr<CopyQueue> queue;
  std::vector<std::unique_ptr<TableReader>> readers;  // of each layer; null: in host memory
  std::vector<int> on_their_way;                      // reads, of each layer
  std::byte* staging = nullptr;
  size_t staging_bytes = 0;
  std::vector<Slot> slots;
  // All of a capacity that suffices: a worker must not fail for want of memory.
  std::vector<size_t> reading;  // slots, oldest read first
  std::vector<size_t> free;     // slots, longest free first
  std::vector<size_t> taken;    // slots whose reads are being started
  std::vector<Copy> copies;     // being issued
};

struct StepState {
  std::vector<int32_t> tokens;
  std::vector<StepLayer> layers;
  StepRecord record;
  bool queued = false;  // begin() got through: the ledger counts it
  bool ended = false;
};

}  // namespace l3ext
