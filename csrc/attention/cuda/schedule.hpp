// The schedule of a plan on the device: what the kernels' blocks work through. It follows from the
// plan's segments alone, has a fixed size, and lies in one int32 array that callers pass on unread.
#pragma once

#include <cstdint>

#include "attention/segmented_attention.hpp"
#include "core/cuda/host_device.hpp"

namespace l3ext::cuda {

// A chunk is some queries of one segment, attended by one block at a time.
constexpr int kStreamQueries = 8;  // one mma tile of queries: rows are streamed once
constexpr int kDenseQueries = 64;  // rows are used for eight tiles of queries each
constexpr int kWideQueries = 32;   // above it, row gradients take more than one block
constexpr int kCopyQueries = 32;   // segments of at most one row: nothing to attend, only to copy
// Steps of at most this many tokens run by the decode kernel, which splits every chunk's rows and
// columns over blocks: what they attend has at most kStreamQueries queries a chunk.
constexpr int64_t kDecodeTokens = 1024;

struct Chunk {
  int32_t segment;
  int32_t query_begin;  // sorted position
  int32_t queries;
  int32_t reserved;  // 0
};

struct ScheduleHeader {
  int32_t num_segments;
  int32_t dense_chunks;    // chunks[0 .. dense)
  int32_t stream_chunks;   // chunks[dense .. dense + stream)
  int32_t copy_chunks;     // the rest
  int32_t split_segments;  // with rows and more than kStreamQueries queries
  int32_t wide_segments;   // with rows and more than kWideQueries queries; split too
  int32_t reserved[10];    // 0
};

// Sections of the array, in this order. Within a kind, chunks follow segment_order, then
// query_begin. Entries past the last chunk and past num_segments are zeros.
struct Schedule {
  ScheduleHeader* header;
  Chunk* chunks;             // [num_tokens]
  int64_t* segment_weights;  // [num_tokens]: first element of the segment's weights in the backward
                             // workspace: over the split segments before it, the sum of rows times
                             // queries rounded up to 8
  int32_t* segment_order;    // [num_tokens]: the wide segments, then the other split ones, then the
                             // rest; in each part most work first (by power of two), ties by index
};

// int32 entries of the array; aligned to 16 bytes it keeps every section aligned.
constexpr int64_t schedule_entries(int64_t num_tokens) { return 16 + 7 * num_tokens; }

L3EXT_HOST_DEVICE inline Schedule carve_schedule(int32_t* array, int64_t num_tokens) {
  return {reinterpret_cast<ScheduleHeader*>(array), reinterpret_cast<Chunk*>(array + 16),
          reinterpret_cast<int64_t*>(array + 16 + 4 * num_tokens), array + 16 + 6 * num_tokens};
}

// The host twin of cuda::schedule: makes the same array from a plan in host memory, of which it
// reads num_tokens, num_segments, segment_queries and segment_rows. Throws kValue, before it writes
// anything, unless the segments follow each other and hold all queries.
void make_schedule(const PlanView& host_plan, int32_t* schedule);

}  // namespace l3ext::cuda
