// A circular buffer of row blocks that remembers: a block stays, and is found again, until the ring
// comes round to its place. So it serves as the cache of what recent steps used (first in, first
// out), and as the room of the steps that are open, whose blocks are pinned and passed over.
#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <span>
#include <vector>

#include "runtime/device.hpp"

namespace l3ext {

struct Fetch;  // what brings a block's rows

// A token's rows in the ring.
struct RingBlock {
  int64_t token = -1;  // -1: its rows are of no use to anybody who does not hold it already
  int64_t begin = 0;   // row in [0, rows of the ring)
  int64_t rows = 0;
  int64_t pins = 0;              // nobody else's rows go here while it has any
  std::shared_ptr<Fetch> fetch;  // not complete yet; null: its copies are at least issued
  std::vector<FencePtr> landed;  // pass when the rows are there
  std::vector<FencePtr> fences;  // must pass, beside those, before other rows go here

  void add_fence(const FencePtr& fence);
};

// Not thread-safe. Blocks stay where they are in memory until they are evicted.
class BlockRing {
 public:
  // `rows` in all; tokens are 0..vocab_size-1. Throws std::bad_alloc.
  BlockRing(int64_t rows, int64_t vocab_size);

  int64_t rows() const { return rows_; }
  // The block of a token; null: not here.
  RingBlock* find(int64_t token) const { return blocks_of_tokens_[token]; }

  // A pinned block of `rows` rows (at least 1) for a token that is not here; null where pinned
  // blocks leave no room. What had to go is unpinned blocks, whose fences are added to `fences`.
  RingBlock* allocate(int64_t token, int64_t rows, std::vector<FencePtr>& fences);

  // Of all blocks: what must pass before the memory may go.
  std::vector<FencePtr> fences() const;

  // find() will not name it any more; who has pinned it goes on using it.
  void forget(RingBlock& block);

 private:
  using Position = std::list<RingBlock>::iterator;

  const int64_t rows_;
  std::list<RingBlock> blocks_;               // in the order of their rows
  Position next_;                             // the first block that ends after at_
  int64_t at_ = 0;                            // where the next block goes if there is room
  std::vector<RingBlock*> blocks_of_tokens_;  // [vocab_size]
};

}  // namespace l3ext
