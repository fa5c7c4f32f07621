#include "attention/cuda/schedule.hpp"

#include <algorithm>
#include <vector>

#include "attention/cuda/segment_work.hpp"
#include "core/error.hpp"

namespace l3ext::cuda {
namespace {

struct Segment {
  int64_t rows, begin, end;
};

Segment read_segment(const PlanView& plan, int64_t s) {
  return {plan.segment_rows[2 * s + 1] - plan.segment_rows[2 * s], plan.segment_queries[s],
          plan.segment_queries[s + 1]};
}

// A plan of other segments would have chunks without number, or ones past the array's end.
void check_segments(const PlanView& plan) {
  L3EXT_CHECK(plan.num_segments >= 0 && plan.num_segments <= plan.num_tokens,
              "plan: expected 0 to ", plan.num_tokens, " segments, got ", plan.num_segments);
  int64_t next_query = 0;
  for (int64_t s = 0; s < plan.num_segments; ++s) {
    const Segment segment = read_segment(plan, s);
    L3EXT_CHECK(segment.begin == next_query && segment.end > next_query, "plan: segment ", s,
                " has no queries, or starts where the last did not end");
    L3EXT_CHECK(segment.rows >= 0, "plan: expected rows that never fall, got ",
                plan.segment_rows[2 * s], "..", plan.segment_rows[2 * s + 1], " in segment ", s);
    next_query = segment.end;
  }
  L3EXT_CHECK(next_query == plan.num_tokens, "plan: expected segments of ", plan.num_tokens,
              " queries in all, got ", next_query);
}

}  // namespace

void make_schedule(const PlanView& host_plan, int32_t* schedule) {
  check_segments(host_plan);
  const int64_t num_tokens = host_plan.num_tokens, num_segments = host_plan.num_segments;
  const bool decode = num_tokens <= kDecodeTokens;
  std::fill_n(schedule, schedule_entries(num_tokens), 0);
  const Schedule out = carve_schedule(schedule, num_tokens);

  std::vector<uint32_t> keys(static_cast<size_t>(num_segments));
  SegmentWork sum = {};
  for (int64_t s = 0; s < num_segments; ++s) {
    const Segment segment = read_segment(host_plan, s);
    keys[s] = segment_order_key(segment.rows, segment.end - segment.begin);
    out.segment_weights[s] = sum.weights;
    out.segment_order[s] = static_cast<int32_t>(s);
    sum = sum + segment_work(segment.rows, segment.end - segment.begin, decode);
  }
  const auto& chunks = sum.chunks;
  *out.header = {static_cast<int32_t>(num_segments),
                 chunks[kDense],
                 chunks[kStream],
                 chunks[kCopy],
                 sum.split,
                 sum.wide,
                 {}};
  std::stable_sort(out.segment_order, out.segment_order + num_segments,
                   [&](int32_t a, int32_t b) { return keys[a] < keys[b]; });

  Chunk* next = out.chunks;
  for (int kind = 0; kind < kChunkKinds; ++kind) {
    for (int64_t i = 0; i < num_segments; ++i) {
      const int32_t s = out.segment_order[i];
      const Segment segment = read_segment(host_plan, s);
      const SegmentWork work = segment_work(segment.rows, segment.end - segment.begin, decode);
      for (int64_t k = 0; k < work.chunks[kind]; ++k) {
        *next++ = make_chunk(kind, k, s, segment.begin, segment.end, work.chunks[kDense]);
      }
    }
  }
}

}  // namespace l3ext::cuda
