// How a segment becomes chunks, for the host twin and for the kernels: one source of the rules.
#pragma once

#include <cstdint>

#include "attention/cuda/schedule.hpp"
#include "core/cuda/host_device.hpp"

namespace l3ext::cuda {

// What a segment adds to the schedule. Sums of these over the segments before it say where its
// chunks (summed in segment_order) and its weights (summed in index order) lie.
struct SegmentWork {
  int64_t weights;  // elements of the backward workspace
  int32_t split;    // 1 if it is a split segment
  int32_t dense;    // chunks of each kind
  int32_t stream;
  int32_t copy;
};

L3EXT_HOST_DEVICE inline SegmentWork operator+(const SegmentWork& a, const SegmentWork& b) {
  return {a.weights + b.weights, a.split + b.split, a.dense + b.dense, a.stream + b.stream,
          a.copy + b.copy};
}

// The rules. A segment of at most one row has nothing to attend, and an invalid id's has none at
// all. In a decode step every chunk is small. Otherwise dense chunks; what is left of the last one
// streams where it fits, for there a dense chunk would compute mostly padding.
L3EXT_HOST_DEVICE inline SegmentWork segment_work(int64_t rows, int64_t queries, bool decode) {
  const auto chunks = [&](int64_t most) {
    return static_cast<int32_t>((queries + most - 1) / most);
  };
  SegmentWork work = {};
  if (rows > 0 && queries > kStreamQueries) {
    work.split = 1;
    work.weights = rows * ((queries + 7) / 8 * 8);
  }
  if (rows <= 1) {
    work.copy = chunks(kCopyQueries);
  } else if (decode) {
    work.stream = chunks(kStreamQueries);
  } else {
    const int64_t rest = queries % kDenseQueries;
    work.stream = rest > 0 && rest <= kStreamQueries ? 1 : 0;
    work.dense = chunks(kDenseQueries) - work.stream;
  }
  return work;
}

// Segments in ascending order of this key (ties by index) are in segment_order. Classes, not exact
// work: keys of 7 bits sort in one radix pass, and a factor of two is near enough for a queue.
constexpr int kOrderKeyBits = 7;
constexpr uint32_t kLastOrderKey = (1u << kOrderKeyBits) - 1;

L3EXT_HOST_DEVICE inline uint32_t segment_order_key(int64_t rows, int64_t queries) {
  uint64_t work = static_cast<uint64_t>(queries) * static_cast<uint64_t>(rows > 1 ? rows : 1);
  uint32_t log2 = 0;
  for (uint32_t step = 32; step > 0; step /= 2) {
    if (work >> step != 0) {
      work >>= step;
      log2 += step;
    }
  }
  const bool split = segment_work(rows, queries, false).split != 0;
  return kLastOrderKey - log2 - (split ? 64 : 0);
}

// The chunk of at most `most` queries at sorted position `begin` of a segment that ends at `end`.
L3EXT_HOST_DEVICE inline Chunk make_chunk(int32_t segment, int64_t begin, int64_t end,
                                          int64_t most) {
  const int64_t queries = end - begin < most ? end - begin : most;
  return {segment, static_cast<int32_t>(begin), static_cast<int32_t>(queries), 0};
}

}  // namespace l3ext::cuda
