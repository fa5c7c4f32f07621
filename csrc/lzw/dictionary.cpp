#include "lzw/dictionary.hpp"

#include <algorithm>
#include <bit>
#include <cstring>

#include "core/error.hpp"

namespace l3ext::lzw {
namespace {

// The smallest power of two that keeps the load at or below 3/4: linear probing then finds a hit in
// 2.5 slots and a miss in 8.5, mostly within one cache line of 8.
size_t slots_for(size_t edges) {
  return std::max<size_t>(2, std::bit_ceil(edges + (edges + 2) / 3));
}

}  // namespace

Dictionary::Dictionary(uint32_t vocab_size) : vocab_size_(vocab_size) {
  edges_.resize(vocab_size);
  for (uint32_t token = 0; token < vocab_size; ++token) edges_[token] = {kNone, token};
  reserve_slots(vocab_size);
}

uint32_t Dictionary::insert(uint32_t parent, uint32_t token) {
  const uint32_t id = size();
  if (id == kNone) {
    throw Error(ErrorCode::kRuntime,
                "dictionary: expected at most 4294967295 codewords; count the "
                "corpus in parts");
  }
  // Single tokens need no slot: a walk starts at the token's own id.
  if (size_t{id} - vocab_size_ + 1 > slots_.size() / 4 * 3) reserve_slots(size_t{id} + 1);
  edges_.push_back({parent, token});
  place(id);
  return id;
}

void Dictionary::truncate(uint32_t size) noexcept {
  edges_.truncate(size);
  const size_t slots = slots_for(size - vocab_size_);
  if (slots < slots_.size()) slots_.truncate(slots);
  rebuild();
}

void Dictionary::reserve_slots(size_t size) {
  const size_t slots = slots_for(size - vocab_size_);
  if (slots <= slots_.size()) return;
  slots_.resize(slots);
  rebuild();
}

void Dictionary::place(uint32_t id) noexcept {
  const uint64_t h = hash(edges_[id].parent, edges_[id].token);
  size_t i = h >> shift_;
  while (slots_[i].id != kNone) i = (i + 1) & mask_;
  slots_[i] = {id, static_cast<uint32_t>(h)};
}

// The edges by id hold everything, so that the table is refilled in place and never held twice.
void Dictionary::rebuild() noexcept {
  mask_ = slots_.size() - 1;
  shift_ = 64 - std::countr_zero(slots_.size());
  std::memset(static_cast<void*>(slots_.data()), 0xFF, slots_.nbytes());
  for (uint32_t id = vocab_size_; id < size(); ++id) place(id);
}

}  // namespace l3ext::lzw
