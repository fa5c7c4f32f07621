// A plan that owns its buffers, on the host: for callers that have no tensors to put one in.
#pragma once

#include <cstdint>
#include <iterator>
#include <span>
#include <vector>

#include "attention/plan.hpp"
#include "attention/segmented_attention.hpp"

namespace l3ext {

struct PlanBuffers {
  std::vector<int32_t> permutation;      // as in PlanParams, exactly as large as stated there
  std::vector<int32_t> segment_tokens;   //
  std::vector<int32_t> segment_queries;  //
  std::vector<int64_t> segment_rows;     //
  int32_t num_segments = 0;
  int64_t table_rows = 0;

  // Plans the step; buffers of an earlier plan are used again. Throws as plan() does.
  void make(std::span<const int64_t> token_ids, std::span<const int64_t> offsets,
            bool check_offsets = true) {
    const size_t n = token_ids.size();
    permutation.resize(n);
    segment_tokens.resize(n);
    segment_queries.resize(n + 1);
    segment_rows.resize(2 * n);
    PlanParams params;
    params.token_ids = token_ids.data();
    params.num_tokens = std::ssize(token_ids);
    params.offsets = offsets.data();
    params.vocab_size = std::ssize(offsets) - 1;
    params.check_offsets = check_offsets;
    params.permutation = permutation.data();
    params.segment_tokens = segment_tokens.data();
    params.segment_queries = segment_queries.data();
    params.segment_rows = segment_rows.data();
    params.num_segments = &num_segments;
    params.table_rows = &table_rows;
    plan(params);
  }

  // Valid until the next make().
  PlanView view() const {
    PlanView view;
    view.permutation = permutation.data();
    view.segment_queries = segment_queries.data();
    view.segment_rows = segment_rows.data();
    view.segment_tokens = segment_tokens.data();
    view.num_tokens = std::ssize(permutation);
    view.num_segments = num_segments;
    return view;
  }
};

}  // namespace l3ext
