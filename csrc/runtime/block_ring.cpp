#include "runtime/block_ring.hpp"

#include <utility>

namespace l3ext {

void RingBlock::add_fence(const FencePtr& fence) {
  if (!fence) return;
  std::erase_if(fences, [](const FencePtr& old) { return old->passed(); });
  fences.push_back(fence);
}

BlockRing::BlockRing(int64_t rows, int64_t vocab_size)
    : rows_(rows), next_(blocks_.end()), blocks_of_tokens_(static_cast<size_t>(vocab_size)) {}

RingBlock* BlockRing::allocate(int64_t token, int64_t rows, std::vector<FencePtr>& fences) {
  int64_t begin = at_;
  Position first = next_;  // the first block that ends after `begin`
  Position last = first;   // of [first, last), all of them unpinned, the new block takes the place
  for (bool wrapped = false; true;) {
    if (begin + rows > rows_) {
      if (std::exchange(wrapped, true)) return nullptr;
      begin = 0;
      first = last = blocks_.begin();
    } else if (last == blocks_.end() || last->begin >= begin + rows) {
      break;
    } else if (last->pins > 0) {
      begin = last->begin + last->rows;
      first = ++last;
    } else {
      ++last;
    }
  }
  for (Position block = first; block != last; block = blocks_.erase(block)) {
    fences.insert(fences.end(), block->landed.begin(), block->landed.end());
    fences.insert(fences.end(), block->fences.begin(), block->fences.end());
    forget(*block);
  }
  at_ = begin + rows;
  next_ = last;
  RingBlock& block = *blocks_.emplace(last);
  block.token = token;
  block.begin = begin;
  block.rows = rows;
  block.pins = 1;
  blocks_of_tokens_[static_cast<size_t>(token)] = &block;
  return &block;
}

void BlockRing::forget(RingBlock& block) {
  if (block.token >= 0) blocks_of_tokens_[static_cast<size_t>(block.token)] = nullptr;
  block.token = -1;
}

}  // namespace l3ext
