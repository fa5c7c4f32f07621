// How fast the LZW counter reads, in one thread and in two, and what it holds afterwards.
//
//   L3EXT_BENCH_TOKENS=tokens.bin  raw little-endian int32 ids, in which the largest id ends each
//                                  document; the real thing.
//   not set                        synthetic: 4,194,304 ids of a vocabulary of 32,768, drawn
//                                  independently with probability ~ 1 / (rank + 1) (mt19937_64,
//                                  seed 1); documents of 80. Independent draws make shorter phrases
//                                  than text does: a figure to compare commits by, not to quote.
//
// lzw_stream counts a stream far longer than the corpus, block by block, into one dictionary that
// outgrows every cache; L3EXT_BENCH_STREAM_TOKENS of them (16,777,216 where not set). The stream
// reads the corpus on from where it is, and before one token in four jumps to another place, drawn
// evenly, where the last token stands too: an order-1 resampling whose stretches between jumps are
// text. Documents of 512. Drawing is not timed. ns_per_token is of the whole stream,
// last_ns_per_token of its last quarter.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <random>
#include <span>
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
  const auto threads = static_cast<int>(state.range(0));
  size_t nbytes = 0;
  uint32_t codewords = 0;
  for (auto _ : state) {
    Counter counter(c.vocab_size, parse);
    counter.update(c.tokens, c.offsets, {}, threads);
    nbytes = counter.nbytes();
    codewords = counter.num_codewords();
  }
  const auto tokens = static_cast<double>(c.tokens.size());
  state.counters["tokens/s"] =
      benchmark::Counter(tokens, benchmark::Counter::kIsIterationInvariantRate);
  state.counters["nbytes"] = static_cast<double>(nbytes);
  state.counters["codewords"] = codewords;
}

void in_threads(benchmark::internal::Benchmark* benchmark) {
  benchmark->ArgName("threads")->Arg(1)->Arg(2)->Unit(benchmark::kMillisecond);
}
BENCHMARK_CAPTURE(lzw_update, paper, Parse::kPaper)->Apply(in_threads)->UseRealTime();
BENCHMARK_CAPTURE(lzw_update, lzw, Parse::kLzw)->Apply(in_threads)->UseRealTime();

// What lzw_stream counts; the same for the same corpus.
class Stream {
 public:
  explicit Stream(const Corpus& corpus) : corpus_(corpus) {
    begin_.assign(static_cast<size_t>(corpus.vocab_size) + 1, 0);
    for (const int32_t token : corpus.tokens) ++begin_[static_cast<size_t>(token) + 1];
    for (size_t t = 1; t < begin_.size(); ++t) begin_[t] += begin_[t - 1];
    places_.resize(corpus.tokens.size());
    std::vector<size_t> next = begin_;
    for (size_t i = 0; i < corpus.tokens.size(); ++i) {
      places_[next[static_cast<size_t>(corpus.tokens[i])]++] = i;
    }
  }

  void draw(size_t num_tokens, Corpus& block) {
    block.vocab_size = corpus_.vocab_size;
    block.tokens.resize(num_tokens);
    block.offsets = {0};
    for (size_t i = 0; i < num_tokens; ++i) {
      const uint64_t r = random_();
      if (r % 4 == 0) {
        const auto token = static_cast<size_t>(corpus_.tokens[place_]);
        place_ = places_[begin_[token] + (r >> 2) % (begin_[token + 1] - begin_[token])];
      }
      place_ = place_ + 1 == corpus_.tokens.size() ? 0 : place_ + 1;
      block.tokens[i] = corpus_.tokens[place_];
      if (i % 512 == 511 || i + 1 == num_tokens) {
        block.offsets.push_back(static_cast<int64_t>(i) + 1);
      }
    }
  }

 private:
  const Corpus& corpus_;
  std::vector<size_t> begin_;   // [vocab_size + 1] into places_
  std::vector<size_t> places_;  // where each token stands
  size_t place_ = 0;
  std::mt19937_64 random_{1};
};

void lzw_stream(benchmark::State& state, Parse parse) {
  constexpr int64_t kBlock = 1 << 22;
  const char* size = std::getenv("L3EXT_BENCH_STREAM_TOKENS");
  const int64_t total = size != nullptr ? std::atoll(size) : 1 << 24;
  for (auto _ : state) {
    Stream stream(corpus());
    Corpus block;
    Counter counter(corpus().vocab_size, parse);
    double seconds = 0;
    double last_seconds = 0;
    int64_t last_tokens = 0;
    for (int64_t done = 0; done < total; done += kBlock) {
      stream.draw(static_cast<size_t>(std::min(kBlock, total - done)), block);
      const auto started = std::chrono::steady_clock::now();
      counter.update(block.tokens, block.offsets, {}, static_cast<int>(state.range(0)));
      const std::chrono::duration<double> took = std::chrono::steady_clock::now() - started;
      seconds += took.count();
      if (done >= total / 4 * 3) {
        last_seconds += took.count();
        last_tokens += static_cast<int64_t>(block.tokens.size());
      }
    }
    state.SetIterationTime(seconds);
    state.counters["ns_per_token"] = 1e9 * seconds / static_cast<double>(total);
    state.counters["last_ns_per_token"] = 1e9 * last_seconds / static_cast<double>(last_tokens);
    state.counters["nbytes"] = static_cast<double>(counter.nbytes());
    state.counters["codewords"] = counter.num_codewords();
  }
}
BENCHMARK_CAPTURE(lzw_stream, paper, Parse::kPaper)
    ->Apply(in_threads)
    ->UseManualTime()
    ->Iterations(1);
BENCHMARK_CAPTURE(lzw_stream, lzw, Parse::kLzw)->Apply(in_threads)->UseManualTime()->Iterations(1);

void lzw_grant(benchmark::State& state) {
  const Corpus& c = corpus();
  Counter counter(c.vocab_size, Parse::kPaper);
  counter.update(c.tokens, c.offsets);
  for (auto _ : state) {
    benchmark::DoNotOptimize(l3ext::lzw::grant_rows(counter, 4 * c.vocab_size, 512));
  }
}
BENCHMARK(lzw_grant)->Unit(benchmark::kMillisecond);

// The second half of the corpus' documents merged into the first half's counter.
void lzw_merge(benchmark::State& state) {
  const Corpus& c = corpus();
  const size_t cut = c.offsets.size() / 2;
  const std::span<const int32_t> tokens(c.tokens);
  const auto split = static_cast<size_t>(c.offsets[cut]);
  std::vector<int64_t> later;
  for (size_t d = cut; d < c.offsets.size(); ++d) later.push_back(c.offsets[d] - c.offsets[cut]);
  Counter second(c.vocab_size, Parse::kPaper);
  second.update(tokens.subspan(split), later);
  for (auto _ : state) {
    state.PauseTiming();
    Counter first(c.vocab_size, Parse::kPaper);
    first.update(tokens.first(split), std::span(c.offsets).first(cut + 1));
    state.ResumeTiming();
    first.merge(second);
  }
  state.counters["codewords/s"] =
      benchmark::Counter(second.num_codewords(), benchmark::Counter::kIsIterationInvariantRate);
}
BENCHMARK(lzw_merge)->Unit(benchmark::kMillisecond);

}  // namespace

BENCHMARK_MAIN();
