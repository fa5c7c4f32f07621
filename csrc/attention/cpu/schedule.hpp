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

// One unit per segment, or several of at most `block` queries each; in plan order. Several differ
// by at most `lanes` queries, so that no segment ends in a sliver. `block`: a multiple of `lanes`.
std::vector<Unit> make_units(const PlanView& plan, int64_t lanes, int64_t block);

// Indices of `units`, most expensive first, so that the last to finish is a short one.
std::vector<int32_t> longest_first(const std::vector<Unit>& units);

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
