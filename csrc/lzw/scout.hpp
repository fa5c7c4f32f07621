// Reads ahead of the parse: guesses the phrases of a stretch of tokens against the dictionary as it
// is, many walks at a time. A walk down a trie is a chain of cache misses, and the parse is one
// walk after the other; but walks that do not wait for each other's insertions wait for memory
// together.
//
// A guess is a fact all the same: a codeword that is in the dictionary stays there, with its id.
// The parse starts its own walk at the guess instead of at a single token, and so is exact whatever
// the guesses are. They are worth more the more of them end where the parse's phrases end. Nor does
// it matter if the parse inserts meanwhile, in another thread.
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

// Tokens [begin .. end) of the stretch are a codeword, probe.parent(). The probe is of that and the
// token at `end`; where the document ends there, it asks nothing.
struct Guess {
  Dictionary::Probe probe;
  uint32_t begin;
  uint32_t end;
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
  std::span<Guess> guess(const Dictionary& dictionary, const Documents<Token>& documents,
                         size_t document, int64_t begin, int64_t end);

 private:
  // Some 250 ns of work between a walk's steps: what a line takes from memory.
  static constexpr size_t kWalks = 32;
  // Far shorter than a stretch, so that walks end together although documents differ in length; and
  // far longer than a phrase, as the first guesses after a cut are wrong.
  static constexpr int64_t kTokensPerPart = 128;

  struct Part {
    Guess* begin;
    Guess* end;
  };

  FlatArray<Guess> guesses_;
  FlatArray<Part> parts_;
};

// One walk: a part of the stretch, phrase after phrase. Positions count from the stretch's begin.
template <Parse parse, typename Token>
class ScoutWalk {
 public:
  ScoutWalk() = default;
  // Guesses the phrases that start in [begin .. end), which is in the document that ends at
  // *document_end and in those after it.
  ScoutWalk(uint32_t begin, uint32_t end, const int64_t* document_end, Guess* out)
      : phrase_{{}, begin, 0}, part_end_(end), out_(out), document_end_(document_end) {}

  Guess* out() const { return out_; }

  // Goes to the first phrase that needs a look-up; false where there is none. tokens: the
  // stretch's, of which the first is tokens[first] of the corpus.
  bool start(const Dictionary& dictionary, const Token* tokens, int64_t first) {
    while (phrase_.begin < part_end_) {
      // Further on than a walk can come: it has 2^31 positions, and a phrase is shorter than that.
      const int64_t document_end = std::min<int64_t>(*document_end_++ - first, UINT32_MAX);
      // The paper's phrases end with the document's last token, known or not: it is not looked up.
      limit_ = static_cast<uint32_t>(document_end) - (parse == Parse::kPaper ? 1 : 0);
      phrase_.end = phrase_.begin + 1;
      if (phrase_.end < limit_) {
        look_up(dictionary, tokens, static_cast<uint32_t>(tokens[phrase_.begin]));
        return true;
      }
      phrase_.begin = static_cast<uint32_t>(document_end);
    }
    return false;
  }

  // Reads the answer to the last look-up and makes the next; false at the end of the part. Where a
  // phrase ends is not predictable, so nothing branches on it: `found` is 0 there.
  [[gnu::always_inline]] bool step(const Dictionary& dictionary, const Token* tokens,
                                   int64_t first) {
    const uint32_t found = dictionary.ask(phrase_.probe);
    if (found == Dictionary::kNone) [[unlikely]]
      return true;  // the next line has its turn like any other
    const uint32_t ends = unpredictable(uint32_t{found == 0});
    *out_ = phrase_;  // stays where the phrase ends, else the next overwrites it
    out_ += ends;
    // Where the next phrase starts if this one ends; the paper's takes the unknown token along.
    const uint32_t next = phrase_.end + (parse == Parse::kPaper ? ends : 0);
    phrase_.begin += (next - phrase_.begin) & -ends;
    phrase_.end = next + 1;
    const uint32_t id = found | (static_cast<uint32_t>(tokens[next]) & -ends);
    if (phrase_.end < limit_ && phrase_.begin < part_end_) [[likely]] {
      look_up(dictionary, tokens, id);
      return true;
    }
    return phrase_.begin < part_end_ && next_document(dictionary, tokens, first, id);
  }

 private:
  [[gnu::always_inline]] void look_up(const Dictionary& dictionary, const Token* tokens,
                                      uint32_t id) {
    phrase_.probe = dictionary.probe(id, static_cast<uint32_t>(tokens[phrase_.end]));
  }
  bool next_document(const Dictionary& dictionary, const Token* tokens, int64_t first,
                     uint32_t id) {
    if (phrase_.end == limit_) {  // the document's end cuts the phrase
      if (parse == Parse::kPaper) {
        look_up(dictionary, tokens, id);  // its last token; the answer is not waited for
      } else {
        phrase_.probe = Dictionary::Probe::of(id);
      }
      *out_++ = phrase_;
    }
    phrase_.begin = limit_ + (parse == Parse::kPaper ? 1 : 0);
    return start(dictionary, tokens, first);
  }

  Guess phrase_;           // known up to `end`, of which the probe asks
  uint32_t limit_ = 0;     // of the document: nothing is looked up from here on
  uint32_t part_end_ = 0;  // no phrase starts from here on
  Guess* out_ = nullptr;
  const int64_t* document_end_ = nullptr;  // of the document after this one
};

template <Parse parse, typename Token>
std::span<Guess> Scout::guess(const Dictionary& dictionary, const Documents<Token>& documents,
                              size_t document, int64_t begin, int64_t end) {
  std::array<ScoutWalk<parse, Token>, kWalks> walks;
  std::array<size_t, kWalks> part_of;  // walk
  guesses_.resize(2 * static_cast<size_t>(end - begin));
  parts_.truncate(0);
  const std::span<const int64_t> offsets = documents.offsets;
  const Token* tokens = documents.tokens + begin;
  int64_t at = begin;
  // Gives walk w the next part that has something to look up; false where there is none.
  const auto go_on = [&](size_t w) {
    while (at < end) {
      // Cuts between documents where it can: there a phrase does start.
      int64_t stop = std::min(end, at + kTokensPerPart);
      size_t stop_document = document;
      while (stop < end && offsets[stop_document + 1] <= stop) ++stop_document;
      if (stop < end && offsets[stop_document] > at) stop = offsets[stop_document];
      // A phrase is a token or more, and a step writes one guess ahead.
      Guess* out = guesses_.data() + (at - begin) + static_cast<int64_t>(parts_.size());
      part_of[w] = parts_.size();
      parts_.push_back({out, out});
      walks[w] = {static_cast<uint32_t>(at - begin), static_cast<uint32_t>(stop - begin),
                  &offsets[document + 1], out};
      at = stop;
      document = stop_document;
      if (walks[w].start(dictionary, tokens, begin)) return true;
    }
    return false;
  };
  size_t active = 0;
  while (active < kWalks && go_on(active)) ++active;
  while (active > 0) {
    for (size_t w = 0; w < active;) {
      if (walks[w].step(dictionary, tokens, begin)) [[likely]] {
        ++w;
        continue;
      }
      parts_[part_of[w]].end = walks[w].out();
      if (go_on(w)) {
        ++w;
      } else {
        --active;
        walks[w] = walks[active];
        part_of[w] = part_of[active];
      }
    }
  }
  Guess* out = guesses_.data();
  for (size_t p = 0; p < parts_.size(); ++p) out = std::copy(parts_[p].begin, parts_[p].end, out);
  return {guesses_.data(), out};
}

}  // namespace l3ext::lzw
