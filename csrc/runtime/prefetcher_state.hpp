// What the prefetcher's two translation units share; no part of its interface.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <optional>
#include <vector>

#include "runtime/prefetcher.hpp"

namespace l3ext {

struct Prefetcher::Layer {
  Table table;
  HotSet hot;
  int64_t row_bytes = 0;
  RowRing ring;
  std::shared_ptr<DeviceBuffer> arena;
};

// The rows of one layer in one step, on their way. `next` is how workers share the pieces: each
// takes the next one until none is left; who leaves last completes the fetch.
struct Prefetcher::Fetch {
  Layer* layer = nullptr;
  std::vector<int64_t> first_row;  // of each segment, in `target`
  std::vector<Block> blocks;
  std::vector<Piece> pieces;
  std::vector<uint32_t> part_checksums;  // of pieces that are parts, each set by its worker
  std::shared_ptr<DeviceBuffer> target;
  std::optional<RowRing::Run> run;
  std::atomic<int64_t> next{0};
  int active = 0;  // workers inside
  bool complete = false;
  bool abandoned = false;  // its step ended: whoever completes it gives the rows back
  std::exception_ptr error;
  LayerRecord record;

  int64_t num_pieces() const { return static_cast<int64_t>(pieces.size()); }
  bool exhausted() const { return next.load() >= num_pieces(); }
  void cancel_rest() { next.store(num_pieces()); }
};

struct Prefetcher::StepState {
  std::vector<int32_t> tokens;
  std::vector<std::shared_ptr<Fetch>> fetches;
  StepRecord record;
  bool queued = false;  // begin() got through: the ledger counts it
  bool ended = false;
};

}  // namespace l3ext
