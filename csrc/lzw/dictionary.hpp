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
#include "lzw/team.hpp"

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
    uint64_t key;
    uint32_t id;
  };
  // One thread fills slots, each once, while others may read them. So of a key and its id that
  // another thread sees, both are right; and once it sees the line full, it sees all of its slots.
  struct alignas(64) Line {  // zeros: empty
    uint64_t keys[kEdgesPerLine];
    uint32_t ids[kEdgesPerLine];
    uint32_t edges;  // that lie here or went past

    [[gnu::always_inline]] uint32_t edges_now() const {
      return __atomic_load_n(&edges, __ATOMIC_ACQUIRE);
    }
    // The edge's id, or 0, which is no edge's.
    [[gnu::always_inline]] uint32_t find(uint64_t key) const {
      for (size_t s = 0; s < kEdgesPerLine; ++s) {
        if (__atomic_load_n(&keys[s], __ATOMIC_RELAXED) == key) {
          return __atomic_load_n(&ids[s], __ATOMIC_RELAXED);
        }
      }
      return 0;
    }
    // Counts the edge, and puts it here where there is a free slot.
    [[gnu::always_inline]] bool add(const Slot& slot) {
      const uint32_t place = edges;
      const bool fits = place < kEdgesPerLine;
      if (fits) [[likely]]
        put(place, slot);
      __atomic_store_n(&edges, place + 1, __ATOMIC_RELEASE);
      return fits;
    }
    [[gnu::always_inline]] void put(size_t s, const Slot& slot) {
      __atomic_store_n(&keys[s], slot.key, __ATOMIC_RELAXED);
      __atomic_store_n(&ids[s], slot.id, __ATOMIC_RELAXED);
    }
    Slot at(size_t s) const { return {keys[s], ids[s]}; }
  };

 public:
  static constexpr uint32_t kNone = UINT32_MAX;

  struct Edge {
    uint32_t parent;  // kNone for a single token
    uint32_t token;   // the last token of the codeword
  };

  // A question on its way: made when the line that answers it is asked for from memory, put when it
  // has come. Other edges may be inserted in between, but the table must not grow.
  class Probe {
   public:
    Probe() = default;
    // Asks nothing, and must not be answered.
    static Probe of(uint32_t parent) { return {key_of(parent, 0), nullptr}; }
    uint32_t parent() const { return static_cast<uint32_t>(key_ >> 32); }
    uint32_t token() const { return token_of(key_); }
    // For an insertion: the line, and once it has come the next one, where it is full.
    void prefetch() const { __builtin_prefetch(line_, 1); }
    void prefetch_next() const {
      if (line_ != nullptr && line_->edges_now() >= kEdgesPerLine) {
        __builtin_prefetch(line_ + 1, 1);
      }
    }

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
    Probe asked = probe(parent, token);
    const uint32_t found = answer(asked);
    return found != 0 ? found : kNone;
  }
  // The same in steps, which other threads may take while one inserts. Always inlined: to the
  // compiler a function that only asks for memory does nothing, and a call of it may go.
  [[gnu::always_inline]] Probe probe(uint32_t parent, uint32_t token) const {
    const uint64_t key = key_of(parent, token);
    auto* line = const_cast<Line*>(&lines_[home(key)]);
    __builtin_prefetch(line);
    return {key, line};
  }
  // The same question once the dictionary has grown.
  Probe again(const Probe& probe) const { return this->probe(probe.parent(), probe.token()); }
  // Reads one line: the id; 0, which is no edge's id, where there is no such edge; or kNone: the
  // answer lies further on, in a line that the probe asks for now. It never comes back to a line
  // that is full: what is not there never will be.
  [[gnu::always_inline]] uint32_t ask(Probe& probe) const {
    // In this order: a line that fills up meanwhile must not be passed by.
    const uint32_t edges = probe.line_->edges_now();
    const uint32_t found = probe.line_->find(probe.key_);
    if (found != 0 || edges <= kEdgesPerLine) [[likely]]
      return found;
    const auto line = static_cast<size_t>(probe.line_ - &lines_[0]);
    probe.line_ = const_cast<Line*>(&lines_[next(line)]);
    __builtin_prefetch(probe.line_);
    return kNone;
  }
  // The id, or 0; `probe` is then good for insert().
  [[gnu::always_inline]] uint32_t answer(Probe& probe) const {
    uint32_t found = ask(probe);
    while (found == kNone) found = ask(probe);
    return found;
  }

  // Adds the edge that a probe did not find; its id is the size before. A table that is full grows,
  // by all threads of the team; no other may read it then. Throws std::bad_alloc, or kRuntime at
  // 2^32 - 1 codewords; the dictionary is then as it was.
  [[gnu::always_inline]] uint32_t insert(Probe probe, Team* team = nullptr) {
    const uint32_t id = size();
    if (id == kNone) [[unlikely]]
      refuse();
    if (room() == 0) [[unlikely]] {
      reserve_slots(size_t{id} + 1, team);
      probe = again(probe);
    }
    edges_.push_back({probe.parent(), probe.token()});
    const Slot slot{probe.key_, id};
    if (!probe.line_->add(slot)) [[unlikely]]
      place(next(static_cast<size_t>(probe.line_ - &lines_[0])), slot);
    return id;
  }
  // Adds an edge that is not there.
  uint32_t insert(uint32_t parent, uint32_t token) {
    Probe asked = probe(parent, token);
    answer(asked);
    return insert(asked);
  }

  // Edges that can be inserted while all probes stay good; one more, and the table grows.
  size_t room() const { return capacity_ - (edges_.size() - vocab_size_); }

  // Forgets the codewords with ids >= size, and gives their memory back.
  void truncate(uint32_t size) noexcept;

  // Makes room for `size` codewords at once. Throws std::bad_alloc.
  void reserve_slots(size_t size, Team* team = nullptr);

 private:
  // Never 0, which is an empty slot's.
  static uint64_t key_of(uint32_t parent, uint32_t token) {
    return (uint64_t{parent} << 32 | token) + 1;
  }
  static uint32_t token_of(uint64_t key) { return static_cast<uint32_t>(key) - 1; }
  // Scales a hash to the number of lines, whatever that is, and keeps the hashes' order.
  size_t home(uint64_t key) const {
    uint64_t h = key * 0x9E3779B97F4A7C15u;
    h ^= h >> 32;
    h *= 0xD6E8FEB86659FD93u;
    return static_cast<size_t>(((h >> 32) * lines_.size()) >> 32);
  }
  size_t next(size_t line) const { return line + 1 == lines_.size() ? 0 : line + 1; }
  [[noreturn]] static void refuse();
  void place(size_t line, const Slot& slot) noexcept;
  void move_to(size_t lines, Team* team = nullptr);
  // What a part of a move leaves: so many edges, whole lines of them from a line of the old table.
  struct Left {
    size_t line;
    size_t edges;
  };
  Left move_part(FlatArray<Line>& old, size_t part, size_t parts) noexcept;
  void remove_from(uint32_t size) noexcept;

  // Apart from what an insertion writes, which would take the line from all threads that look up.
  alignas(64) FlatArray<Line> lines_;
  size_t capacity_ = 0;  // edges that the table takes before it grows
  uint32_t vocab_size_;
  alignas(64) FlatArray<Edge> edges_;  // by id
};

}  // namespace l3ext::lzw
