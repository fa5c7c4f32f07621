// The set of codewords as a trie: a codeword is its parent (the codeword without the last token)
// and its last token. Ids count up in insertion order; ids [0, vocab_size) are the single tokens.
//
// The trie's edges lie in one hash table of 64-byte lines. A line holds up to five edges whole
// (parent, token and id), so that a look-up reads one cache line and nothing else. An edge that
// finds its line full goes on to the next one, and every line counts the edges that came by, so
// that a miss ends at the first line that none went past. The table's order is the order of the
// hashes at every size: growth streams from the old table to the new one.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lzw/flat_array.hpp"

namespace l3ext::lzw {

class Dictionary {
  static constexpr size_t kEdgesPerLine = 5;
  struct alignas(64) Line {  // zeros: empty
    uint64_t keys[kEdgesPerLine];
    uint32_t ids[kEdgesPerLine];
    uint32_t edges;  // that lie here or went past

    // The edge's id, or 0: an empty slot's. No early exit, as the slot is not predictable.
    [[gnu::always_inline]] uint32_t find(uint64_t key) const {
      uint32_t found = 0;
#pragma GCC unroll 5
      for (size_t s = 0; s < kEdgesPerLine; ++s) found |= keys[s] == key ? ids[s] : 0;
      return found;
    }
  };

 public:
  static constexpr uint32_t kNone = UINT32_MAX;

  struct Edge {
    uint32_t parent;  // kNone for a single token
    uint32_t token;   // the last token of the codeword
  };

  // A question on its way: made when the line that answers it is asked for from memory, put when it
  // has come. The dictionary must not change in between.
  class Probe {
   public:
    Probe() = default;
    uint32_t parent() const { return static_cast<uint32_t>(key_ >> 32); }

   private:
    friend class Dictionary;
    Probe(uint64_t key, const Line* line) : key_(key), line_(line) {}
    uint64_t key_ = 0;
    const Line* line_ = nullptr;
  };

  explicit Dictionary(uint32_t vocab_size);

  uint32_t size() const { return static_cast<uint32_t>(edges_.size()); }
  size_t nbytes() const { return edges_.nbytes() + lines_.nbytes(); }
  const Edge& edge(uint32_t id) const { return edges_[id]; }
  const FlatArray<Edge>& edges() const { return edges_; }

  // The id of `parent` followed by `token`, or kNone.
  uint32_t find(uint32_t parent, uint32_t token) const {
    const uint64_t key = key_of(parent, token);
    const uint32_t found = answer(Probe(key, &lines_[home(key)]));
    return found != 0 ? found : kNone;
  }
  // The same in two steps; the answer is 0, which is no edge's id, where there is none. Always
  // inlined: to the compiler a function that only asks for memory does nothing, and a call of it
  // may go.
  [[gnu::always_inline]] Probe probe(uint32_t parent, uint32_t token) const {
    const uint64_t key = key_of(parent, token);
    const Line* line = &lines_[home(key)];
    __builtin_prefetch(line);
    return {key, line};
  }
  [[gnu::always_inline]] uint32_t answer(const Probe& probe) const {
    const uint32_t found = probe.line_->find(probe.key_);
    // Whether there is an edge is not predictable; that it may lie further on is rare.
    const uint32_t missing = unpredictable(found == 0 ? UINT32_MAX : 0);
    if ((probe.line_->edges & missing) > kEdgesPerLine) [[unlikely]]
      return answer_after(probe);
    return found;
  }

  // Adds an edge that find() did not find; its id is the size before. Throws std::bad_alloc, or
  // kRuntime at 2^32 - 1 codewords; the dictionary is then as it was.
  uint32_t insert(uint32_t parent, uint32_t token);

  // Forgets the codewords with ids >= size, and gives their memory back.
  void truncate(uint32_t size) noexcept;

  // Makes room for `size` codewords at once. Throws std::bad_alloc.
  void reserve_slots(size_t size);

  // `value`, of which the compiler then knows nothing: it computes with it where it would branch.
  template <typename T>
  [[gnu::always_inline]] static T unpredictable(T value) {
    asm("" : "+r"(value));
    return value;
  }

 private:
  static uint64_t key_of(uint32_t parent, uint32_t token) {
    return (uint64_t{parent} << 32) | token;
  }
  // Scales a hash to the number of lines, whatever that is, and keeps the hashes' order.
  size_t home(uint64_t key) const {
    uint64_t h = key * 0x9E3779B97F4A7C15u;
    h ^= h >> 32;
    h *= 0xD6E8FEB86659FD93u;
    return static_cast<size_t>(((h >> 32) * lines_.size()) >> 32);
  }
  size_t next(size_t line) const { return line + 1 == lines_.size() ? 0 : line + 1; }
  uint32_t answer_after(const Probe& probe) const;
  void place(uint64_t key, uint32_t id) noexcept;
  void move_to(size_t lines);
  void remove_from(uint32_t size) noexcept;

  uint32_t vocab_size_;
  FlatArray<Edge> edges_;  // by id
  FlatArray<Line> lines_;
  size_t capacity_ = 0;  // edges that the table takes before it grows
};

}  // namespace l3ext::lzw
