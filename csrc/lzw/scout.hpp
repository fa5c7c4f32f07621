// Reads ahead of the parse: guesses the phrases of a stretch of tokens against the dictionary as it
// is, many walks at a time. A walk down a trie is a chain of cache misses, and the parse is one
// walk after the other; but walks that do not wait for each other's insertions wait for memory
// together.
//
// A guess is a fact all the same: a codeword that is in the dictionary stays there, with its id.
// The parse starts its own walk at the guess instead of at a single token, and so is exact whatever
// the guesses are. They are worth more the more of them end where the parse's phrases end.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "lzw/dictionary.hpp"
#include "lzw/flat_array.hpp"
#include "lzw/parse.hpp"

namespace l3ext::lzw {

// Tokens [begin .. begin + length) of the stretch are the codeword `id`.
struct Guess {
  uint32_t begin;
  uint32_t length;
  uint32_t id;
};

// Document d is tokens[offsets[d] .. offsets[d + 1]).
template <typename Token>
struct Documents {
  const Token* tokens;
  std::span<const int64_t> offsets;
};

// Keeps its memory from one stretch to the next.
class Scout {
 public:
  // Guesses the phrases that start in tokens[begin .. end), in order: as if one started at `begin`,
  // and at the cuts between the walks. `document` holds tokens[begin]; at most 2^31 tokens. Valid
  // until the next call. Throws std::bad_alloc.
  template <Parse parse, typename Token>
  std::span<const Guess> guess(const Dictionary& dictionary, const Documents<Token>& documents,
                               size_t document, int64_t begin, int64_t end);

 private:
  // Some 100 ns of work between a walk's steps: what a line takes from the last-level cache.
  static constexpr size_t kWalks = 16;

  FlatArray<Guess> guesses_;
};

// One walk: a part of the stretch, phrase after phrase.
template <Parse parse, typename Token>
class ScoutWalk {
 public:
  ScoutWalk() = default;
  // Guesses tokens[begin .. end) of `document` and what follows it; positions count from `stretch`.
  ScoutWalk(const Documents<Token>& documents, size_t document, int64_t stretch, int64_t begin,
            int64_t end, Guess* out)
      : begin_(documents.tokens + begin),
        end_(documents.tokens + end),
        out_(out),
        stretch_(documents.tokens + stretch),
        tokens_(documents.tokens),
        document_end_(documents.offsets.data() + document + 1) {}

  Guess* out() const { return out_; }

  // Goes to the first phrase at or after begin_ that needs a look-up; false where there is none.
  bool start(const Dictionary& dictionary) {
    for (; begin_ < end_; begin_ = tokens_ + *document_end_++) {
      // The paper's phrases end with the document's last token, known or not: it is not looked up.
      limit_ = tokens_ + *document_end_ - (parse == Parse::kPaper ? 1 : 0);
      if (limit_ - begin_ < 2) continue;
      position_ = begin_ + 1;
      look_up(dictionary, static_cast<uint32_t>(*begin_));
      return true;
    }
    return false;
  }

  // Reads the answer to the last look-up and makes the next; false at the end of the part. Where a
  // phrase ends is not predictable, so nothing branches on it: `found` is 0 there.
  [[gnu::always_inline]] bool step(const Dictionary& dictionary) {
    const uint32_t found = dictionary.answer(probe_);
    const size_t ends = Dictionary::unpredictable(size_t{found == 0});
    *out_ = guess(probe_.parent());  // stays where the phrase ends, else the next overwrites it
    out_ += ends;
    // Where the next phrase starts if this one ends; the paper's takes the unknown token along.
    const Token* next = parse == Parse::kPaper ? position_ + ends : position_;
    begin_ += (next - begin_) & -static_cast<ptrdiff_t>(ends);
    position_ = next + 1;
    const uint32_t id = found | (static_cast<uint32_t>(*next) & -static_cast<uint32_t>(ends));
    if (position_ < limit_ && begin_ < end_) [[likely]] {
      look_up(dictionary, id);
      return true;
    }
    return begin_ < end_ && next_document(dictionary, id);
  }

 private:
  Guess guess(uint32_t id) const {
    return {static_cast<uint32_t>(begin_ - stretch_), static_cast<uint32_t>(position_ - begin_),
            id};
  }
  [[gnu::always_inline]] void look_up(const Dictionary& dictionary, uint32_t id) {
    probe_ = dictionary.probe(id, static_cast<uint32_t>(*position_));
  }
  bool next_document(const Dictionary& dictionary, uint32_t id) {
    if (position_ == limit_) *out_++ = guess(id);  // the phrase that the document's end cut
    begin_ = tokens_ + *document_end_++;
    return start(dictionary);
  }

  Dictionary::Probe probe_;          // of `id` = tokens [begin_ .. position_), and *position_
  const Token* begin_ = nullptr;     // of the phrase
  const Token* position_ = nullptr;  // it is known up to here
  const Token* limit_ = nullptr;     // of the document: nothing is looked up from here on
  const Token* end_ = nullptr;       // of the part: no phrase starts from here on
  Guess* out_ = nullptr;
  const Token* stretch_ = nullptr;
  const Token* tokens_ = nullptr;
  const int64_t* document_end_ = nullptr;
};

template <Parse parse, typename Token>
std::span<const Guess> Scout::guess(const Dictionary& dictionary, const Documents<Token>& documents,
                                    size_t document, int64_t begin, int64_t end) {
  struct Part {
    Guess* begin;
    Guess* end;
  };
  std::array<Part, kWalks> parts;
  std::array<ScoutWalk<parse, Token>, kWalks> walks;
  std::array<size_t, kWalks> part_of;  // walk
  guesses_.resize(static_cast<size_t>(end - begin) + kWalks);
  size_t num_parts = 0;
  size_t active = 0;
  const std::span<const int64_t> offsets = documents.offsets;
  for (int64_t at = begin; at < end; ++num_parts) {
    // Cuts evenly, but between documents where it can: there a phrase does start.
    const auto share = static_cast<int64_t>(num_parts + 1);
    int64_t stop = begin + (end - begin) * share / static_cast<int64_t>(kWalks);
    size_t stop_document = document;
    while (stop < end && offsets[stop_document + 1] <= stop) ++stop_document;
    if (stop < end && offsets[stop_document] > at) stop = offsets[stop_document];
    // A phrase is a token or more, and a step writes one guess ahead.
    Guess* out = guesses_.data() + (at - begin) + num_parts;
    parts[num_parts] = {out, out};
    walks[active] = {documents, document, begin, at, stop, out};
    part_of[active] = num_parts;
    if (walks[active].start(dictionary)) ++active;
    at = stop;
    document = stop_document;
  }
  while (active > 0) {
    for (size_t w = 0; w < active;) {
      if (walks[w].step(dictionary)) [[likely]] {
        ++w;
      } else {
        parts[part_of[w]].end = walks[w].out();
        walks[w] = walks[--active];
        part_of[w] = part_of[active];
      }
    }
  }
  Guess* out = guesses_.data();
  for (size_t p = 0; p < num_parts; ++p) out = std::copy(parts[p].begin, parts[p].end, out);
  return {guesses_.data(), out};
}

}  // namespace l3ext::lzw
