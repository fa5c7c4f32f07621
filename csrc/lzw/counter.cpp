#include "lzw/counter.hpp"

#include <algorithm>

#include "core/error.hpp"
#include "lzw/scout.hpp"

namespace l3ext::lzw {
namespace {

// Some 10 ms of work: Ctrl-C feels immediate, and the hook (which takes Python's lock) costs
// nothing.
constexpr int64_t kTokensPerPoll = 1 << 18;

// Long enough for the walks of a scout to be busy together, and short enough that most guesses hold
// (98 % for prose) and what they read is still in the second-level cache.
constexpr int64_t kTokensPerStretch = 2048;
// So that a count is there when the parse comes to it.
constexpr size_t kGuessesAhead = 8;

// Asks the hook once per kTokensPerPoll tokens.
class Poll {
 public:
  explicit Poll(const InterruptHook& interrupted) : interrupted_(interrupted) {}
  void operator()(int64_t position) {
    if (position < next_) [[likely]]
      return;
    next_ = position + kTokensPerPoll;
    if (interrupted_ && interrupted_()) {
      throw Error(ErrorCode::kInterrupted, concat("interrupted at token ", position,
                                                  "; the counter is as before the update"));
    }
  }

 private:
  const InterruptHook& interrupted_;
  int64_t next_ = kTokensPerPoll;
};

uint32_t checked_vocab_size(int64_t vocab_size) {
  L3EXT_CHECK(vocab_size >= 1 && vocab_size <= INT32_MAX,
              "vocab_size: expected 1 to 2147483647, got ", vocab_size);
  return static_cast<uint32_t>(vocab_size);
}

uint32_t checked_max_codewords(std::optional<int64_t> max_codewords, int64_t vocab_size) {
  if (!max_codewords) return Dictionary::kNone;
  L3EXT_CHECK(*max_codewords >= vocab_size && *max_codewords < Dictionary::kNone,
              "max_codewords: expected vocab_size = ", vocab_size,
              " (every token is a codeword) to 4294967294, got ", *max_codewords);
  return static_cast<uint32_t>(*max_codewords);
}

void check_offsets(std::span<const int64_t> offsets, int64_t num_tokens) {
  L3EXT_CHECK(!offsets.empty(), "offsets: expected documents + 1 entries, got none");
  L3EXT_CHECK(offsets[0] == 0, "offsets: expected offsets[0] = 0, got ", offsets[0]);
  for (size_t d = 1; d < offsets.size(); ++d) {
    L3EXT_CHECK(offsets[d] >= offsets[d - 1], "offsets: expected no fall, got offsets[", d,
                "] = ", offsets[d], " after offsets[", d - 1, "] = ", offsets[d - 1]);
  }
  L3EXT_CHECK(offsets.back() == num_tokens,
              "offsets: expected the last to be the number of tokens, ", num_tokens, ", got ",
              offsets.back());
}

template <typename Token>
[[noreturn]] void reject_token(std::span<const Token> tokens, std::span<const int64_t> offsets,
                               int64_t position, uint32_t vocab_size) {
  const auto next = std::upper_bound(offsets.begin(), offsets.end(), position);
  const int64_t document = next - offsets.begin() - 1;
  throw Error(ErrorCode::kValue,
              concat("tokens: expected ids in [0, ", vocab_size, "), got ",
                     tokens[static_cast<size_t>(position)], " at position ", position,
                     " (document ", document, ", token ", position - *(next - 1), " of it)"));
}

template <typename Token>
void check_tokens(std::span<const Token> tokens, std::span<const int64_t> offsets,
                  uint32_t vocab_size, Poll poll) {
  constexpr int64_t kBlock = 4096;  // checked as one, so that the compiler vectorises it
  const auto n = static_cast<int64_t>(tokens.size());
  const auto outside = [&](int64_t i) {
    return static_cast<uint64_t>(int64_t{tokens[static_cast<size_t>(i)]}) >= vocab_size;
  };
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(n, begin + kBlock);
    bool bad = false;
    for (int64_t i = begin; i < end; ++i) bad |= outside(i);
    if (bad) [[unlikely]] {
      int64_t position = begin;
      while (!outside(position)) ++position;
      reject_token(tokens, offsets, position, vocab_size);
    }
    poll(end);
  }
}

}  // namespace

Counter::Counter(int64_t vocab_size, Parse parse, std::optional<int64_t> max_codewords)
    : parse_(parse),
      max_codewords_(checked_max_codewords(max_codewords, vocab_size)),
      dictionary_(checked_vocab_size(vocab_size)) {
  const auto size = static_cast<size_t>(vocab_size);
  counts_.resize(size);
  frequency_.resize(size);
  std::fill_n(counts_.data(), size, 0);
  std::fill_n(frequency_.data(), size, 0);
}

void Counter::update(std::span<const int32_t> tokens, std::span<const int64_t> offsets,
                     const InterruptHook& interrupted) {
  update_checked(tokens, offsets, interrupted);
}

void Counter::update(std::span<const int64_t> tokens, std::span<const int64_t> offsets,
                     const InterruptHook& interrupted) {
  update_checked(tokens, offsets, interrupted);
}

template <typename Token>
void Counter::update_checked(std::span<const Token> tokens, std::span<const int64_t> offsets,
                             const InterruptHook& interrupted) {
  check_offsets(offsets, static_cast<int64_t>(tokens.size()));
  check_tokens(tokens, offsets, static_cast<uint32_t>(vocab_size()), Poll(interrupted));
  Journal journal{.old_size = num_codewords(), .increments = {}, .resets = {}};
  Poll poll(interrupted);
  try {
    const Documents<Token> documents{tokens.data(), offsets};
    if (parse_ == Parse::kPaper) {
      parse_all<Parse::kPaper>(documents, journal, poll);
    } else {
      parse_all<Parse::kLzw>(documents, journal, poll);
    }
  } catch (...) {
    undo(journal);
    throw;
  }
  for (const Token token : tokens) ++frequency_[static_cast<size_t>(token)];
  num_tokens_ += static_cast<int64_t>(tokens.size());
}

// Stretch by stretch: guesses the phrases of the next tokens, many at a time, and then parses them
// in order, each from its guess on where there is one.
template <Parse parse, typename Token, typename Poll>
void Counter::parse_all(const Documents<Token>& documents, Journal& journal, Poll& poll) {
  constexpr int64_t kShortest = parse == Parse::kPaper ? 2 : 1;  // a document with a phrase
  const auto [tokens, offsets] = documents;
  const int64_t n = offsets.back();
  Scout scout;
  size_t document = 0;
  for (int64_t i = 0; i < n; poll(i)) {
    while (offsets[document + 1] <= i) ++document;
    const int64_t begin = i;
    const int64_t end = std::min(n, begin + kTokensPerStretch);
    const std::span<const Guess> guesses =
        scout.guess<parse>(dictionary_, documents, document, begin, end);
    size_t next = 0;
    size_t requested = 0;
    while (i < end) {
      const int64_t document_end = offsets[document + 1];
      if (document_end - i < kShortest) {
        i = document_end;
        if (i < n) ++document;
        continue;
      }
      while (next < guesses.size() && begin + guesses[next].begin < i) ++next;
      for (; requested < std::min(guesses.size(), next + kGuessesAhead); ++requested) {
        __builtin_prefetch(&counts_[guesses[requested].id], 1);
      }
      const bool guessed = next < guesses.size() && begin + guesses[next].begin == i;
      const Guess guess = guessed ? guesses[next] : Guess{0, 1, static_cast<uint32_t>(tokens[i])};
      i = parse == Parse::kPaper ? parse_paper(tokens, i, document_end, guess, journal)
                                 : parse_lzw(tokens, i, document_end, guess, journal);
    }
  }
}

template <typename Token>
int64_t Counter::parse_paper(const Token* tokens, int64_t i, int64_t end, const Guess& guess,
                             Journal& journal) {
  uint32_t prefix = guess.id;  // the id of tokens[i .. j)
  int64_t j = i + guess.length;
  uint32_t phrase = Dictionary::kNone;  // the id of tokens[i .. j], kNone where it is new
  for (; j < end; ++j) {
    phrase = dictionary_.find(prefix, static_cast<uint32_t>(tokens[j]));
    // The document's last token ends a phrase whether or not the phrase is known.
    if (phrase == Dictionary::kNone || j + 1 == end) break;
    prefix = phrase;
  }
  count_up(prefix, journal);
  if (phrase == Dictionary::kNone) {
    insert(prefix, static_cast<uint32_t>(tokens[j]), 1);
  } else {
    set_back(phrase, journal);
  }
  return j + 1;
}

template <typename Token>
int64_t Counter::parse_lzw(const Token* tokens, int64_t i, int64_t end, const Guess& guess,
                           Journal& journal) {
  uint32_t match = guess.id;  // the id of tokens[i .. j)
  int64_t j = i + guess.length;
  for (; j < end; ++j) {
    const uint32_t longer = dictionary_.find(match, static_cast<uint32_t>(tokens[j]));
    if (longer == Dictionary::kNone) break;
    match = longer;
  }
  count_up(match, journal);
  if (j < end) insert(match, static_cast<uint32_t>(tokens[j]), 0);
  return j;
}

// The journal first: where it cannot grow, nothing has changed yet.
void Counter::count_up(uint32_t id, Journal& journal) {
  if (id < journal.old_size) journal.increments.push_back(id);
  ++counts_[id];
}

void Counter::set_back(uint32_t id, Journal& journal) {
  if (id < journal.old_size) {
    journal.resets.push_back({journal.increments.size(), counts_[id], id});
  }
  counts_[id] = 1;
}

void Counter::insert(uint32_t parent, uint32_t token, int64_t count) {
  if (num_codewords() == max_codewords_) return;
  dictionary_.insert(parent, token);
  counts_.push_back(count);
}

void Counter::undo(Journal& journal) noexcept {
  auto& [old_size, increments, resets] = journal;
  for (;; increments.pop_back()) {
    for (; resets.size() > 0 && resets.back().time == increments.size(); resets.pop_back()) {
      counts_[resets.back().id] = resets.back().old_count;
    }
    if (increments.size() == 0) break;
    --counts_[increments.back()];
  }
  counts_.truncate(old_size);
  dictionary_.truncate(old_size);
}

std::vector<int64_t> Counter::codeword(uint32_t id) const {
  std::vector<int64_t> tokens;
  for (; id != Dictionary::kNone; id = dictionary_.edge(id).parent) {
    tokens.push_back(dictionary_.edge(id).token);
  }
  std::reverse(tokens.begin(), tokens.end());
  return tokens;
}

}  // namespace l3ext::lzw
