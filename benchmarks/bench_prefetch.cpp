// How fast a step's rows arrive: begin, wait, end of steps of random tokens, by block size (the
// rows of one token) and number of workers, from RAM and from a file (O_DIRECT, and through a warm
// page cache). The table is larger than the processor's caches. The file goes to $TMPDIR.
#include <benchmark/benchmark.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "runtime/host_device.hpp"
#include "runtime/prefetcher.hpp"
#include "runtime/table_file.hpp"

namespace {

using namespace l3ext;

constexpr int64_t kTableBytes = int64_t{384} << 20;
constexpr int64_t kStepBytes = int64_t{12} << 20;
constexpr int64_t kRowBytes = 6144;  // d_in 2048, d_emb 1024, bfloat16

// A table in which every token owns `rows` rows.
struct UniformTable {
  explicit UniformTable(int64_t rows) : data(kTableBytes / 2, 1) {
    auto owners = std::make_shared<RowOwners>();
    for (int64_t at = 0; (at + rows) * kRowBytes <= kTableBytes; at += rows) {
      owners->offsets.push_back(at);
    }
    owners->offsets.push_back(std::ssize(owners->offsets) * rows);
    table.shape = {DType::kBFloat16, 2048, 1024, false};
    table.source = std::make_shared<RamTable>(data.data(), nullptr);
    table.owners = std::move(owners);
  }
  std::vector<uint16_t> data;
  Table table;
};

const UniformTable& uniform_table(int64_t rows) {
  static std::unique_ptr<UniformTable> table;  // one at a time: they are large
  static int64_t made_for = 0;
  if (made_for != rows) {
    table.reset();
    table = std::make_unique<UniformTable>(rows);
    made_for = rows;
  }
  return *table;
}

// The file of a table, removed at exit.
const std::string& table_file(int64_t rows) {
  struct File {
    std::string path;
    int64_t rows = 0;
    ~File() {
      if (rows != 0) std::filesystem::remove(path);
    }
  };
  static File file;
  if (file.rows != rows) {
    file.path =
        (std::filesystem::temp_directory_path() / concat("l3ext_bench_prefetch.", ::getpid()))
            .string();
    const UniformTable& table = uniform_table(rows);
    const TableData data[] = {{table.table.shape, table.table.owners, table.data.data()}};
    write_table_file(file.path, data);
    file.rows = rows;
  }
  return file.path;
}

void run_steps(benchmark::State& state, const Table& table, int workers) {
  const int64_t rows = table.owners->rows(0);
  const auto prefetcher =
      Prefetcher::create({table}, std::make_shared<HostDevice>(),
                         {.ring_bytes = 2 * kStepBytes, .num_workers = workers, .in_place = false});
  const int64_t tokens = std::max<int64_t>(1, kStepBytes / (rows * kRowBytes));
  std::mt19937 random(0);
  std::vector<int32_t> ids(static_cast<size_t>(tokens));
  for (auto _ : state) {
    state.PauseTiming();
    for (int32_t& id : ids) {
      id = static_cast<int32_t>(random() % static_cast<uint64_t>(table.owners->vocab_size()));
    }
    state.ResumeTiming();
    Prefetcher::Step step = Prefetcher::begin(prefetcher, ids);
    step.wait(0);
  }
  state.SetBytesProcessed(prefetcher->ledger()->totals().bytes);
}

void bench_ram(benchmark::State& state) {
  run_steps(state, uniform_table(state.range(0)).table, static_cast<int>(state.range(1)));
}

void bench_disk(benchmark::State& state) {
  const auto mode = static_cast<DirectIo>(state.range(2));
  try {
    const TableFile file(table_file(state.range(0)), mode);
    Table table = file.tables()[0];
    if (state.range(3) == 0) table.checksums.clear();
    run_steps(state, table, static_cast<int>(state.range(1)));
  } catch (const Error& error) {
    state.SkipWithError(error.what());  // no O_DIRECT here
  }
}

constexpr int64_t kDirect = static_cast<int64_t>(DirectIo::kOn);
constexpr int64_t kBuffered = static_cast<int64_t>(DirectIo::kOff);

BENCHMARK(bench_ram)
    ->ArgNames({"rows", "workers"})
    ->ArgsProduct({{1, 8, 64, 512}, {1, 2}})
    ->UseRealTime();
BENCHMARK(bench_disk)
    ->ArgNames({"rows", "workers", "direct_io", "verify"})
    ->ArgsProduct({{1, 8, 64, 512}, {1, 2, 4, 8, 16}, {kDirect}, {1}})
    ->ArgsProduct({{1, 8, 64, 512}, {2, 4}, {kBuffered}, {0, 1}})
    ->UseRealTime();

}  // namespace

BENCHMARK_MAIN();
