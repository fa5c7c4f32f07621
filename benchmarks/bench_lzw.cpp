// How fast the LZW counter reads, and what it holds afterwards.
//
//   L3EXT_BENCH_TOKENS=tokens.bin  raw little-endian int32 ids, in which the largest id ends each
//                                  document; the real thing.
//   not set                        synthetic: 4,194,304 ids of a vocabulary of 32,768, drawn
//                                  independently with probability ~ 1 / (rank + 1) (mt19937_64,
//                                  seed 1); documents of 80. Independent draws make shorter phrases
//                                  than text does: a figure to compare commits by, not to quote.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include "core/error.hpp"
#include "lzw/counter.hpp"
#include "lzw/grant.hpp"

using l3ext::lzw::Counter;
using l3ext::lzw::Parse;

namespace {

struct Corpus {
  int64_t vocab_size = 0;
  std::vector<int32_t> tokens;
  std::vector<int64_t> offsets = {0};
};

Corpus read_corpus(const std::string& path) {
  std::ifstream stream(path, std::ios::binary | std::ios::ate);
  if (!stream) throw l3ext::Error::io(path, 0, "cannot read");
  Corpus corpus;
  corpus.tokens.resize(static_cast<size_t>(stream.tellg()) / sizeof(int32_t));
  stream.seekg(0);
  stream.read(reinterpret_cast<char*>(corpus.tokens.data()),
              static_cast<std::streamsize>(corpus.tokens.size() * sizeof(int32_t)));
  L3EXT_CHECK(!corpus.tokens.empty(), path, ": expected int32 ids, got none");
  const int32_t end = *std::max_element(corpus.tokens.begin(), corpus.tokens.end());
  corpus.vocab_size = int64_t{end} + 1;
  const auto size = static_cast<int64_t>(corpus.tokens.size());
  for (int64_t i = 0; i < size; ++i) {
    if (corpus.tokens[static_cast<size_t>(i)] == end || i + 1 == size) {
      corpus.offsets.push_back(i + 1);
    }
  }
  return corpus;
}

Corpus draw_corpus() {
  Corpus corpus;
  corpus.vocab_size = 32768;
  std::mt19937_64 random(1);
  std::uniform_real_distribution<double> uniform(0.0, std::log(corpus.vocab_size + 1.0));
  for (int64_t i = 0; i < (1 << 22); ++i) {
    const double rank = std::exp(uniform(random)) - 1.0;  // log-uniform: density ~ 1 / (rank + 1)
    corpus.tokens.push_back(static_cast<int32_t>(std::min<double>(rank, 32767)));
    if (i % 80 == 79 || i + 1 == (1 << 22)) corpus.offsets.push_back(i + 1);
  }
  return corpus;
}

const Corpus& corpus() {
  static const Corpus kCorpus = [] {
    const char* path = std::getenv("L3EXT_BENCH_TOKENS");
    return path != nullptr ? read_corpus(path) : draw_corpus();
  }();
  return kCorpus;
}

void lzw_update(benchmark::State& state, Parse parse) {
  const Corpus& c = corpus();
  size_t nbytes = 0;
  uint32_t codewords = 0;
  for (auto _ : state) {
    Counter counter(c.vocab_size, parse);
    counter.update(c.tokens, c.offsets);
    nbytes = counter.nbytes();
    codewords = counter.num_codewords();
  }
  const auto tokens = static_cast<double>(c.tokens.size());
  state.counters["tokens/s"] =
      benchmark::Counter(tokens, benchmark::Counter::kIsIterationInvariantRate);
  state.counters["nbytes"] = static_cast<double>(nbytes);
  state.counters["codewords"] = codewords;
}
BENCHMARK_CAPTURE(lzw_update, paper, Parse::kPaper)->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(lzw_update, lzw, Parse::kLzw)->Unit(benchmark::kMillisecond);

void lzw_grant(benchmark::State& state) {
  const Corpus& c = corpus();
  Counter counter(c.vocab_size, Parse::kPaper);
  counter.update(c.tokens, c.offsets);
  for (auto _ : state) {
    benchmark::DoNotOptimize(l3ext::lzw::grant_rows(counter, 4 * c.vocab_size, 512));
  }
}
BENCHMARK(lzw_grant)->Unit(benchmark::kMillisecond);

}  // namespace

BENCHMARK_MAIN();
