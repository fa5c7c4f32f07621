#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <map>
#include <new>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "check.hpp"
#include "core/error.hpp"
#include "lzw/counter.hpp"
#include "lzw/dictionary.hpp"
#include "lzw/flat_array.hpp"
#include "lzw/grant.hpp"
#include "lzw_examples.hpp"

using l3ext::Error;
using l3ext::ErrorCode;
using l3ext::lzw::Counter;
using l3ext::lzw::Dictionary;
using l3ext::lzw::FlatArray;
using l3ext::lzw::Parse;
using namespace lzw_examples;

namespace {

// The definition, with whole codewords as keys.
std::map<Codeword, int64_t> count_plainly(const Corpus& corpus, int vocab_size) {
  std::map<Codeword, int64_t> count;
  for (int token = 0; token < vocab_size; ++token) count[{token}] = 0;
  for (size_t d = 0; d + 1 < corpus.offsets.size(); ++d) {
    const Codeword document(corpus.tokens.begin() + corpus.offsets[d],
                            corpus.tokens.begin() + corpus.offsets[d + 1]);
    const auto end = document.end();
    for (auto i = document.begin(); end - i > 1;) {
      auto j = i + 1;
      while (j < end && count.contains(Codeword(i, j))) ++j;
      ++count[Codeword(i, j - 1)];
      count[Codeword(i, j)] = 1;
      i = j;
    }
  }
  return count;
}

void the_paper_parse_equals_its_definition() {
  for (int vocab_size : {1, 2, 3, 30}) {
    const Corpus corpus = random_corpus(7, vocab_size, 300, 60);
    Counter counter(vocab_size, Parse::kPaper);
    counter.update(corpus.tokens, corpus.offsets);
    const auto got = codewords(counter);
    EXPECT(
        (std::map<Codeword, int64_t>(got.begin(), got.end()) == count_plainly(corpus, vocab_size)));
  }
}

void the_lzw_parse_counts_what_it_emits() {
  Counter counter(2, Parse::kLzw);
  const std::vector<int32_t> tokens = {0, 0, 1, 0, 1, 0, 1};
  const std::vector<int64_t> offsets = {0, 7};
  counter.update(tokens, offsets);
  // 0, then 0 (inserts 00, then 01), then 1 (inserts 10), then 01 (inserts 010), then 01.
  const std::vector<std::pair<Codeword, int64_t>> expected = {
      {{0}, 2}, {{1}, 1}, {{0, 0}, 0}, {{0, 1}, 2}, {{1, 0}, 0}, {{0, 1, 0}, 0}};
  EXPECT(codewords(counter) == expected);
}

void both_token_types_count_alike() {
  const Corpus corpus = random_corpus(8, 5, 100, 80);
  const std::vector<int64_t> wide(corpus.tokens.begin(), corpus.tokens.end());
  Counter narrow(5, Parse::kPaper), other(5, Parse::kPaper);
  narrow.update(corpus.tokens, corpus.offsets);
  other.update(wide, corpus.offsets);
  EXPECT(equal(narrow, other));
}

// Stops the same update at its first poll, its second, and so on until it goes through.
void an_interrupted_update_leaves_no_trace() {
  for (const Parse parse : {Parse::kPaper, Parse::kLzw}) {
    const Corpus first = random_corpus(1, 3, 2000, 40);
    const Corpus second = random_corpus(2, 3, 60000, 40);  // over a million tokens: several polls
    Counter counter(3, parse), untouched(3, parse);
    counter.update(first.tokens, first.offsets);
    untouched.update(first.tokens, first.offsets);
    int polls = 0;
    bool interrupted = true;
    for (int stop_at = 1; interrupted; ++stop_at) {
      int poll = 0;
      try {
        counter.update(second.tokens, second.offsets, [&] { return ++poll == stop_at; });
        interrupted = false;
      } catch (const Error& error) {
        EXPECT(error.code() == ErrorCode::kInterrupted);
        EXPECT(equal(counter, untouched));
        ++polls;
      }
    }
    EXPECT(polls >= 6);  // some while the ids were checked, some while they were counted
    untouched.update(second.tokens, second.offsets);
    EXPECT(equal(counter, untouched));  // the retry went through
  }
}

void a_rejected_update_leaves_no_trace() {
  const Corpus corpus = random_corpus(3, 4, 50, 40);
  Counter counter(4, Parse::kPaper), untouched(4, Parse::kPaper);
  counter.update(corpus.tokens, corpus.offsets);
  untouched.update(corpus.tokens, corpus.offsets);
  const std::vector<int32_t> tokens = {0, 1, 2, 3, 4, 0};
  const std::vector<int64_t> offsets = {0, 2, 2, 6};
  const std::string message = EXPECT_THROWS(Error, counter.update(tokens, offsets));
  EXPECT(message ==
         "tokens: expected ids in [0, 4), got 4 at position 4 (document 2, token 2 of it)");
  EXPECT(equal(counter, untouched));
}

// Stops the same merge at its first poll, its second, and so on until it goes through.
void an_interrupted_merge_leaves_no_trace() {
  const Corpus first = random_corpus(1, 3, 2000, 40);
  const Corpus second = random_corpus(2, 3, 60000, 40);
  Counter counter(3, Parse::kPaper), untouched(3, Parse::kPaper), other(3, Parse::kPaper);
  counter.update(first.tokens, first.offsets);
  untouched.update(first.tokens, first.offsets);
  other.update(second.tokens, second.offsets);
  const auto others = codewords(other);
  int polls = 0;
  bool interrupted = true;
  for (int stop_at = 1; interrupted; ++stop_at) {
    int poll = 0;
    try {
      counter.merge(other, [&] { return ++poll == stop_at; });
      interrupted = false;
    } catch (const Error& error) {
      EXPECT(error.code() == ErrorCode::kInterrupted);
      EXPECT(equal(counter, untouched));
      ++polls;
    }
  }
  EXPECT(polls >= 2);  // one of them after codewords were inserted
  EXPECT(codewords(other) == others);
  std::map<Codeword, int64_t> sum;
  for (const auto& [codeword, count] : codewords(untouched)) sum[codeword] += count;
  for (const auto& [codeword, count] : others) sum[codeword] += count;
  const auto got = codewords(counter);
  EXPECT((std::map<Codeword, int64_t>(got.begin(), got.end()) == sum));
}

void a_corrupt_file_is_refused_at_every_byte() {
  const std::string path =
      (std::filesystem::temp_directory_path() / l3ext::concat("lzw.", ::getpid())).string();
  const Corpus corpus = random_corpus(4, 3, 20, 20);
  Counter counter(3, Parse::kLzw);
  counter.update(corpus.tokens, corpus.offsets);
  counter.save(path);
  EXPECT(equal(Counter::load(path), counter));

  std::ifstream stream(path, std::ios::binary);
  const std::string content{std::istreambuf_iterator<char>(stream), {}};
  const auto refused = [&](const std::string& bytes) {
    std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<int64_t>(bytes.size()));
    try {
      Counter::load(path);
    } catch (const Error& error) {
      return error.code() == ErrorCode::kIo && error.path() == path;
    }
    return false;
  };
  int accepted = 0;
  for (size_t i = 0; i < content.size(); ++i) {
    accepted += !refused(content.substr(0, i));
    std::string flipped = content;
    flipped[i] = static_cast<char>(flipped[i] ^ (1 << (i % 8)));
    accepted += !refused(flipped);
  }
  accepted += !refused(content + "x");
  EXPECT(accepted == 0);
  std::filesystem::remove(path);
}

void rows_are_granted_by_count_and_then_by_insertion() {
  Counter counter(3, Parse::kLzw);
  const std::vector<int32_t> tokens = {2, 2, 1, 1};
  const std::vector<int64_t> offsets = {0, 1, 2, 3, 4};
  counter.update(tokens, offsets);  // counts: 0 never, 1 and 2 twice
  const auto rows = [&](int64_t total, int64_t cap) { return grant_rows(counter, total, cap); };
  EXPECT((rows(3, 9) == std::vector<int32_t>{1, 1, 1}));
  EXPECT((rows(4, 9) == std::vector<int32_t>{1, 2, 1}));
  EXPECT((rows(5, 9) == std::vector<int32_t>{1, 2, 2}));
  EXPECT((rows(7, 9) == std::vector<int32_t>{2, 3, 2}));
  EXPECT((rows(6, 2) == std::vector<int32_t>{2, 2, 2}));
}

void impossible_grants_are_refused_without_overflow() {
  const Counter counter(3, Parse::kPaper);
  constexpr int64_t kHuge = std::numeric_limits<int64_t>::max();
  const auto message = [&](int64_t total, int64_t cap) {
    return EXPECT_THROWS(Error, grant_rows(counter, total, cap));
  };
  EXPECT(message(2, 9).find("total_rows: expected at least vocab_size = 3") == 0);
  EXPECT(message(10, 3).find("total_rows: expected at most vocab_size * max_rows = 3 * 3") == 0);
  EXPECT(message(kHuge, 512).find("total_rows: expected at most") == 0);
  EXPECT(message(9, 0).find("max_rows: expected at least 1, got 0") == 0);
  EXPECT(message(kHuge, kHuge).find("max_rows: expected at most 2147483647") == 0);
  EXPECT((grant_rows(counter, 5, kHuge) == std::vector<int32_t>{2, 2, 1}));
}

void a_long_grant_can_be_interrupted() {
  const Counter counter(3, Parse::kPaper);
  try {
    grant_rows(counter, 3'000'000, 1'000'000, [n = 0]() mutable { return ++n == 2; });
    EXPECT(false);
  } catch (const Error& error) {
    EXPECT(error.code() == ErrorCode::kInterrupted);
  }
}

void an_array_that_cannot_grow_stays_as_it_was() {
  FlatArray<int64_t> array;
  for (int64_t i = 0; i < 1000; ++i) array.push_back(i);
  bool thrown = false;
  try {
    array.resize(std::numeric_limits<size_t>::max() / 4);
  } catch (const std::bad_alloc&) {
    thrown = true;
  }
  EXPECT(thrown);
  EXPECT(array.size() == 1000 && array[999] == 999);
  array.truncate(10);
  array.push_back(-1);
  EXPECT(array.size() == 11 && array[9] == 9 && array.back() == -1);
}

// Large enough for pages straight from the system, small steps and large ones.
void an_array_keeps_its_values_as_it_grows_and_shrinks() {
  FlatArray<uint64_t> array;
  constexpr uint64_t kSize = 3'000'000;  // 24 MB
  for (uint64_t i = 0; i < kSize; ++i) array.push_back(i * i);
  array.resize(2 * kSize);
  array.truncate(kSize / 2);
  for (uint64_t i = kSize / 2; i < kSize; ++i) array.push_back(i * i);
  uint64_t wrong = 0;
  for (uint64_t i = 0; i < kSize; ++i) wrong += array[i] != i * i;
  EXPECT(wrong == 0);
  array.release(1, kSize / 2);
  EXPECT(array[kSize / 4] == 0);
  EXPECT(array[1] == 1);
  EXPECT(array.back() == (kSize - 1) * (kSize - 1));
}

void a_new_array_is_zeros() {
  for (size_t size : {1UL, 100UL, 1UL << 20}) {
    FlatArray<uint64_t> array;
    array.resize(size);
    uint64_t sum = 0;
    for (size_t i = 0; i < size; ++i) sum += array[i];
    EXPECT(sum == 0);
  }
}

// Against a map, through growth at every size and back again: what goes past a full line, around
// the table's end too, is found as long as it is there and not after.
void a_dictionary_finds_exactly_what_it_holds() {
  for (uint32_t seed = 0; seed < 20; ++seed) {
    std::mt19937 random(seed);
    const uint32_t vocab_size = 1 + random() % 50;
    Dictionary dictionary(vocab_size);
    std::map<std::pair<uint32_t, uint32_t>, uint32_t> edges;
    const auto check = [&] {
      for (const auto& [edge, id] : edges) EXPECT(dictionary.find(edge.first, edge.second) == id);
      for (int i = 0; i < 1000; ++i) {
        const std::pair edge(random() % 3000, random() % vocab_size);
        const auto found = edges.find(edge);
        const uint32_t expected = found == edges.end() ? Dictionary::kNone : found->second;
        EXPECT(dictionary.find(edge.first, edge.second) == expected);
      }
    };
    for (int round = 0; round < 10; ++round) {
      for (int i = 0; i < 300; ++i) {
        const uint32_t parent = random() % dictionary.size();
        const uint32_t token = random() % vocab_size;
        if (edges.contains({parent, token})) continue;
        edges[{parent, token}] = dictionary.insert(parent, token);
      }
      check();
      const uint32_t size = vocab_size + random() % (dictionary.size() - vocab_size + 1);
      dictionary.truncate(size);
      std::erase_if(edges, [&](const auto& entry) { return entry.second >= size; });
      check();
      dictionary.reserve_slots(dictionary.size() + 5000);
      dictionary.truncate(size);  // takes the room back as well
      check();
      Dictionary same(vocab_size);
      for (uint32_t id = vocab_size; id < size; ++id) {
        same.insert(dictionary.edge(id).parent, dictionary.edge(id).token);
      }
      EXPECT(same.nbytes() == dictionary.nbytes());
    }
  }
}

// Edges whose homes are all in one sixteenth of the table, at its front, at its end, or both, so
// that they lie far behind them and around the end: found as the table grows and shrinks.
void edges_that_crowd_are_found() {
  const auto hash = [](uint64_t parent, uint64_t token) {  // the dictionary's own
    uint64_t h = ((parent << 32 | token) + 1) * 0x9E3779B97F4A7C15u;
    h ^= h >> 32;
    return (h * 0xD6E8FEB86659FD93u) >> 60;
  };
  for (const auto& [front, end] : {std::pair(true, false), {false, true}, {true, true}}) {
    Dictionary dictionary(1);
    std::vector<Dictionary::Edge> edges = {{0, 0}};
    const auto check = [&] {
      size_t wrong = 0;
      for (uint32_t id = 1; id < edges.size(); ++id) {
        const uint32_t expected = id < dictionary.size() ? id : Dictionary::kNone;
        wrong += dictionary.find(edges[id].parent, edges[id].token) != expected;
      }
      EXPECT(wrong == 0);
    };
    for (uint32_t parent = 1; edges.size() < 6000; ++parent) {
      const uint64_t place = hash(parent, 7);
      if (!((front && place == 0) || (end && place == 15))) continue;
      EXPECT(dictionary.find(parent, 7) == Dictionary::kNone);
      EXPECT(dictionary.insert(parent, 7) == edges.size());
      edges.push_back({parent, 7});
      if (edges.size() % 50 == 0) check();
    }
    for (const uint32_t size : {4000U, 3999U, 700U, 1U}) {
      dictionary.truncate(size);
      check();
    }
  }
}

// Over many stretches, documents that cross them and documents shorter than a phrase.
void stretches_change_nothing() {
  for (const auto& [documents, length] :
       {std::pair(1, 200000), {9, 60000}, {9000, 3}, {500, 600}}) {
    const Corpus corpus = random_corpus(11, 7, documents, length);
    Counter whole(7, Parse::kPaper);
    whole.update(corpus.tokens, corpus.offsets);
    const auto got = codewords(whole);
    EXPECT((std::map<Codeword, int64_t>(got.begin(), got.end()) == count_plainly(corpus, 7)));
  }
}

}  // namespace

int main() {
  RUN(the_paper_parse_equals_its_definition);
  RUN(the_lzw_parse_counts_what_it_emits);
  RUN(both_token_types_count_alike);
  RUN(an_interrupted_update_leaves_no_trace);
  RUN(a_rejected_update_leaves_no_trace);
  RUN(an_interrupted_merge_leaves_no_trace);
  RUN(a_corrupt_file_is_refused_at_every_byte);
  RUN(rows_are_granted_by_count_and_then_by_insertion);
  RUN(impossible_grants_are_refused_without_overflow);
  RUN(a_long_grant_can_be_interrupted);
  RUN(an_array_that_cannot_grow_stays_as_it_was);
  RUN(an_array_keeps_its_values_as_it_grows_and_shrinks);
  RUN(a_new_array_is_zeros);
  RUN(a_dictionary_finds_exactly_what_it_holds);
  RUN(edges_that_crowd_are_found);
  RUN(stretches_change_nothing);
  return check::failures == 0 ? 0 : 1;
}
