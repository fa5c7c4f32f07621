// Which rows stay in the table, and what a step that leaves some there brings, holds and records.
#include "runtime/near_data.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"
#include "runtime_examples.hpp"

using namespace l3ext;
using namespace examples;

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
const NearDataCosts kAlways = {kInfinity, 0, 0};

void the_break_even() {
  // A fetch costs 0.1 us a KiB, a query there 0.03: three queries pay, four do not.
  const NearDataCosts costs = {
      .fetch_us_per_byte = 0.1 / 1024, .attend_us = 50, .attend_us_per_byte = 0.03 / 1024};
  const int64_t kib = 1024;
  using Choice = std::vector<bool>;
  EXPECT(choose_near({}, costs).empty());
  // One query saves 0.07 us a KiB: the way there is worth it from 715 KiB on.
  EXPECT(choose_near(std::vector<ColdBlock>{{714 * kib, 1}}, costs) == Choice{false});
  EXPECT(choose_near(std::vector<ColdBlock>{{715 * kib, 1}}, costs) == Choice{true});
  // Blocks go there together, and share the way.
  EXPECT(choose_near(std::vector<ColdBlock>{{400 * kib, 1}, {400 * kib, 1}}, costs) ==
         (Choice{true, true}));
  // Many queries are better served where they are, whatever the others do.
  EXPECT(choose_near(std::vector<ColdBlock>{{9000 * kib, 3}, {9000 * kib, 4}}, costs) ==
         (Choice{true, false}));
  EXPECT(choose_near(std::vector<ColdBlock>{{9000 * kib, 4}, {100 * kib, 1}}, costs) ==
         (Choice{false, false}));
}

void the_extremes() {
  const std::vector<ColdBlock> blocks = {{1, 1}, {int64_t{1} << 50, 1 << 30}};
  EXPECT(choose_near(blocks, kAlways) == (std::vector<bool>{true, true}));
  // Nothing is waited for: whatever attention there costs is lost.
  EXPECT(choose_near(blocks, {0, 0, 0}) == (std::vector<bool>{false, false}));
  EXPECT(choose_near(blocks, {0, 0, 1}) == (std::vector<bool>{false, false}));
  EXPECT(choose_near(blocks, {1, kInfinity, 0}) == (std::vector<bool>{false, false}));
}

void wrong_costs() {
  const Example example = make_example(5, 3, 4, 3, 0);
  const auto prefetcher = make_prefetcher({ram_table(example)}, {});
  const double nan = std::numeric_limits<double>::quiet_NaN();
  EXPECT(EXPECT_THROWS(Error, prefetcher->use_near_data(NearDataCosts{-1, 0, 0})) ==
         "fetch_us_per_byte: expected at least 0, got -1");
  EXPECT(EXPECT_THROWS(Error, prefetcher->use_near_data(NearDataCosts{1, nan, 0}))
             .starts_with("attend_us: expected at least 0"));
  EXPECT(EXPECT_THROWS(Error, prefetcher->use_near_data(NearDataCosts{1, 0, -nan}))
             .starts_with("attend_us_per_byte: expected at least 0"));
  auto step = Prefetcher::begin(prefetcher, std::vector<int32_t>{1});
  EXPECT(step.near_segments(0).empty());
  prefetcher->close();
  EXPECT(EXPECT_THROWS(Error, prefetcher->use_near_data(kAlways)) == "the runtime is closed");
}

// Steps that use near data, in turn with steps that do not: what is near has no rows, all else is
// there, in the hot set, in the ring that earlier steps have filled, or in a buffer of its own.
void steps_bring_all_else() {
  const Example example = make_example(40, 9, 4, 3, 1);
  const RowOwners& owners = *example.owners;
  const int64_t row_bytes = example.shape.row_bytes();
  const int64_t table_bytes = owners.total_rows() * row_bytes;
  for (const int64_t ring_bytes : {int64_t{0}, table_bytes / 8, table_bytes}) {
    const auto prefetcher = make_prefetcher(
        {ram_table(example)},
        {.cache_bytes = table_bytes / 5, .ring_bytes = ring_bytes, .poison = false});
    // Two queries are too many.
    const NearDataCosts few = {.fetch_us_per_byte = 1, .attend_us = 0, .attend_us_per_byte = 0.6};
    std::mt19937 random(7);
    for (int i = 0; i < 300; ++i) {
      prefetcher->use_near_data(i % 3 == 0   ? std::optional<NearDataCosts>()
                                : i % 3 == 1 ? few
                                             : kAlways);
      const std::vector<int32_t> ids = random_ids(random, 40, 12);
      auto step = Prefetcher::begin(prefetcher, ids);
      step.wait(0);
      const std::vector<int64_t> near = step.near_segments(0);
      std::vector<int64_t> rows(2 * step.tokens().size());
      step.segment_rows(0, rows.data());
      const auto buffer = step.rows(0);
      int64_t near_bytes = 0;
      for (size_t s = 0; s < step.tokens().size(); ++s) {
        const int32_t token = step.tokens()[s];
        const int64_t count = owners.rows(token);
        if (std::ranges::find(near, static_cast<int64_t>(s)) != near.end()) {
          EXPECT(i % 3 != 0);
          EXPECT(i % 3 == 2 || std::ranges::count(ids, token) == 1);
          EXPECT(rows[2 * s] == rows[2 * s + 1]);
          near_bytes += count * row_bytes;
          continue;
        }
        EXPECT(rows[2 * s + 1] - rows[2 * s] == count);
        EXPECT(std::memcmp(buffer->data() + rows[2 * s] * row_bytes,
                           example.rows.data() + owners.offsets[token] * example.width(),
                           count * row_bytes) == 0);
      }
      step.end();
      const LayerRecord record = prefetcher->ledger()->steps().back().layers[0];
      EXPECT(record.near == std::ssize(near));
      EXPECT(record.near_bytes == near_bytes);
      EXPECT(record.rows * row_bytes >= record.near_bytes + record.bytes);
      if (!record.spilled) {
        EXPECT(record.rows * row_bytes ==
               record.near_bytes + record.bytes + record.hit_bytes + record.reused_bytes);
      }
      if (i % 3 == 2) EXPECT(record.bytes == 0 || record.spilled);
    }
    const LedgerTotals totals = prefetcher->ledger()->totals();
    EXPECT(totals.near > 0);
    EXPECT((totals.spilled > 0) == (ring_bytes < table_bytes));
    EXPECT((totals.reused > 0) == (ring_bytes > 0));
  }
}

void a_table_in_a_file_has_no_part_in_it() {
  const Example example = make_example(5, 3, 4, 3, 0);
  const std::string path = temporary_path("near_data_test");
  write_table_file(path, std::vector<TableData>{example.data()}, {});
  const auto prefetcher = make_prefetcher(TableFile(path, DirectIo::kOff).tables(), {});
  EXPECT(EXPECT_THROWS(Error, prefetcher->use_near_data(kAlways)) ==
         "near_data: expected tables in host memory, where attention can read them, got tables[0] "
         "in a file");
  auto step = Prefetcher::begin(prefetcher, std::vector<int32_t>{1, 2});
  step.wait(0);
  EXPECT(holds_the_rows(step, 0, example));
  std::filesystem::remove(path);
}

}  // namespace

int main() {
  RUN(the_break_even);
  RUN(the_extremes);
  RUN(wrong_costs);
  RUN(steps_bring_all_else);
  RUN(a_table_in_a_file_has_no_part_in_it);
  return check::failures != 0;
}
