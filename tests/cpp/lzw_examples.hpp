// What the allocator's tests share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <random>
#include <utility>
#include <vector>

#include "lzw/counter.hpp"

namespace lzw_examples {

using Codeword = std::vector<int64_t>;
struct Corpus {
  std::vector<int32_t> tokens;
  std::vector<int64_t> offsets = {0};
};

inline Corpus random_corpus(uint32_t seed, int vocab_size, int documents, int length) {
  std::mt19937 random(seed);
  Corpus corpus;
  for (int d = 0; d < documents; ++d) {
    for (uint32_t n = random() % static_cast<uint32_t>(length); n > 0; --n) {
      corpus.tokens.push_back(static_cast<int32_t>(random() % static_cast<uint32_t>(vocab_size)));
    }
    corpus.offsets.push_back(static_cast<int64_t>(corpus.tokens.size()));
  }
  return corpus;
}

inline std::vector<std::pair<Codeword, int64_t>> codewords(const l3ext::lzw::Counter& counter) {
  std::vector<std::pair<Codeword, int64_t>> all;
  for (uint32_t id = 0; id < counter.num_codewords(); ++id) {
    all.emplace_back(counter.codeword(id), counter.counts()[id]);
  }
  return all;
}

inline bool equal(const l3ext::lzw::Counter& a, const l3ext::lzw::Counter& b) {
  return codewords(a) == codewords(b) && a.num_tokens() == b.num_tokens() &&
         a.nbytes() == b.nbytes() && std::ranges::equal(a.frequency(), b.frequency());
}

}  // namespace lzw_examples
