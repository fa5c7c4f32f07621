// Counter::merge(): another counter's codewords added to this one's.
//
// A codeword's parent stands before it, so one pass over the other's codewords in id order maps
// them to ours: the parent's image is known when the child comes. That pass only inserts, which can
// be undone; what it finds is kept, 4 bytes a codeword, for a second pass that only adds and cannot
// fail. The cost is one probe of this dictionary per codeword of the other.
#include <algorithm>

#include "core/error.hpp"
#include "lzw/counter.hpp"

namespace l3ext::lzw {
namespace {

constexpr uint32_t kAhead = 16;  // codewords: some 10 ns each hide the memory's latency
constexpr uint32_t kCodewordsPerPoll = 1 << 16;  // some milliseconds, as a probe may miss the cache

const char* name_of(Parse parse) { return parse == Parse::kPaper ? "paper" : "lzw"; }

}  // namespace

void Counter::merge(const Counter& other, const InterruptHook& interrupted) {
  L3EXT_CHECK(other.vocab_size() == vocab_size(), "other: expected vocab_size ", vocab_size(),
              ", got ", other.vocab_size());
  L3EXT_CHECK(other.parse_ == parse_, "other: expected parse ", name_of(parse_), ", got ",
              name_of(other.parse_));
  // Frequencies sum up to num_tokens, so that none of them can overflow either.
  L3EXT_CHECK(other.num_tokens_ <= INT64_MAX - num_tokens_, "other: expected at most ",
              INT64_MAX - num_tokens_, " further tokens, got ", other.num_tokens_);
  const auto singles = static_cast<uint32_t>(vocab_size());
  const uint32_t old_size = num_codewords();
  FlatArray<uint32_t> own;  // the other's ids -> ours
  own.resize(other.num_codewords());
  try {
    for (uint32_t id = 0; id < own.size(); ++id) {
      if (id % kCodewordsPerPoll == 0 && interrupted && interrupted()) {
        throw Error(ErrorCode::kInterrupted,
                    concat("interrupted at codeword ", id, "; the counters are as before"));
      }
      // Most parents are long known by then, so that the line can be asked for before its turn.
      if (id >= singles && id + kAhead < own.size()) {
        const auto [parent, token] = other.dictionary_.edge(id + kAhead);
        if (parent < id) static_cast<void>(dictionary_.probe(own[parent], token));
      }
      own[id] = id < singles ? id
                             : find_or_insert(own[other.dictionary_.edge(id).parent],
                                              other.dictionary_.edge(id).token);
      L3EXT_CHECK(other.counts_[id] <= INT64_MAX - counts_[own[id]],
                  "other: expected counts that add up to at most 2^63 - 1, got ", counts_[own[id]],
                  " and ", other.counts_[id]);
    }
  } catch (...) {
    counts_.truncate(old_size);
    dictionary_.truncate(old_size);
    throw;
  }
  for (uint32_t id = 0; id < own.size(); ++id) counts_[own[id]] += other.counts_[id];
  for (size_t token = 0; token < singles; ++token) frequency_[token] += other.frequency_[token];
  num_tokens_ += other.num_tokens_;
  // kUnbounded is the largest value, and stays what it is.
  max_codewords_ = static_cast<uint32_t>(
      std::min<uint64_t>(uint64_t{max_codewords_} + other.max_codewords_, kUnbounded));
}

uint32_t Counter::find_or_insert(uint32_t parent, uint32_t token) {
  const uint32_t found = dictionary_.find(parent, token);
  if (found != Dictionary::kNone) return found;
  const uint32_t id = dictionary_.insert(parent, token);
  counts_.push_back(0);
  return id;
}

}  // namespace l3ext::lzw
