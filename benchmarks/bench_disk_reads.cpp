// What the disk tier makes of the disk, with O_DIRECT, so past the page cache:
//
//   drive   the disk's own limit: the file from end to end, large reads, many at once
//   blocks  reads of one size at random places, by size, depth and engine (the reader alone)
//   steps   the prefetcher on decode steps: each the tokens of `batch` random places of a text, two
//           layers, rows of 6 KiB (d_in 2048, d_emb 1024, bfloat16) granted by LZW, 4 rows a token
//           and at most 512, verified. Bytes are those that came from the disk.
//
// and how long it takes until a table file is mapped and every row was read once:
//
//   mapped  by whether the page cache was empty before, and whether mapping populates
//
// steps take L3EXT_BENCH_TOKENS=tokens.bin: raw little-endian int32 ids, in which the largest id
// ends each document. The file (2 GiB) goes to $TMPDIR.
#include <benchmark/benchmark.h>
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "core/error.hpp"
#include "lzw/counter.hpp"
#include "lzw/grant.hpp"
#include "runtime/host_device.hpp"
#include "runtime/prefetcher.hpp"
#include "runtime/table_file.hpp"

namespace {

using namespace l3ext;

constexpr TableShape kShape = {DType::kBFloat16, 2048, 1024, false};
constexpr int64_t kLayers = 2;

struct Text {
  std::vector<int32_t> tokens;
  std::vector<int64_t> offsets = {0};
  int64_t vocab_size = 0;
};

// Without one: the rows of a vocabulary of which nothing is known, for drive and blocks.
Text read_text() {
  Text text;
  const char* path = std::getenv("L3EXT_BENCH_TOKENS");
  if (path == nullptr) return text;
  std::ifstream stream(path, std::ios::binary | std::ios::ate);
  if (!stream) throw Error::io(path, 0, "cannot read");
  text.tokens.resize(static_cast<size_t>(stream.tellg()) / sizeof(int32_t));
  stream.seekg(0);
  stream.read(reinterpret_cast<char*>(text.tokens.data()),
              static_cast<std::streamsize>(text.tokens.size() * sizeof(int32_t)));
  const int32_t end = *std::ranges::max_element(text.tokens);
  for (int64_t i = 0; i < std::ssize(text.tokens); ++i) {
    if (text.tokens[i] == end) text.offsets.push_back(i + 1);
  }
  if (text.offsets.back() != std::ssize(text.tokens)) text.offsets.push_back(text.tokens.size());
  text.vocab_size = end + 1;
  return text;
}

// The text and a table file of it, made once and removed at exit.
struct Bench {
  Bench()
      : text(read_text()),
        path((std::filesystem::temp_directory_path() / concat("l3ext_bench_disk.", ::getpid()))
                 .string()) {
    auto owners = std::make_shared<RowOwners>();
    owners->offsets = {0};
    if (text.tokens.empty()) {
      for (int64_t i = 0; i < 1024; ++i) owners->offsets.push_back(128 * (i + 1));
    } else {
      lzw::Counter counter(text.vocab_size, lzw::Parse::kPaper);
      counter.update(text.tokens, text.offsets);
      for (const int32_t rows : lzw::grant_rows(counter, 4 * text.vocab_size, 512)) {
        owners->offsets.push_back(owners->offsets.back() + rows);
      }
    }
    table_bytes = owners->total_rows() * kShape.row_bytes();
    std::vector<uint64_t> rows(static_cast<size_t>(table_bytes / 8));
    std::minstd_rand random(1);
    for (uint64_t& word : rows) word = random() * 0x9e3779b97f4a7c15;
    write_table_file(path, std::vector<TableData>(kLayers, {kShape, owners, rows.data()}));
  }
  ~Bench() { std::filesystem::remove(path); }
  Bench(const Bench&) = delete;
  Bench& operator=(const Bench&) = delete;

  Text text;
  std::string path;
  int64_t table_bytes = 0;
};

const Bench& bench() {
  static const Bench kBench;
  return kBench;
}

constexpr int64_t kUring = static_cast<int64_t>(IoEngine::kUring);
constexpr int64_t kPread = static_cast<int64_t>(IoEngine::kPread);

// Reads `bytes` at a time at the places that `next` names, `depth` at once.
template <typename Next>
void read_blocks(benchmark::State& state, int64_t bytes, int depth, IoEngine engine, Next next) {
  struct Free {
    void operator()(std::byte* p) const { ::operator delete(p, std::align_val_t{4096}); }
  };
  const TableFile file(bench().path, DirectIo::kOn, engine);
  const auto reader = file.tables()[0].source->make_reader(depth);
  const int64_t slot = bytes + TableSource::kScratchMargin;
  const std::unique_ptr<std::byte, Free> memory(static_cast<std::byte*>(
      ::operator new(static_cast<size_t>(depth * slot), std::align_val_t{4096})));
  const auto submit = [&](int64_t i) {
    reader->submit({next(), bytes, memory.get() + i * slot, i});
  };
  const auto complete = [&] {
    const ReadResult result = reader->complete();
    if (result.error) std::rethrow_exception(result.error);
    return result.tag;
  };
  for (int64_t i = 0; i < depth; ++i) submit(i);
  for (auto _ : state) submit(complete());
  for (int64_t i = 0; i < depth; ++i) complete();
  state.SetBytesProcessed(state.iterations() * bytes);
}

void drive(benchmark::State& state) {
  const int64_t bytes = state.range(0) << 10;
  int64_t at = 0;
  read_blocks(state, bytes, static_cast<int>(state.range(1)), IoEngine::kAuto, [&] {
    const int64_t begin = at;
    at += bytes;
    if (at + bytes > bench().table_bytes) at = 0;
    return begin;
  });
}

void blocks(benchmark::State& state) {
  const int64_t bytes = state.range(0) << 10;
  std::minstd_rand random(1);
  const auto places = static_cast<uint64_t>((bench().table_bytes - bytes) / 4096);
  read_blocks(state, bytes, static_cast<int>(state.range(1)), static_cast<IoEngine>(state.range(2)),
              [&] { return static_cast<int64_t>(random() % places * 4096); });
}

void steps(benchmark::State& state) {
  const Text& text = bench().text;
  if (text.tokens.empty()) return state.SkipWithError("L3EXT_BENCH_TOKENS: expected a text");
  const TableFile file(bench().path, DirectIo::kOn, static_cast<IoEngine>(state.range(4)));
  const auto prefetcher = Prefetcher::create(file.tables(), std::make_shared<HostDevice>(),
                                             {.ring_bytes = int64_t{192} << 20,
                                              .num_workers = static_cast<int>(state.range(1)),
                                              .queue_depth = static_cast<int>(state.range(2)),
                                              .piece_bytes = state.range(3) << 10});
  std::minstd_rand random(1);
  std::vector<int32_t> ids(static_cast<size_t>(state.range(0)));
  const auto run = [&] {
    for (int32_t& id : ids) id = text.tokens[random() % text.tokens.size()];
    Prefetcher::Step step = Prefetcher::begin(prefetcher, ids);
    for (int64_t layer = 0; layer < kLayers; ++layer) step.wait(layer);
  };
  const int64_t before = prefetcher->ledger()->totals().bytes;
  for (auto _ : state) run();
  state.SetBytesProcessed(prefetcher->ledger()->totals().bytes - before);
}

// From the mapping to the last row, read once.
void mapped(benchmark::State& state) {
  const bool cold = state.range(0) != 0;
  const std::string& path = bench().path;
  double open_seconds = 0;
  for (auto _ : state) {
    state.PauseTiming();
    if (cold) {
      const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
      ::posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
      ::close(fd);
    }
    state.ResumeTiming();
    const auto begin = std::chrono::steady_clock::now();
    const MappedTables tables = map_table_file(path, {.populate = state.range(1) != 0});
    open_seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    std::byte sum{0};
    for (const Table& table : tables.tables) {
      const std::byte* rows = table.source->memory();
      for (int64_t at = 0; at < bench().table_bytes; at += 64) sum ^= rows[at];
    }
    benchmark::DoNotOptimize(sum);
  }
  state.SetBytesProcessed(state.iterations() * kLayers * bench().table_bytes);
  state.counters["open_ms"] =
      benchmark::Counter(open_seconds * 1e3, benchmark::Counter::kAvgIterations);
}

BENCHMARK(mapped)
    ->ArgNames({"cold", "populate"})
    ->ArgsProduct({{0, 1}, {0, 1}})
    ->UseRealTime()
    ->Unit(benchmark::kMillisecond);
BENCHMARK(drive)->ArgNames({"KiB", "depth"})->ArgsProduct({{256, 1024}, {4, 16}})->UseRealTime();
BENCHMARK(blocks)
    ->ArgNames({"KiB", "depth", "engine"})
    ->ArgsProduct({{4, 16, 64, 256, 1024}, {1, 4, 16, 64}, {kUring, kPread}})
    ->UseRealTime();
BENCHMARK(steps)
    ->ArgNames({"batch", "workers", "depth", "KiB", "engine"})
    ->ArgsProduct({{1, 8, 32}, {1, 2}, {16}, {64, 256, 1024}, {kUring}})
    ->ArgsProduct({{1, 8, 32}, {2}, {1, 4, 32}, {256}, {kUring}})
    ->ArgsProduct({{1, 8, 32}, {2}, {16}, {256}, {kPread}})
    ->UseRealTime();

}  // namespace

BENCHMARK_MAIN();
