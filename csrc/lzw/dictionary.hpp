// The set of codewords as a trie: a codeword is its parent (the codeword without the last token)
// and its last token. Ids count up in insertion order; ids [0, vocab_size) are the single tokens.
//
// The trie's edges lie in one open-addressing table of 8-byte slots (id, hash tag), found by linear
// probing; the edge itself, (parent, token), lies in an array by id. A walk down the trie waits for
// one slot per token: the comparison with the edge is off that chain, the processor runs ahead of
// it. Everything that addresses the table is in hash(): addressing by the hash of the whole path
// instead of (parent, token) would let a walk prefetch slots ahead of the ids that it has not read
// yet.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lzw/flat_array.hpp"

namespace l3ext::lzw {

class Dictionary {
 public:
  static constexpr uint32_t kNone = UINT32_MAX;

  struct Edge {
    uint32_t parent;  // kNone for a single token
    uint32_t token;   // the last token of the codeword
  };

  explicit Dictionary(uint32_t vocab_size);

  uint32_t size() const { return static_cast<uint32_t>(edges_.size()); }
  size_t nbytes() const { return edges_.nbytes() + slots_.nbytes(); }
  const Edge& edge(uint32_t id) const { return edges_[id]; }
  const FlatArray<Edge>& edges() const { return edges_; }

  // The id of `parent` followed by `token`, or kNone.
  uint32_t find(uint32_t parent, uint32_t token) const {
    const uint64_t h = hash(parent, token);
    const uint32_t tag = static_cast<uint32_t>(h);
    for (size_t i = h >> shift_;; i = (i + 1) & mask_) {
      const Slot slot = slots_[i];
      if (slot.id == kNone) return kNone;
      if (slot.tag == tag && edges_[slot.id].parent == parent && edges_[slot.id].token == token) {
        return slot.id;
      }
    }
  }

  // Adds an edge that find() did not find; its id is the size before. Throws std::bad_alloc, or
  // kRuntime at 2^32 - 1 codewords; the dictionary is then as it was.
  uint32_t insert(uint32_t parent, uint32_t token);

  // Forgets the codewords with ids >= size, and gives their memory back.
  void truncate(uint32_t size) noexcept;

  // Makes room for `size` codewords at once. Throws std::bad_alloc.
  void reserve_slots(size_t size);

 private:
  struct Slot {
    uint32_t id;   // kNone: empty
    uint32_t tag;  // the low half of the hash; the high half gave the slot
  };

  static uint64_t hash(uint32_t parent, uint32_t token) {
    uint64_t h = ((uint64_t{parent} << 32) | token) * 0x9E3779B97F4A7C15u;
    h ^= h >> 32;
    return h * 0xD6E8FEB86659FD93u;
  }
  void place(uint32_t id) noexcept;
  void rebuild() noexcept;

  uint32_t vocab_size_;
  FlatArray<Edge> edges_;
  FlatArray<Slot> slots_;  // a power of two
  size_t mask_ = 0;        // slots - 1
  int shift_ = 63;         // 64 - log2(slots)
};

}  // namespace l3ext::lzw
