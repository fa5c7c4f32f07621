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
};

// The most queries that a unit takes from a segment of `rows` rows: their packed vectors
// (`depth` elements each) and scores should stay in the second-level cache.
int64_t unit_queries(int64_t rows, int64_t depth);

// One unit per segment (whole_segments) or per unit_queries() of it, in plan order.
std::vector<Unit> make_units(const PlanView& plan, int64_t depth, bool whole_segments);

// Indices of `units`, most expensive first, so that the last to finish is a short one.
std::vector<int32_t> longest_first(const std::vector<Unit>& units);

// Throws kValue unless positions are in range and rows within the table; `disjoint_rows` also
// asks for ascending segments, which row gradients need.
void check_plan(const PlanView& plan, int64_t table_rows, bool disjoint_rows);

// Throws kValue unless the directory has an address for every token of the step that owns rows.
void check_directory(const SegmentedAttentionInputs& inputs);

// Throws kValue unless segment_gradients places the segments' rows ascending and in bounds.
void check_gradient_rows(const SegmentedAttentionBackwardParams& params);

}  // namespace l3ext::cpu
