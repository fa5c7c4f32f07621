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

// `value`, of which the compiler then knows nothing: it computes with it where it would branch.
template <typename T>
[[gnu::always_inline]] inline T unpredictable(T value) {
  asm("" : "+r"(value));
  return value;
}

class Dictionary {
  static constexpr size_t kEdgesPerLine = 5;
  struct Slot {
    uint32_t parent;
    uint32_t token;
    uint32_t id;
  };
  // Four slots by column, so that they are compared as one, and a fifth.
  struct alignas(64) Line {  // zeros: empty
    using Four [[gnu::vector_size(16)]] = uint32_t;
    Four parents;
    Four tokens;
    Four ids;
    Slot fifth;
    uint32_t edges;  // that lie here or went past

    // The edge's id, or 0: an empty slot's. Never branches, as the slot is not predictable.
    [[gnu::always_inline]] uint32_t find(uint32_t parent, uint32_t token) const {
      const Four found = Four((parents == parent) & (tokens == token)) & ids;
      const uint32_t differs = (fifth.parent ^ parent) | (fifth.token ^ token);
      const uint32_t last =
          unpredictable(fifth.id) & (unpredictable(differs) == 0 ? UINT32_MAX : 0);
      return found[0] | found[1] | found[2] | found[3] | last;
    }
    // Counts the edge, and puts it here where there is a free slot.
    [[gnu::always_inline]] bool add(const Slot& slot) {
      const uint32_t place = edges++;
      if (place < 4) [[likely]] {
        parents[place] = slot.parent;
        tokens[place] = slot.token;
        ids[place] = slot.id;
        return true;
      }
      if (place == 4) fifth = slot;
      return place == 4;
    }
    Slot at(size_t s) const { return s < 4 ? Slot{parents[s], tokens[s], ids[s]} : fifth; }
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
    // Asks nothing, and must not be answered.
    static Probe of(uint32_t parent) { return {key_of(parent, 0), nullptr}; }
    uint32_t parent() const { return static_cast<uint32_t>(key_ >> 32); }
    uint32_t token() const { return static_cast<uint32_t>(key_); }
    void prefetch() const { __builtin_prefetch(line_, 1); }

   private:
    friend class Dictionary;
    Probe(uint64_t key, Line* line) : key_(key), line_(line) {}
    uint64_t key_ = 0;
    Line* line_ = nullptr;
  };

  explicit Dictionary(uint32_t vocab_size);

  uint32_t size() const { return static_cast<uint32_t>(edges_.size()); }
  size_t nbytes() const { return edges_.nbytes() + lines_.nbytes(); }
  const Edge& edge(uint32_t id) const { return edges_[id]; }
  const FlatArray<Edge>& edges() const { return edges_; }

  // The id of `parent` followed by `token`, or kNone.
  uint32_t find(uint32_t parent, uint32_t token) const {
    const uint32_t found = answer(probe(parent, token));
    return found != 0 ? found : kNone;
  }
  // The same in two steps; the answer is 0, which is no edge's id, where there is none. Always
  // inlined: to the compiler a function that only asks for memory does nothing, and a call of it
  // may go.
  [[gnu::always_inline]] Probe probe(uint32_t parent, uint32_t token) const {
    const uint64_t key = key_of(parent, token);
    Line* line = const_cast<Line*>(&lines_[home(key)]);
    __builtin_prefetch(line);
    return {key, line};
  }
  [[gnu::always_inline]] uint32_t answer(const Probe& probe) const {
    const uint32_t found = probe.line_->find(probe.parent(), probe.token());
    // Whether there is an edge is not predictable; that it may lie further on is rare.
    const uint32_t missing = unpredictable(found == 0 ? UINT32_MAX : 0);
    if ((probe.line_->edges & missing) > kEdgesPerLine) [[unlikely]]
      return answer_after(probe);
    return found;
  }

  // Adds the edge that a probe did not find; its id is the size before. Throws std::bad_alloc, or
  // kRuntime at 2^32 - 1 codewords; the dictionary is then as it was.
  [[gnu::always_inline]] uint32_t insert(Probe probe) {
    const uint32_t id = size();
    if (id == kNone) [[unlikely]]
      refuse();
    if (room() == 0) [[unlikely]] {
      reserve_slots(size_t{id} + 1);
      probe = this->probe(probe.parent(), probe.token());
    }
    edges_.push_back({probe.parent(), probe.token()});
    const Slot slot{probe.parent(), probe.token(), id};
    if (!probe.line_->add(slot)) [[unlikely]]
      place(next(static_cast<size_t>(probe.line_ - &lines_[0])), slot);
    return id;
  }
  uint32_t insert(uint32_t parent, uint32_t token) { return insert(probe(parent, token)); }

  // Edges that can be inserted while all probes stay good; one more, and the table grows.
  size_t room() const { return capacity_ - (edges_.size() - vocab_size_); }

  // Forgets the codewords with ids >= size, and gives their memory back.
  void truncate(uint32_t size) noexcept;

  // Makes room for `size` codewords at once. Throws std::bad_alloc.
  void reserve_slots(size_t size);

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
  [[noreturn]] static void refuse();
  void place(size_t line, const Slot& slot) noexcept;
  void move_to(size_t lines);
  void remove_from(uint32_t size) noexcept;

  uint32_t vocab_size_;
  FlatArray<Edge> edges_;  // by id
  FlatArray<Line> lines_;
  size_t capacity_ = 0;  // edges that the table takes before it grows
};

}  // namespace l3ext::lzw
