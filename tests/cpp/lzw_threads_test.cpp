// The allocator in several threads: the same bits as in one.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <new>
#include <optional>
#include <random>
#include <set>
#include <span>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "check.hpp"
#include "core/error.hpp"
#include "lzw/counter.hpp"
#include "lzw/dictionary.hpp"
#include "lzw/scouts.hpp"
#include "lzw/team.hpp"
#include "lzw_examples.hpp"

using l3ext::Error;
using l3ext::ErrorCode;
using l3ext::lzw::Counter;
using l3ext::lzw::Dictionary;
using l3ext::lzw::Guess;
using l3ext::lzw::Parse;
using l3ext::lzw::Scout;
using l3ext::lzw::Scouts;
using l3ext::lzw::Team;
using namespace lzw_examples;

namespace {

// The dictionary's own.
uint64_t hash(uint64_t parent, uint64_t token) {
  uint64_t h = ((parent << 32 | token) + 1) * 0x9E3779B97F4A7C15u;
  h ^= h >> 32;
  return h * 0xD6E8FEB86659FD93u;
}

// As equal(), but of the codewords before their last tokens it looks at some.
bool same(const Counter& a, const Counter& b) {
  const bool alike = a.num_codewords() == b.num_codewords() && a.num_tokens() == b.num_tokens() &&
                     a.nbytes() == b.nbytes() && std::ranges::equal(a.counts(), b.counts()) &&
                     std::ranges::equal(a.frequency(), b.frequency());
  if (!alike) return false;
  for (uint32_t id = 0; id < a.num_codewords(); ++id) {
    if (a.last_token(id) != b.last_token(id)) return false;
    if (id % 97 == 0 && a.codeword(id) != b.codeword(id)) return false;
  }
  return true;
}

Counter counted(const Corpus& corpus, int vocab_size, Parse parse, int num_threads,
                std::optional<int64_t> max_codewords = std::nullopt) {
  Counter counter(vocab_size, parse, max_codewords);
  counter.update(corpus.tokens, corpus.offsets, {}, num_threads);
  return counter;
}

// Long documents, documents shorter than a phrase, few codewords and many, tables that grow often.
void the_number_of_threads_changes_nothing() {
  uint32_t seed = 0;
  for (const auto& [vocab_size, documents, length] : {std::tuple(2, 1, 1 << 20),
                                                      {7, 9, 60000},
                                                      {50, 100000, 5},
                                                      {3000, 500, 600},
                                                      {90000, 9, 40000}}) {
    const Corpus corpus = random_corpus(++seed, vocab_size, documents, length);
    for (const Parse parse : {Parse::kPaper, Parse::kLzw}) {
      const Counter one = counted(corpus, vocab_size, parse, 1);
      for (const int threads : {2, 3, 9}) {
        EXPECT(same(counted(corpus, vocab_size, parse, threads), one));
      }
    }
  }
}

void a_bounded_dictionary_is_the_same_in_any_number_of_threads() {
  const Corpus corpus = random_corpus(5, 9, 400, 800);
  for (const Parse parse : {Parse::kPaper, Parse::kLzw}) {
    for (const int64_t bound : {9, 5000, 30000, 10000000}) {
      const Counter one = counted(corpus, 9, parse, 1, bound);
      EXPECT(same(counted(corpus, 9, parse, 2, bound), one));
      EXPECT(same(counted(corpus, 9, parse, 4, bound), one));
    }
  }
}

void random_updates_are_the_same_in_any_number_of_threads() {
  std::mt19937 random(6);
  for (int round = 0; round < 4; ++round) {
    const int vocab_size = 1 + static_cast<int>(random() % 300);
    const Parse parse = round % 2 == 0 ? Parse::kPaper : Parse::kLzw;
    Counter one(vocab_size, parse), many(vocab_size, parse);
    for (int update = 0; update < 4; ++update) {
      const int length = 2 + static_cast<int>(random() % 3000);
      const Corpus corpus = random_corpus(static_cast<uint32_t>(random()), vocab_size,
                                          1 + static_cast<int>(random() % 250), length);
      const std::vector<int64_t> wide(corpus.tokens.begin(), corpus.tokens.end());
      one.update(corpus.tokens, corpus.offsets);
      many.update(wide, corpus.offsets, {}, 2 + update % 3);
    }
    EXPECT(same(many, one));
  }
}

// Stops the same update at its first poll, its second, and so on until it goes through.
void an_interrupted_update_of_several_threads_leaves_no_trace() {
  for (const Parse parse : {Parse::kPaper, Parse::kLzw}) {
    const Corpus first = random_corpus(1, 3, 9000, 40);
    const Corpus second = random_corpus(2, 3, 60000, 40);  // over a million tokens: several polls
    Counter counter = counted(first, 3, parse, 2);
    Counter untouched = counted(first, 3, parse, 1);
    int polls = 0;
    bool interrupted = true;
    for (int stop_at = 1; interrupted; ++stop_at) {
      int poll = 0;
      try {
        counter.update(second.tokens, second.offsets, [&] { return ++poll == stop_at; }, 3);
        interrupted = false;
      } catch (const Error& error) {
        EXPECT(error.code() == ErrorCode::kInterrupted);
        EXPECT(same(counter, untouched));
        ++polls;
      }
    }
    EXPECT(polls >= 6);  // some while the ids were checked, some while others guessed ahead
    untouched.update(second.tokens, second.offsets);
    EXPECT(same(counter, untouched));  // the retry went through
  }
}

void a_rejected_update_of_several_threads_leaves_no_trace() {
  Corpus corpus = random_corpus(3, 4, 5000, 40);
  Counter counter(4, Parse::kPaper);
  const Counter untouched(4, Parse::kPaper);
  const auto update = [&](int threads) {
    counter.update(corpus.tokens, corpus.offsets, {}, threads);
  };
  EXPECT(EXPECT_THROWS(Error, update(0)) == "num_threads: expected at least 1, got 0");
  corpus.tokens[70000] = 4;
  EXPECT(EXPECT_THROWS(Error, update(2)).find("got 4 at position 70000") != std::string::npos);
  EXPECT(same(counter, untouched));
}

// By parts, whose ends edges cross: those whose homes crowd before a part's last line go to the
// next one, and from the last part around the table's end.
void a_table_that_threads_move_holds_the_same_edges() {
  for (const size_t threads : {2U, 3U, 4U}) {
    Team team(static_cast<int>(threads));
    Dictionary dictionary(1);
    dictionary.reserve_slots(30000);  // over 8,192 lines
    std::vector<Dictionary::Edge> edges = {{0, 0}};
    for (uint32_t parent = 1; edges.size() < 25000; ++parent) {
      const uint64_t place = hash(parent, 7) >> 60;  // its home's sixteenth of the table
      const uint64_t part = place * threads / 16;
      if ((place + 1) * threads / 16 == part) continue;  // not at the end of its part
      EXPECT(dictionary.insert(parent, 7) == edges.size());
      edges.push_back({parent, 7});
    }
    const auto check = [&] {
      size_t wrong = 0;
      for (uint32_t id = 1; id < edges.size(); ++id) {
        wrong += dictionary.find(edges[id].parent, edges[id].token) != id;
      }
      for (uint32_t parent = 1; parent < 20000; ++parent) {
        wrong += dictionary.find(parent, 8) != Dictionary::kNone;
      }
      EXPECT(wrong == 0);
    };
    check();
    for (const size_t size : {70000U, 200000U, 1000000U}) {
      dictionary.reserve_slots(size, &team);
      check();
    }
    dictionary.truncate(static_cast<uint32_t>(edges.size()));  // a smaller table, by one thread
    check();
  }
}

// A look-up that missed while another thread inserted stands where an insertion may go on from it:
// if the edge came since, the probe still finds it. All edges here belong to one line, which fills
// up and is passed by while it is read.
void a_probe_stays_good_while_another_thread_inserts() {
  constexpr int kRounds = 30000;
  std::vector<uint32_t> parents;  // as many as the table takes
  for (uint32_t parent = 1; parents.size() < 7; ++parent) {
    if (hash(parent, 3) >> 63 == 0) parents.push_back(parent);
  }
  std::atomic<const Dictionary*> shared = nullptr;
  std::vector<Dictionary::Probe> probes;
  std::thread scout([&] {
    for (int round = 0; round < kRounds; ++round) {
      const Dictionary* dictionary = nullptr;
      while ((dictionary = shared.load()) == nullptr) std::this_thread::yield();
      probes.clear();
      for (int i = 0; i < 30; ++i) {
        for (const uint32_t parent : {parents[4], parents[3], parents[2]}) {
          Dictionary::Probe probe = dictionary->probe(parent, 3);
          if (dictionary->answer(probe) == 0) probes.push_back(probe);
        }
      }
      shared = nullptr;
    }
  });
  size_t lost = 0;
  for (int round = 0; round < kRounds; ++round) {
    Dictionary dictionary(1);
    dictionary.reserve_slots(1 + parents.size());  // two lines
    shared = &dictionary;
    for (int pause = round % 64; pause > 0; --pause) static_cast<void>(dictionary.find(99, 9));
    for (const uint32_t parent : parents) dictionary.insert(parent, 3);
    while (shared.load() != nullptr) std::this_thread::yield();
    for (Dictionary::Probe& probe : probes) {
      const uint32_t id = dictionary.find(probe.parent(), probe.token());
      lost += id == Dictionary::kNone || dictionary.answer(probe) != id;
    }
  }
  scout.join();
  EXPECT(lost == 0);
}

// Stretches in order, some left out, guessed by whoever; no scout by two threads at once.
void stretches_are_guessed_ahead_and_taken_in_order() {
  constexpr int64_t kStretches = 300;
  Team team(3);
  const Dictionary dictionary(1);
  std::vector<Guess> guesses(kStretches);
  std::mutex mutex;
  std::set<const Scout*> in_use;
  std::set<int64_t> guessed;
  std::atomic<int> collisions = 0;
  bool paused = false;
  Scouts scouts(team, dictionary, kStretches, [&](Scout& scout, int64_t stretch) {
    {
      const std::lock_guard lock(mutex);
      collisions += !in_use.insert(&scout).second || !guessed.insert(stretch).second || paused;
    }
    std::this_thread::sleep_for(std::chrono::microseconds(stretch * 7919 % 400));
    auto& guess = guesses[static_cast<size_t>(stretch)];
    guess.begin = static_cast<uint32_t>(stretch);
    const std::lock_guard lock(mutex);
    in_use.erase(&scout);
    if (stretch % 10 == 9) throw std::bad_alloc();  // a stretch without guesses
    return std::span(&guess, 1);
  });
  int wrong = 0;
  for (int64_t stretch = 0; stretch < kStretches; stretch += stretch % 13 == 5 ? 6 : 1) {
    const std::span<const Guess> taken = scouts.take(stretch);
    wrong += taken.size() != (stretch % 10 == 9 ? 0 : 1);
    wrong += !taken.empty() && taken[0].begin != stretch;
    if (stretch % 17 == 0) {
      scouts.pause();
      const std::lock_guard lock(mutex);
      paused = true;
    }
    std::this_thread::sleep_for(std::chrono::microseconds(stretch * 31 % 100));
    const std::lock_guard lock(mutex);
    paused = false;
  }
  EXPECT(wrong == 0);
  EXPECT(collisions == 0);
}

void a_team_does_one_job_after_the_other() {
  for (const int threads : {1, 2, 5}) {
    Team team(threads);
    EXPECT(std::cmp_equal(team.size(), threads));
    std::vector<int> calls(team.size());
    const Team::Job job = [&](size_t thread) { ++calls[thread]; };
    for (int i = 0; i < 200; ++i) team.run(job);
    EXPECT(std::ranges::all_of(calls, [](int n) { return n == 200; }));
    team.start(job);
    team.wait();
    team.wait();  // there is none
    EXPECT(calls[0] == 200 && std::ranges::count(calls, 201) == threads - 1);
  }
}

}  // namespace

int main() {
  RUN(the_number_of_threads_changes_nothing);
  RUN(a_bounded_dictionary_is_the_same_in_any_number_of_threads);
  RUN(random_updates_are_the_same_in_any_number_of_threads);
  RUN(an_interrupted_update_of_several_threads_leaves_no_trace);
  RUN(a_rejected_update_of_several_threads_leaves_no_trace);
  RUN(a_table_that_threads_move_holds_the_same_edges);
  RUN(a_probe_stays_good_while_another_thread_inserts);
  RUN(stretches_are_guessed_ahead_and_taken_in_order);
  RUN(a_team_does_one_job_after_the_other);
  return check::failures == 0 ? 0 : 1;
}
