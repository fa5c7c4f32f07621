#include "attention/cpu/schedule.hpp"

#include <algorithm>
#include <array>
#include <iterator>
#include <numeric>

#include "core/error.hpp"

namespace l3ext::cpu {

std::vector<Unit> make_units(const PlanView& plan, int64_t lanes, int64_t block) {
  std::vector<Unit> units;
  units.reserve(static_cast<size_t>(plan.num_segments));
  for (int64_t s = 0; s < plan.num_segments; ++s) {
    Unit unit;
    unit.segment = s;
    unit.row_begin = plan.segment_rows[2 * s];
    unit.row_end = plan.segment_rows[2 * s + 1];
    const int64_t begin = plan.segment_queries[s], end = plan.segment_queries[s + 1];
    // Vectors of queries, and units to deal them out to.
    const int64_t vectors = (end - begin + lanes - 1) / lanes;
    const int64_t parts = (vectors * lanes + block - 1) / block;
    for (int64_t i = 0; i < parts; ++i) {
      unit.query_begin = begin + vectors * i / parts * lanes;
      unit.query_end = std::min(begin + vectors * (i + 1) / parts * lanes, end);
      units.push_back(unit);
    }
  }
  return units;
}

// By eight bits of the cost at a time: comparisons, which are hard to predict, take several times
// as long, and all threads wait for it.
std::vector<int32_t> longest_first(const std::vector<Unit>& units) {
  struct Entry {
    uint64_t cost;
    int32_t unit;
  };
  std::vector<Entry> entries(units.size()), sorted(units.size());
  uint64_t most = 0;
  for (size_t i = 0; i < units.size(); ++i) {
    entries[i] = {static_cast<uint64_t>(units[i].cost()), static_cast<int32_t>(i)};
    most = std::max(most, entries[i].cost);
  }
  for (int shift = 0; shift < 64 && most >> shift != 0; shift += 8) {
    const auto digit = [&](const Entry& entry) { return 255 - (entry.cost >> shift & 255); };
    std::array<size_t, 256> begin = {};
    for (const Entry& entry : entries) ++begin[digit(entry)];
    std::exclusive_scan(begin.begin(), begin.end(), begin.begin(), size_t{0});
    for (const Entry& entry : entries) sorted[begin[digit(entry)]++] = entry;
    entries.swap(sorted);
  }
  std::vector<int32_t> order(units.size());
  std::transform(entries.begin(), entries.end(), order.begin(),
                 [](const Entry& entry) { return entry.unit; });
  return order;
}

Schedule make_schedule(const std::vector<Unit>& units, int64_t few_queries, int64_t rider_rows) {
  std::vector<int32_t> order = longest_first(units);
  const auto few = std::stable_partition(
      order.begin(), order.end(), [&](int32_t i) { return units[i].queries() > few_queries; });
  // Products beyond those that take about as long as reading the unit's own rows.
  const auto spare = [&](int32_t i) {
    return static_cast<double>(units[i].rows() * (units[i].queries() - few_queries));
  };
  double all_spare = 0, all_rows = 0;
  for (auto i = order.begin(); i != few; ++i) all_spare += spare(*i);
  for (auto i = few; i != order.end(); ++i) all_rows += static_cast<double>(units[*i].rows());

  Schedule schedule;
  schedule.units.reserve(order.size());
  auto rider = few;
  double share = 0, taken = 0;  // of the rows of few queries: up to this unit, and so far
  for (auto i = order.begin(); i != few; ++i) {
    schedule.tasks.push_back(std::ssize(schedule.units));
    schedule.units.push_back(*i);
    share += all_rows * spare(*i) / std::max(all_spare, 1.0);
    for (int64_t rows = 0; rider != order.end() && taken < share && rows < rider_rows; ++rider) {
      schedule.units.push_back(*rider);
      rows += units[*rider].rows();
      taken += static_cast<double>(units[*rider].rows());
    }
  }
  for (; rider != order.end(); ++rider) {
    schedule.tasks.push_back(std::ssize(schedule.units));
    schedule.units.push_back(*rider);
  }
  schedule.tasks.push_back(std::ssize(schedule.units));
  return schedule;
}

// The first sorted position whose token is none of the step's, or -1.
static int64_t first_wrong_position(const PlanView& plan) {
  const auto is_wrong = [&](int64_t i) {
    return plan.permutation[i] < 0 || plan.permutation[i] >= plan.num_tokens;
  };
  bool any = false;  // without a way out, so that vectors of positions are looked at
  for (int64_t i = 0; i < plan.num_tokens; ++i) any |= is_wrong(i);
  for (int64_t i = 0; any && i < plan.num_tokens; ++i) {
    if (is_wrong(i)) return i;
  }
  return -1;
}

void check_plan(const PlanView& plan, int64_t table_rows, bool disjoint_rows) {
  L3EXT_CHECK(plan.num_segments >= 0 && plan.num_segments <= plan.num_tokens,
              "plan: expected 0 to ", plan.num_tokens, " segments, got ", plan.num_segments);
  int64_t next_query = 0, next_row = 0;
  for (int64_t s = 0; s < plan.num_segments; ++s) {
    const int64_t begin = plan.segment_rows[2 * s], end = plan.segment_rows[2 * s + 1];
    L3EXT_CHECK(0 <= begin && begin <= end && end <= table_rows, "plan: segment ", s,
                " needs rows ", begin, "..", end, " of a table of ", table_rows, " rows");
    L3EXT_CHECK(plan.segment_queries[s] == next_query && plan.segment_queries[s + 1] > next_query,
                "plan: segment ", s, " has no queries, or starts where the last did not end");
    next_query = plan.segment_queries[s + 1];
    L3EXT_CHECK(!disjoint_rows || begin >= next_row,
                "plan: row gradients need segments with "
                "ascending rows, got row ",
                begin, " after row ", next_row, " in segment ", s);
    next_row = end;
  }
  L3EXT_CHECK(next_query == plan.num_tokens, "plan: expected segments of ", plan.num_tokens,
              " queries in all, got ", next_query);
  const int64_t wrong = first_wrong_position(plan);
  L3EXT_CHECK(wrong < 0, "plan: expected positions in [0, ", plan.num_tokens, "), got ",
              plan.permutation[wrong], " at sorted position ", wrong);
}

void check_directory(const SegmentedAttentionInputs& inputs) {
  const PlanView& plan = inputs.plan;
  for (int64_t s = 0; s < plan.num_segments; ++s) {
    const int64_t token = plan.segment_tokens[s];
    L3EXT_CHECK(0 <= token && token < inputs.vocab_size, "directory: expected an entry for token ",
                token, ", got entries for ", inputs.vocab_size, " tokens");
    const bool owns_rows = plan.segment_rows[2 * s] < plan.segment_rows[2 * s + 1];
    L3EXT_CHECK(!owns_rows || inputs.directory[token] != 0,
                "directory: expected the address of the rows of token ", token, ", got 0");
  }
}

void check_gradient_rows(const SegmentedAttentionBackwardParams& params) {
  int64_t next = 0;
  for (int64_t s = 0; s < params.plan.num_segments; ++s) {
    const int64_t rows = params.plan.segment_rows[2 * s + 1] - params.plan.segment_rows[2 * s];
    const int64_t begin = params.segment_gradients[s];
    L3EXT_CHECK(next <= begin && begin <= params.gradient_rows - rows,
                "segment_gradients: expected room for ", rows, " rows of segment ", s, " in ", next,
                "..", params.gradient_rows, ", got them at ", begin);
    next = begin + rows;
  }
}

}  // namespace l3ext::cpu
