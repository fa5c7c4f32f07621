// How a step's segments become units of work for the CPU kernels. Pure functions of the plan: no
// choice here changes a result, only who computes it when.
#pragma once

#include <cstdint>
#include <vector>

#include "attention/segmented_attention.hpp"

namespace l3ext::cpu {

// Some queries of one segment against all its rows.
struct Unit {
  int64_t segment = 0;
  int64_t query_begin = 0;  // sorted positions
  int64_t query_end = 0;
  int64_t row_begin = 0;
  int64_t row_end = 0;

  int64_t queries() const { return query_end - query_begin; }
  int64_t rows() const { return row_end - row_begin; }
  // In eighths of what reading a row costs, which is about as much as eight queries' products.
  int64_t cost() const { return rows() * (8 + queries()); }
};

// One unit per segment, or several of at most `block` queries each; in plan order. Several differ
// by at most `lanes` queries, so that no segment ends in a sliver. `block`: a multiple of `lanes`.
std::vector<Unit> make_units(const PlanView& plan, int64_t lanes, int64_t block);

// Indices of `units`, most expensive first, so that the last to finish is a short one.
std::vector<int32_t> longest_first(const std::vector<Unit>& units);

// Units in the order of work, in tasks that one thread does each. A unit of many queries is bound
// by products and leaves memory idle, so units of few, bound by memory, ride along with it: they
// follow it in its task, their rows being asked for while it is computed. Where no more may ride, a
// unit of few is a task of its own, after all others.
struct Schedule {
  std::vector<int32_t> units;  // indices
  std::vector<int64_t> tasks;  // where each begins in `units`, and the end of the last
};

// Most expensive first, so that the last to finish is a short one. `few_queries`: up to so many are
// few; `rider_rows`: the rows that ride along with one unit, one unit's more at most.
Schedule make_schedule(const std::vector<Unit>& units, int64_t few_queries, int64_t rider_rows);

// Bytes from the first element to behind the last row, at most.
template <typename T>
size_t extent(const MutableRows& rows, int64_t count) {
  return rows.data == nullptr ? 0 : static_cast<size_t>(count * rows.stride) * sizeof(T);
}

// Throws kValue unless positions are in range and rows within the table; `disjoint_rows` also
// asks for ascending segments, which row gradients need.
void check_plan(const PlanView& plan, int64_t table_rows, bool disjoint_rows);

// Throws kValue unless the directory has an address for every token of the step that owns rows.
void check_directory(const SegmentedAttentionInputs& inputs);

// Throws kValue unless segment_gradients places the segments' rows ascending and in bounds.
void check_gradient_rows(const SegmentedAttentionBackwardParams& params);

}  // namespace l3ext::cpu
