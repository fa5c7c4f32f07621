#include "lzw/counter.hpp"

#include <algorithm>

#include "core/error.hpp"
#include "lzw/scout.hpp"
#include "lzw/scouts.hpp"

namespace l3ext::lzw {
namespace {

// Some 10 ms of work: Ctrl-C feels immediate, and the hook (which takes Python's lock) costs
// nothing.
constexpr int64_t kTokensPerPoll = 1 << 18;

// Long enough for the walks of a scout to be busy together, and short enough that most guesses hold
// (97 % for prose) and what they read is still in the second-level cache.
constexpr int64_t kTokensPerStretch = 4096;
// A millisecond and more of work: the start of a thread takes some 50 us.
constexpr int64_t kTokensForThreads = 1 << 16;
// The parse takes what two threads guess for it.
constexpr int kMostThreads = 4;
template <typename Token>
constexpr int64_t kTokensPerLine = 64 / sizeof(Token);
// So that a line is in the first-level cache when the parse comes to it, and before that the one
// after it, where it is full. Twice as far ahead it is asked for: another thread may have it.
constexpr size_t kGuessesAhead = 16;

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
                     const InterruptHook& interrupted, int num_threads) {
  update_checked(tokens, offsets, interrupted, num_threads);
}

void Counter::update(std::span<const int64_t> tokens, std::span<const int64_t> offsets,
                     const InterruptHook& interrupted, int num_threads) {
  update_checked(tokens, offsets, interrupted, num_threads);
}

template <typename Token>
void Counter::update_checked(std::span<const Token> tokens, std::span<const int64_t> offsets,
                             const InterruptHook& interrupted, int num_threads) {
  L3EXT_CHECK(num_threads >= 1, "num_threads: expected at least 1, got ", num_threads);
  check_offsets(offsets, static_cast<int64_t>(tokens.size()));
  check_tokens(tokens, offsets, static_cast<uint32_t>(vocab_size()), Poll(interrupted));
  const uint32_t old_size = num_codewords();
  Team team(std::ssize(tokens) < kTokensForThreads ? 1 : std::min(num_threads, kMostThreads));
  Credits credits;
  const Team::Job add_up = [&](size_t thread) {
    if (thread == 0) apply(credits);
    if (thread + 1 != team.size()) return;
    for (const Token token : tokens) ++frequency_[static_cast<size_t>(token)];
  };
  Poll poll(interrupted);
  try {
    const Documents<Token> documents{tokens.data(), offsets};
    if (parse_ == Parse::kPaper) {
      parse_all<Parse::kPaper>(documents, team, credits, poll);
    } else {
      parse_all<Parse::kLzw>(documents, team, credits, poll);
    }
    counts_.resize(num_codewords());
  } catch (...) {
    dictionary_.truncate(old_size);
    throw;
  }
  // A codeword counts 1 from the paper's insertion on, and 0 from the textbook's.
  std::fill(counts_.data() + old_size, counts_.data() + counts_.size(),
            parse_ == Parse::kPaper ? 1 : 0);
  team.run(add_up);
  num_tokens_ += static_cast<int64_t>(tokens.size());
}

// Parses on from a known prefix that ends before tokens[j]; returns where the next phrase starts.
// The probe is of the prefix and tokens[j], where j < end.
template <Parse parse, typename Token>
[[gnu::always_inline]] inline int64_t Counter::parse_phrase(const Token* tokens, int64_t j,
                                                            int64_t end, Dictionary::Probe probe,
                                                            Team& team, Credits& credits) {
  for (; j < end; ++j) {
    const uint32_t found = dictionary_.answer(probe);
    if (found == 0) {
      credits.increments.push_back(probe.parent());
      if (num_codewords() != max_codewords_) [[likely]]
        dictionary_.insert(probe, &team);
      return parse == Parse::kPaper ? j + 1 : j;
    }
    if (j + 1 == end) {
      if (parse == Parse::kPaper) {
        // The document's last token ends a phrase although the phrase is known.
        credits.increments.push_back(probe.parent());
        credits.resets.push_back({credits.increments.size(), found});
      } else {
        credits.increments.push_back(found);
      }
      return end;
    }
    probe = dictionary_.probe(found, static_cast<uint32_t>(tokens[j + 1]));
  }
  credits.increments.push_back(probe.parent());  // the textbook's last match
  return end;
}

// Stretch by stretch: guesses the phrases of the next tokens, many at a time, and then parses them
// in order, each from its guess on where there is one. With a team, others guess ahead meanwhile,
// but where the table may grow.
template <Parse parse, typename Token, typename Poll>
void Counter::parse_all(const Documents<Token>& documents, Team& team, Credits& credits,
                        Poll& poll) {
  constexpr int64_t kShortest = parse == Parse::kPaper ? 2 : 1;  // a document with a phrase
  const auto [tokens, offsets] = documents;
  const int64_t n = offsets.back();
  // The tokens after `end`: the walks jump about in them, so that no hardware prefetcher helps.
  const auto prefetch_after = [&](int64_t end) {
    for (int64_t j = end; j < std::min(n, end + kTokensPerStretch); j += kTokensPerLine<Token>) {
      __builtin_prefetch(tokens + j);
    }
  };
  Scout scout;
  Scouts scouts(team, dictionary_, (n + kTokensPerStretch - 1) / kTokensPerStretch,
                [&](Scout& guessing, int64_t stretch) {
                  const int64_t begin = stretch * kTokensPerStretch;
                  const int64_t end = std::min(n, begin + kTokensPerStretch);
                  prefetch_after(end);
                  const auto next = std::upper_bound(offsets.begin(), offsets.end(), begin);
                  return guessing.guess<parse>(dictionary_, documents,
                                               static_cast<size_t>(next - offsets.begin() - 1),
                                               begin, end);
                });
  size_t document = 0;
  for (int64_t i = 0; i < n; poll(i)) {
    while (offsets[document + 1] <= i) ++document;
    // A phrase inserts one codeword at most and is a token at least: until the stretch's last
    // phrase the table does not grow, and its probes stay good. It never does with a bound that it
    // has room for.
    const auto room = static_cast<int64_t>(dictionary_.room());
    const bool grows = int64_t{max_codewords_} - num_codewords() > room;
    const int64_t longest =
        grows ? std::clamp<int64_t>(room, 1, kTokensPerStretch) : kTokensPerStretch;
    int64_t begin = i;
    int64_t end = std::min(n, begin + longest);
    std::span<const Guess> guesses;
    if (team.size() > 1 && longest == kTokensPerStretch) {
      begin = i / kTokensPerStretch * kTokensPerStretch;
      end = std::min(n, begin + kTokensPerStretch);
      guesses = scouts.take(begin / kTokensPerStretch);
    } else {
      scouts.pause();
      prefetch_after(end);
      guesses = scout.guess<parse>(dictionary_, documents, document, begin, end);
    }
    // Parses the phrase at `at`, or goes on to the next document; returns where to go on.
    const auto parse_one = [&](int64_t at, const Guess* guess) {
      const int64_t document_end = offsets[document + 1];
      if (document_end - at < kShortest) [[unlikely]] {
        if (document_end < n) ++document;
        return document_end;
      }
      if (guess != nullptr) {
        const int64_t known = begin + guess->end;
        return parse_phrase<parse>(tokens, known, document_end, guess->probe, team, credits);
      }
      const auto first = static_cast<uint32_t>(tokens[at]);
      const auto probe = at + 1 < document_end
                             ? dictionary_.probe(first, static_cast<uint32_t>(tokens[at + 1]))
                             : Dictionary::Probe::of(first);
      return parse_phrase<parse>(tokens, at + 1, document_end, probe, team, credits);
    };
    for (size_t g = 0; g < guesses.size(); ++g) {
      guesses[std::min(g + 2 * kGuessesAhead, guesses.size() - 1)].probe.prefetch();
      guesses[std::min(g + kGuessesAhead, guesses.size() - 1)].probe.prefetch_next();
      const int64_t guessed = begin + guesses[g].begin;
      while (i < guessed) i = parse_one(i, nullptr);
      if (i == guessed) [[likely]]
        i = parse_one(i, &guesses[g]);
    }
    while (i < end) i = parse_one(i, nullptr);
  }
}

void Counter::apply(const Credits& credits) noexcept {
  constexpr size_t kAhead = 24;  // of some nanoseconds each
  const auto& [increments, resets] = credits;
  size_t next = 0;
  for (size_t i = 0; i < increments.size(); ++i) {
    for (; next < resets.size() && resets[next].time == i; ++next) counts_[resets[next].id] = 1;
    __builtin_prefetch(&counts_[increments[std::min(i + kAhead, increments.size() - 1)]], 1);
    ++counts_[increments[i]];
  }
  for (; next < resets.size(); ++next) counts_[resets[next].id] = 1;
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
