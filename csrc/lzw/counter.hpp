// Counts the codewords of a corpus with an exact LZW parse, document by document.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "lzw/dictionary.hpp"
#include "lzw/flat_array.hpp"
#include "lzw/parse.hpp"
#include "lzw/scout.hpp"
#include "lzw/team.hpp"

namespace l3ext::lzw {

// Asked now and then during a long call; true asks it to stop. May be empty.
using InterruptHook = std::function<bool()>;

class Counter {
 public:
  // Every single token, in id order, count 0. max_codewords bounds the dictionary, the single
  // tokens included: once it holds that many, nothing is inserted any more, and all else goes on.
  // Phrases end where they would have ended with the insertion, their known prefixes are counted,
  // and the paper's parse still sets a known tail back to 1. So the dictionary is the first
  // max_codewords codewords of the unbounded one. Throws kValue unless 1 <= vocab_size < 2^31 and
  // vocab_size <= max_codewords < 2^32 - 1.
  Counter(int64_t vocab_size, Parse parse, std::optional<int64_t> max_codewords = std::nullopt);

  // Counts documents tokens[offsets[d] .. offsets[d+1]). tokens: ids in [0, vocab_size); offsets:
  // starts at 0, never falls, ends at tokens.size(). Up to num_threads threads, this one included,
  // work on a long update, with the same result for any number; more than four have nothing to do.
  // Throws kValue (which, where), kInterrupted, or std::bad_alloc; the counter is then exactly as
  // before the call.
  void update(std::span<const int32_t> tokens, std::span<const int64_t> offsets,
              const InterruptHook& interrupted = {}, int num_threads = 1);
  void update(std::span<const int64_t> tokens, std::span<const int64_t> offsets,
              const InterruptHook& interrupted = {}, int num_threads = 1);

  // Adds another counter's codewords, as if both were one that counted its documents apart: counts,
  // frequencies, num_tokens and max_codewords add up (unbounded stays unbounded); the codewords
  // that are new here follow ours, in the other's order. So merging is associative, a counter that
  // has counted nothing changes nothing but max_codewords, and the counts do not depend on the
  // order. Merged counters are not what one counter would have counted: each part has learnt its
  // phrases anew. Throws kValue where vocab_size or parse differ or a sum does not fit,
  // kInterrupted, kRuntime or std::bad_alloc; both counters are then exactly as before. O(other's
  // codewords) time.
  void merge(const Counter& other, const InterruptHook& interrupted = {});

  int64_t vocab_size() const { return static_cast<int64_t>(frequency_.size()); }
  Parse parse() const { return parse_; }
  std::optional<int64_t> max_codewords() const {
    return max_codewords_ == kUnbounded ? std::nullopt : std::optional<int64_t>(max_codewords_);
  }
  int64_t num_tokens() const { return num_tokens_; }
  uint32_t num_codewords() const { return dictionary_.size(); }
  size_t nbytes() const { return dictionary_.nbytes() + counts_.nbytes() + frequency_.nbytes(); }

  // Codewords by id, that is, in the order of their first insertion.
  std::vector<int64_t> codeword(uint32_t id) const;
  uint32_t last_token(uint32_t id) const { return dictionary_.edge(id).token; }
  std::span<const int64_t> counts() const { return {counts_.data(), counts_.size()}; }
  // How often each token came: [vocab_size].
  std::span<const int64_t> frequency() const { return {frequency_.data(), frequency_.size()}; }

  // Throws kIo with the path; a failed save leaves the old file. load() trusts nothing in the file.
  void save(const std::string& path) const;
  static Counter load(const std::string& path);

 private:
  // An unbounded dictionary never holds as many: there is no such id, insert() throws before.
  static constexpr uint32_t kUnbounded = Dictionary::kNone;

  // What an update does to the counts once nothing can fail any more, in order: counts lie at
  // random places, and a list of them can ask for those to come. 4 bytes a phrase.
  struct Credits {
    struct Reset {
      size_t time;  // increments.size() when the count is set back to 1
      uint32_t id;
    };
    FlatArray<uint32_t> increments;  // ids
    FlatArray<Reset> resets;
  };

  template <typename Token>
  void update_checked(std::span<const Token> tokens, std::span<const int64_t> offsets,
                      const InterruptHook& interrupted, int num_threads);
  template <Parse parse, typename Token, typename Poll>
  void parse_all(const Documents<Token>& documents, Team& team, Credits& credits, Poll& poll);
  template <Parse parse, typename Token>
  int64_t parse_phrase(const Token* tokens, int64_t j, int64_t end, Dictionary::Probe probe,
                       Team& team, Credits& credits);
  void apply(const Credits& credits) noexcept;
  uint32_t find_or_insert(uint32_t parent, uint32_t token);

  Parse parse_;
  uint32_t max_codewords_;
  int64_t num_tokens_ = 0;
  Dictionary dictionary_;
  FlatArray<int64_t> counts_;     // [num_codewords]
  FlatArray<int64_t> frequency_;  // [vocab_size]
};

}  // namespace l3ext::lzw
