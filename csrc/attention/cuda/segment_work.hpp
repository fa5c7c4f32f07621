// How a segment becomes chunks, for the host twin and for the kernels: one source of the rules.
#pragma once

#include <cstdint>
#include <type_traits>

#include "attention/cuda/schedule.hpp"
#include "core/cuda/host_device.hpp"

namespace l3ext::cuda {

// In the order in which the schedule holds them.
enum ChunkKind { kDense, kStream, kCopy, kChunkKinds };

L3EXT_HOST_DEVICE constexpr int64_t most_queries(int kind) {
  return kind == kDense ? kDenseQueries : kind == kStream ? kStreamQueries : kCopyQueries;
}

// What a segment adds to the schedule. Sums of these over the segments before it say where its
// chunks (summed in segment_order) and its weights (summed in index order) lie.
struct SegmentWork {
  int64_t weights;  // elements of the backward workspace
  int32_t split;    // 1: a split segment
  int32_t wide;     // 1: a wide segment
  int32_t chunks[kChunkKinds];
  int32_t reserved;  // 0: scans copy whole elements, and padding would be memory that nobody wrote
};
static_assert(std::has_unique_object_representations_v<SegmentWork>);

L3EXT_HOST_DEVICE inline SegmentWork operator+(const SegmentWork& a, const SegmentWork& b) {
  return {a.weights + b.weights,
          a.split + b.split,
          a.wide + b.wide,
          {a.chunks[0] + b.chunks[0], a.chunks[1] + b.chunks[1], a.chunks[2] + b.chunks[2]},
          0};
}

L3EXT_HOST_DEVICE inline bool is_split(int64_t rows, int64_t queries) {
  return rows > 0 && queries > kStreamQueries;
}

// The rules. A segment of at most one row has nothing to attend, and an invalid id's has none at
// all. In a decode step every chunk is small. Otherwise dense chunks; what is left of the last one
// streams where it fits, for there a dense chunk would compute mostly padding. No queries, no work.
L3EXT_HOST_DEVICE inline SegmentWork segment_work(int64_t rows, int64_t queries, bool decode) {
  const auto count = [queries](int kind) {
    return static_cast<int32_t>((queries + most_queries(kind) - 1) / most_queries(kind));
  };
  SegmentWork work = {};
  if (is_split(rows, queries)) {
    work.split = 1;
    work.wide = queries > kWideQueries ? 1 : 0;
    work.weights = rows * ((queries + 7) / 8 * 8);
  }
  if (rows <= 1) {
    work.chunks[kCopy] = count(kCopy);
  } else if (decode) {
    work.chunks[kStream] = count(kStream);
  } else {
    const int64_t rest = queries % kDenseQueries;
    work.chunks[kStream] = rest > 0 && rest <= kStreamQueries ? 1 : 0;
    work.chunks[kDense] = count(kDense) - work.chunks[kStream];
  }
  return work;
}

// Segments in ascending order of this key (ties by index) are in segment_order: wide ones first,
// then split ones, each by work. Powers of two of it: keys of 8 bits sort in one radix pass, and a
// factor of two is near enough for a queue.
constexpr int kOrderKeyBits = 8;
constexpr uint32_t kLastOrderKey = 3 * 64 - 1;

L3EXT_HOST_DEVICE inline uint32_t segment_order_key(int64_t rows, int64_t queries) {
  uint64_t work = static_cast<uint64_t>(queries) * static_cast<uint64_t>(rows > 1 ? rows : 1);
  uint32_t log2 = 0;
  for (uint32_t step = 32; step > 0; step /= 2) {
    if (work >> step != 0) {
      work >>= step;
      log2 += step;
    }
  }
  const uint32_t part = !is_split(rows, queries) ? 2 : queries <= kWideQueries ? 1 : 0;
  return 64 * part + 63 - log2;
}

// The index-th chunk of a kind among those of a segment [begin, end) with `dense` dense ones. Its
// stream chunks come behind these.
L3EXT_HOST_DEVICE inline Chunk make_chunk(int kind, int64_t index, int32_t segment, int64_t begin,
                                          int64_t end, int64_t dense) {
  const int64_t first =
      begin + most_queries(kind) * index + (kind == kStream ? kDenseQueries * dense : 0);
  const int64_t queries = end - first < most_queries(kind) ? end - first : most_queries(kind);
  return {segment, static_cast<int32_t>(first), static_cast<int32_t>(queries), 0};
}

}  // namespace l3ext::cuda
