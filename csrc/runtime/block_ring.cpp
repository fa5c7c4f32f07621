#include "runtime/block_ring.hpp"

#include <algorithm>
#include <iterator>
#include <utility>

namespace l3ext {
namespace {

void add(std::vector<FencePtr>& fences, const FencePtr& fence) {
  if (std::ranges::find(fences, fence) == fences.end()) fences.push_back(fence);
}

void add(std::vector<FencePtr>& fences, const RingBlock& block) {
  for (const FencePtr& fence : block.landed) add(fences, fence);
  for (const FencePtr& fence : block.fences) add(fences, fence);
}

}  // namespace

void RingBlock::add_fence(const FencePtr& fence) {
  if (!fence) return;
  std::erase_if(fences, [](const FencePtr& old) { return old->passed(); });
  add(fences, fence);
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
  // What needs memory comes first: where it is lacking, nothing has changed.
  std::list<RingBlock> fresh(1);
  for (Position block = first; block != last; ++block) add(fences, *block);
  at_ = begin + rows;
  for (Position block = first; block != last; block = blocks_.erase(block)) {
    forget(*block);
    const int64_t end = block->begin + block->rows;
    if (end > at_) {  // who comes to the rest of it has to wait as well
      block->rows = end - at_;
      block->begin = at_;
      last = block;
      break;
    }
  }
  next_ = last;  // the first that ends after at_
  blocks_.splice(last, fresh);
  RingBlock& block = *std::prev(last);
  block.token = token;
  block.begin = begin;
  block.rows = rows;
  block.pins = 1;
  blocks_of_tokens_[static_cast<size_t>(token)] = &block;
  return &block;
}

std::vector<FencePtr> BlockRing::fences() const {
  std::vector<FencePtr> fences;
  for (const RingBlock& block : blocks_) add(fences, block);
  return fences;
}

void BlockRing::forget(RingBlock& block) {
  if (block.token >= 0) blocks_of_tokens_[static_cast<size_t>(block.token)] = nullptr;
  block.token = -1;
}

}  // namespace l3ext
