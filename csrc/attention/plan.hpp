// The plan of a step: its positions sorted by token id, cut into segments of equal ids. Made once
// from the ids alone, shared by every layer and by both directions.
#pragma once

#include <cstdint>

#include "core/dtype.hpp"

namespace l3ext {

// All outputs have a fixed size, so that a plan can be captured and replayed with other ids;
// segments past *num_segments are empty (they start at num_tokens, rows 0..0, token -1).
struct PlanParams {
  const void* token_ids = nullptr;  // [num_tokens], int32 or int64
  DType token_dtype = DType::kInt64;
  int64_t num_tokens = 0;            // at most 2^31 - 1
  const int64_t* offsets = nullptr;  // [vocab_size + 1]: token t owns rows offsets[t]..offsets[t+1]
  int64_t vocab_size = 0;            // at most 2^31 - 1
  bool check_offsets = true;         // false: the caller has run check_offsets() on them before

  int32_t* permutation = nullptr;      // [num_tokens]: sorted position -> original position
  int32_t* segment_tokens = nullptr;   // [num_tokens]: ascending
  int32_t* segment_queries = nullptr;  // [num_tokens + 1]: first sorted position of each segment
  int64_t* segment_rows = nullptr;     // [num_tokens, 2]: first row, one past the last row
  int32_t* num_segments = nullptr;     // [1]
  int64_t* table_rows = nullptr;       // [1]: offsets[vocab_size], the rows a table must have
};

// Stable in the position: equal ids keep their order. Throws kValue for an id outside
// [0, vocab_size), naming the position.
void plan(const PlanParams& params);

// Throws kValue unless offsets [vocab_size + 1] start at 0 and never fall.
void check_offsets(const int64_t* offsets, int64_t vocab_size);

}  // namespace l3ext
