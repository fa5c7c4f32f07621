// The host twin of the device's schedule: against layouts worked out by hand, and against what
// every schedule must hold.
#include "attention/cuda/schedule.hpp"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "attention/cuda/segment_work.hpp"
#include "check.hpp"
#include "core/error.hpp"

using l3ext::Error;
using l3ext::PlanView;
using l3ext::cuda::Chunk;
using l3ext::cuda::kCopyQueries;
using l3ext::cuda::kDecodeTokens;
using l3ext::cuda::kDenseQueries;
using l3ext::cuda::kStreamQueries;

namespace {

// The segments of a plan, and its schedule in an array exactly as large as needed, over garbage.
struct Case {
  std::vector<int32_t> queries = {0};
  std::vector<int64_t> rows;
  std::vector<int32_t> array;
  int64_t num_tokens = 0;

  // `segments`: (queries, rows) of each; a negative number of rows: an invalid id's -1..-1.
  explicit Case(const std::vector<std::pair<int64_t, int64_t>>& segments) {
    int64_t row = 0;
    for (const auto& [count, owned] : segments) {
      num_tokens += count;
      queries.push_back(static_cast<int32_t>(num_tokens));
      rows.push_back(owned < 0 ? -1 : row);
      rows.push_back(owned < 0 ? -1 : row + owned);
      row += std::max<int64_t>(owned, 0);
    }
    array.assign(static_cast<size_t>(l3ext::cuda::schedule_entries(num_tokens)), 0x5a5a5a5a);
    l3ext::cuda::make_schedule(view(), array.data());
  }

  int64_t num_segments() const { return static_cast<int64_t>(queries.size()) - 1; }
  PlanView view() const {
    PlanView view;
    view.segment_queries = queries.data();
    view.segment_rows = rows.data();
    view.num_tokens = num_tokens;
    view.num_segments = num_segments();
    return view;
  }
  l3ext::cuda::Schedule schedule() { return l3ext::cuda::carve_schedule(array.data(), num_tokens); }
  // Rows, and more queries than one stream chunk holds.
  bool split(int64_t s) const {
    return rows[2 * s + 1] > rows[2 * s] && queries[s + 1] - queries[s] > 8;
  }
  bool wide(int64_t s) const { return split(s) && queries[s + 1] - queries[s] > 32; }
  std::vector<int32_t> order() {
    const int32_t* order = schedule().segment_order;
    return {order, order + num_segments()};
  }
  // segment, query_begin, queries of every chunk in use
  std::vector<std::vector<int32_t>> chunks() {
    const l3ext::cuda::ScheduleHeader& header = *schedule().header;
    std::vector<std::vector<int32_t>> chunks;
    for (int i = 0; i < header.dense_chunks + header.stream_chunks + header.copy_chunks; ++i) {
      const Chunk& chunk = schedule().chunks[i];
      chunks.push_back({chunk.segment, chunk.query_begin, chunk.queries});
    }
    return chunks;
  }
  std::vector<int32_t> kinds() {
    const l3ext::cuda::ScheduleHeader& header = *schedule().header;
    return {header.dense_chunks, header.stream_chunks, header.copy_chunks};
  }
};

using Chunks = std::vector<std::vector<int32_t>>;
using Counts = std::vector<int32_t>;

void a_decode_step_streams_and_copies() {
  Case c({{3, 5}, {70, 1}, {17, 2}, {1, 512}, {2, 0}, {33, -1}});
  EXPECT(c.kinds() == Counts({0, 1 + 3 + 1, 3 + 1 + 2}));
  // Work 15, 70, 34, 512, 2, 33: classes 3, 6, 5, 9, 1, 5. Wide: 1, split: 2 too.
  EXPECT(c.schedule().header->split_segments == 2);
  EXPECT(c.schedule().header->wide_segments == 1);
  EXPECT(c.order() == Counts({1, 2, 3, 5, 0, 4}));
  EXPECT(c.chunks() == Chunks({{2, 73, 8},
                               {2, 81, 8},
                               {2, 89, 1},
                               {3, 90, 1},
                               {0, 0, 3},
                               {1, 3, 32},
                               {1, 35, 32},
                               {1, 67, 6},
                               {5, 93, 32},
                               {5, 125, 1},
                               {4, 91, 2}}));
  const int64_t* weights = c.schedule().segment_weights;
  const std::vector<int64_t> sums(weights, weights + 7);
  EXPECT(sums == std::vector<int64_t>({0, 0, 72, 72 + 48, 120, 120, 0}));
}

void a_larger_step_is_dense_and_its_remainders_stream() {
  // 64 + 8 queries, 64 + 9, 128, 8, 9, and copies to pass the limit of a decode step.
  Case c({{72, 100}, {73, 100}, {128, 50}, {8, 3}, {9, 3}, {kDecodeTokens, 1}});
  EXPECT(c.kinds() == Counts({1 + 2 + 2 + 1, 1 + 1, kDecodeTokens / kCopyQueries}));
  // Work 7200, 7300, 6400, 24, 27, 1024: classes 12, 12, 12, 4, 4, 10. All but 3 are
  // split, and but 4 wide.
  EXPECT(c.schedule().header->split_segments == 5);
  EXPECT(c.schedule().header->wide_segments == 4);
  EXPECT(c.order() == Counts({0, 1, 2, 5, 4, 3}));
  Chunks first = c.chunks();
  first.resize(9);
  EXPECT(first == Chunks({{0, 0, 64},
                          {1, 72, 64},
                          {1, 136, 9},
                          {2, 145, 64},
                          {2, 209, 64},
                          {4, 281, 9},
                          {0, 64, 8},
                          {3, 273, 8},
                          {5, 290, 32}}));
}

void the_limit_of_a_decode_step_is_inclusive() {
  EXPECT(Case({{kDecodeTokens, 2}}).kinds() == Counts({0, kDecodeTokens / kStreamQueries, 0}));
  EXPECT(Case({{kDecodeTokens + 1, 2}}).kinds() == Counts({kDecodeTokens / kDenseQueries, 1, 0}));
}

void no_tokens_make_an_empty_schedule() {
  Case c({});
  EXPECT(c.array == std::vector<int32_t>(16, 0));
}

void rows_and_queries_of_any_size_have_a_class() {
  using l3ext::cuda::kLastOrderKey;
  using l3ext::cuda::segment_order_key;
  EXPECT(segment_order_key(0, 1) == kLastOrderKey);
  EXPECT(segment_order_key(1, 1) == kLastOrderKey);
  EXPECT(segment_order_key(3, 1) == kLastOrderKey - 1);
  EXPECT(segment_order_key(2, 2) == kLastOrderKey - 2);
  EXPECT(segment_order_key(-5, 7) == kLastOrderKey - 2);
  EXPECT(segment_order_key(-5, 9) == kLastOrderKey - 3);
  EXPECT(segment_order_key(0, 9) == kLastOrderKey - 3);
  EXPECT(segment_order_key(1, 8) == kLastOrderKey - 3);
  EXPECT(segment_order_key(1, 9) == kLastOrderKey - 64 - 3);
  for (int64_t bit = 0; bit < 62; ++bit) {
    EXPECT(segment_order_key(int64_t{1} << bit, 1) == kLastOrderKey - bit);
    EXPECT(segment_order_key((int64_t{2} << bit) - 1, 1) == kLastOrderKey - bit);
  }
  const int64_t most = std::numeric_limits<int32_t>::max();
  EXPECT(segment_order_key(1, 32) == kLastOrderKey - 64 - 5);
  EXPECT(segment_order_key(1, 33) == kLastOrderKey - 2 * 64 - 5);
  EXPECT(segment_order_key(most, most) == kLastOrderKey - 2 * 64 - 61);
  EXPECT(l3ext::cuda::segment_work(1, most, true).chunks[l3ext::cuda::kCopy] == (1 << 26));
  EXPECT(l3ext::cuda::segment_work(2, most, true).chunks[l3ext::cuda::kStream] == (1 << 28));
  EXPECT(l3ext::cuda::segment_work(2, most, false).chunks[l3ext::cuda::kDense] == (1 << 25));
  EXPECT(l3ext::cuda::segment_work(most, most, false).weights == most * (most + 1));
}

// What holds of every schedule, whatever the segments.
void expect_sound(Case& c) {
  const l3ext::cuda::Schedule schedule = c.schedule();
  const l3ext::cuda::ScheduleHeader& header = *schedule.header;
  EXPECT(header.num_segments == c.num_segments());
  for (const int32_t entry : header.reserved) EXPECT(entry == 0);

  std::vector<int32_t> place(c.num_segments(), -1);
  const auto work_class = [&](int32_t s) {
    const int64_t queries = c.queries[s + 1] - c.queries[s];
    const int64_t rows = std::max<int64_t>(c.rows[2 * s + 1] - c.rows[2 * s], 1);
    int log2 = 0;
    while ((queries * rows) >> (log2 + 1)) ++log2;
    return log2;
  };
  for (int64_t i = 0; i < c.num_segments(); ++i) {
    const int32_t s = schedule.segment_order[i];
    EXPECT(s >= 0 && s < c.num_segments() && place[s] == -1);
    place[s] = static_cast<int32_t>(i);
    if (i == 0) continue;
    const int32_t before = schedule.segment_order[i - 1];
    const auto key = [&](int32_t s) {
      return std::tuple(!c.wide(s), !c.split(s), -work_class(s), s);
    };
    EXPECT(key(before) < key(s));
  }
  int32_t splits = 0, wides = 0;
  for (int32_t s = 0; s < c.num_segments(); ++s) splits += c.split(s), wides += c.wide(s);
  EXPECT(header.split_segments == splits);
  EXPECT(header.wide_segments == wides);

  const int32_t ends[] = {header.dense_chunks, header.dense_chunks + header.stream_chunks,
                          header.dense_chunks + header.stream_chunks + header.copy_chunks};
  const int32_t most[] = {kDenseQueries, kStreamQueries, kCopyQueries};
  EXPECT(ends[2] <= c.num_tokens);
  std::vector<int> covered(static_cast<size_t>(c.num_tokens), 0);
  int32_t i = 0;
  for (int kind = 0; kind < 3; ++kind) {
    std::pair<int32_t, int32_t> last = {-1, -1};
    for (; i < ends[kind]; ++i) {
      const Chunk& chunk = schedule.chunks[i];
      const int32_t s = chunk.segment, end = chunk.query_begin + chunk.queries;
      EXPECT(chunk.reserved == 0);
      EXPECT(chunk.queries >= 1 && chunk.queries <= most[kind]);
      EXPECT(s >= 0 && s < c.num_segments());
      EXPECT(c.queries[s] <= chunk.query_begin && end <= c.queries[s + 1]);
      EXPECT((kind == 2) == (c.rows[2 * s + 1] - c.rows[2 * s] <= 1));
      EXPECT(kind != 0 || (c.num_tokens > kDecodeTokens && chunk.queries > kStreamQueries));
      for (int32_t q = chunk.query_begin; q < end; ++q) ++covered[q];
      const std::pair<int32_t, int32_t> now = {place[s], chunk.query_begin};
      EXPECT(last < now);
      last = now;
    }
  }
  EXPECT(std::count(covered.begin(), covered.end(), 1) == c.num_tokens);

  int64_t sum = 0;
  for (int64_t s = 0; s < c.num_tokens; ++s) {
    EXPECT(schedule.segment_weights[s] == (s < c.num_segments() ? sum : 0));
    if (s >= c.num_segments()) EXPECT(schedule.segment_order[s] == 0);
    if (s >= c.num_segments() || !c.split(s)) continue;
    const int64_t queries = c.queries[s + 1] - c.queries[s];
    sum += (c.rows[2 * s + 1] - c.rows[2 * s]) * ((queries + 7) & ~int64_t{7});
  }
  for (; i < c.num_tokens; ++i) {
    const Chunk& chunk = schedule.chunks[i];
    EXPECT(chunk.segment == 0 && chunk.query_begin == 0 && chunk.queries == 0);
  }
}

void every_query_is_in_one_chunk() {
  std::mt19937 random(11);
  const int64_t rows[] = {0, 1, 1, 2, 3, 16, 511, 512, -1};
  const int64_t queries[] = {1, 1, 1, 2, 7, 8, 9, 31, 32, 33, 63, 64, 65, 72, 73, 127, 128, 129};
  for (const int segments : {1, 2, 3, 10, 60, 400}) {
    for (int repeat = 0; repeat < 20; ++repeat) {
      std::vector<std::pair<int64_t, int64_t>> list;
      for (int s = 0; s < segments; ++s) {
        list.push_back({queries[random() % std::size(queries)], rows[random() % std::size(rows)]});
      }
      Case c(list);
      expect_sound(c);
    }
  }
  Case one({{65536, 512}});
  expect_sound(one);
  Case distinct(std::vector<std::pair<int64_t, int64_t>>(5000, {1, 7}));
  expect_sound(distinct);
}

// A plan that is none throws before anything is written.
void a_broken_plan_is_refused() {
  const auto refused = [](auto&& spoil) {
    Case c({{3, 5}, {2, 0}, {4, 2}});
    PlanView view = c.view();
    spoil(c, view);
    const std::vector<int32_t> before = c.array;
    const std::string message =
        EXPECT_THROWS(Error, l3ext::cuda::make_schedule(view, c.array.data()));
    EXPECT(c.array == before);
    return message;
  };
  EXPECT(refused([](Case&, PlanView& view) { view.num_segments = -1; }) ==
         "plan: expected 0 to 9 segments, got -1");
  EXPECT(refused([](Case&, PlanView& view) { view.num_segments = 10; }) ==
         "plan: expected 0 to 9 segments, got 10");
  EXPECT(refused([](Case&, PlanView& view) { view.num_segments = 2; }) ==
         "plan: expected segments of 9 queries in all, got 5");
  EXPECT(refused([](Case& c, PlanView&) { c.queries[0] = 1; }) ==
         "plan: segment 0 has no queries, or starts where the last did not end");
  EXPECT(refused([](Case& c, PlanView&) { c.queries[2] = 3; }) ==
         "plan: segment 1 has no queries, or starts where the last did not end");
  EXPECT(refused([](Case& c, PlanView&) { c.queries[3] = 1 << 30; }) ==
         "plan: expected segments of 9 queries in all, got 1073741824");
  EXPECT(refused([](Case& c, PlanView&) { c.rows[5] = 4; }) ==
         "plan: expected rows that never fall, got 5..4 in segment 2");
}

}  // namespace

int main() {
  RUN(a_decode_step_streams_and_copies);
  RUN(a_larger_step_is_dense_and_its_remainders_stream);
  RUN(the_limit_of_a_decode_step_is_inclusive);
  RUN(no_tokens_make_an_empty_schedule);
  RUN(rows_and_queries_of_any_size_have_a_class);
  RUN(every_query_is_in_one_chunk);
  RUN(a_broken_plan_is_refused);
  return check::failures == 0 ? 0 : 1;
}
