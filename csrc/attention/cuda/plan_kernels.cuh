// The plan and the schedule on the device. In every stage thread i makes entry i of some arrays;
// the stages only differ in what lies between them. A step of at most kDecodeTokens runs them all
// in one block, their arrays in shared memory and barriers between: one launch. For a larger one
// each is a kernel, and sorts, selections and scans over the device lie between (plan.cu).
//
// Limited by latency: of launches, barriers and dependent loads. The bytes are few.
#pragma once

#include <cstring>

#include "attention/cuda/segment_work.hpp"
#include "core/cuda/device.cuh"

namespace l3ext::cuda {

inline constexpr uint32_t kNoKey = 1u << 31;  // behind every key

// Arrays are [num_tokens] where nothing else is said.
struct ScheduleArgs {
  int64_t num_tokens;
  const int32_t* starts;        // [>= num_segments]: first sorted position of each segment
  const int64_t* segment_rows;  // [>= num_segments, 2]
  const int32_t* num_segments;  // [1]
  int32_t* schedule;            // [schedule_entries(num_tokens)]
  // Between the stages; entries past num_segments come last in the order and add nothing.
  uint32_t* keys;     // segment_order_key()
  int32_t* order;     // segments in ascending order of keys
  SegmentWork* work;  // of each segment
  SegmentWork* sums;  // of WorkInOrder, inclusive
};

struct PlanArgs {
  const void* token_ids;
  bool int64_ids;          // or int32
  const int64_t* offsets;  // [vocab_size + 1]
  int64_t vocab_size;
  int32_t* permutation;
  int32_t* segment_tokens;
  int32_t* segment_queries;  // [num_tokens + 1]
  int64_t* segment_rows;     // [num_tokens, 2]
  int32_t* num_segments;     // [1]
  int64_t* table_rows;       // [1]
  // Between the stages. The tokens of all positions lie in schedule.keys until they are sorted.
  int32_t* positions;     // 0, 1, 2, ...
  uint32_t* sorted_keys;  // tokens in ascending order
  int32_t* starts;        // schedule.starts
  ScheduleArgs schedule;
};

// --- stages
// ----------------------------------------------------------------------------------------- The
// token of position i as a sort key. All invalid ids share one that no token has, the last.
__device__ inline uint32_t token_key(const PlanArgs& a, int64_t i) {
  const int64_t id = a.int64_ids ? static_cast<const int64_t*>(a.token_ids)[i]
                                 : static_cast<const int32_t*>(a.token_ids)[i];
  return static_cast<uint32_t>(id >= 0 && id < a.vocab_size ? id : a.vocab_size);
}

// Whether a segment starts at sorted position i.
struct IsStart {
  const uint32_t* sorted_keys;
  L3EXT_HOST_DEVICE bool operator()(int32_t i) const {
    return i == 0 || sorted_keys[i] != sorted_keys[i - 1];
  }
};

__device__ inline int64_t segment_end(const ScheduleArgs& a, int64_t s, int32_t num_segments) {
  return s + 1 < num_segments ? a.starts[s + 1] : a.num_tokens;
}

__device__ inline void set_work(const ScheduleArgs& a, int64_t s, int64_t rows, int64_t queries) {
  a.keys[s] = segment_order_key(rows, queries);
  a.work[s] = segment_work(rows, queries, a.num_tokens <= kDecodeTokens);
}

// Entry i of the plan's segments, and the work of segment i.
__device__ inline void write_segment(const PlanArgs& a, int64_t i, int32_t num_segments) {
  const int64_t num_tokens = a.schedule.num_tokens;
  if (i == 0) {
    a.segment_queries[num_tokens] = static_cast<int32_t>(num_tokens);
    *a.table_rows = a.offsets[a.vocab_size];
  }
  if (i >= num_tokens) return;
  int64_t token = -1, begin = num_tokens, end = num_tokens, row_begin = 0, row_end = 0;
  if (i < num_segments) {
    begin = a.starts[i];
    end = segment_end(a.schedule, i, num_segments);
    row_begin = row_end = -1;
    if (const uint32_t key = a.sorted_keys[begin]; key < a.vocab_size) {
      token = key;
      row_begin = a.offsets[token];
      row_end = a.offsets[token + 1];
    }
  }
  a.segment_tokens[i] = static_cast<int32_t>(token);
  a.segment_queries[i] = static_cast<int32_t>(begin);
  a.segment_rows[2 * i] = row_begin;
  a.segment_rows[2 * i + 1] = row_end;
  set_work(a.schedule, i, row_end - row_begin, end - begin);
}

// The work of segment i of a plan that was made elsewhere.
__device__ inline void read_segment(const ScheduleArgs& a, int64_t i, int32_t num_segments) {
  int64_t rows = 0, queries = 0;
  if (i < num_segments) {
    rows = a.segment_rows[2 * i + 1] - a.segment_rows[2 * i];
    queries = segment_end(a, i, num_segments) - a.starts[i];
  }
  set_work(a, i, rows, queries);
}

// What the schedule sums up: chunks in segment_order, weights in index order.
struct WorkInOrder {
  const SegmentWork* work;
  const int32_t* order;
  L3EXT_HOST_DEVICE SegmentWork operator()(int32_t i) const {
    SegmentWork element = work[order[i]];
    element.weights = work[i].weights;
    return element;
  }
};

// Entry i of every section. Each thread finds its own chunk's segment by bisection: that is even
// work, whatever the segments, and writes every chunk once, next to its neighbour's.
__device__ inline void write_schedule(const ScheduleArgs& a, int64_t i, int32_t num_segments) {
  const Schedule out = carve_schedule(a.schedule, a.num_tokens);
  if (i >= a.num_tokens) {
    if (i == 0) *out.header = {};  // no tokens
    return;
  }
  const SegmentWork& total = a.sums[a.num_tokens - 1];
  if (i == 0) {
    *out.header = {num_segments,
                   total.chunks[kDense],
                   total.chunks[kStream],
                   total.chunks[kCopy],
                   total.split,
                   total.wide,
                   {}};
  }
  out.segment_weights[i] = i > 0 && i < num_segments ? a.sums[i - 1].weights : 0;
  out.segment_order[i] = i < num_segments ? a.order[i] : 0;

  int kind = 0;
  int64_t index = i;  // among the chunks of its kind
  while (kind < kChunkKinds && index >= total.chunks[kind]) index -= total.chunks[kind++];
  if (kind == kChunkKinds) {
    out.chunks[i] = {};
    return;
  }
  int64_t place = 0;  // of its segment in the order: the first where the sum exceeds index
  for (int64_t end = num_segments; place < end;) {
    const int64_t middle = place + (end - place) / 2;
    if (a.sums[middle].chunks[kind] > index) {
      end = middle;
    } else {
      place = middle + 1;
    }
  }
  const auto before = [&](int k) { return place > 0 ? a.sums[place - 1].chunks[k] : 0; };
  const int32_t s = a.order[place];
  out.chunks[i] =
      make_chunk(kind, index - before(kind), s, a.starts[s], segment_end(a, s, num_segments),
                 a.sums[place].chunks[kDense] - before(kDense));
}

// --- one kernel per stage
// ---------------------------------------------------------------------------
inline constexpr int kStageThreads = 256;

__device__ inline int64_t thread_of_grid() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

__global__ void __launch_bounds__(kStageThreads) token_keys_kernel(PlanArgs a) {
  const int64_t i = thread_of_grid();
  if (i >= a.schedule.num_tokens) return;
  a.schedule.keys[i] = token_key(a, i);
  a.positions[i] = static_cast<int32_t>(i);
}

__global__ void __launch_bounds__(kStageThreads) segments_kernel(PlanArgs a) {
  write_segment(a, thread_of_grid(), *a.num_segments);
}

struct ReadSegmentsArgs {
  int32_t* positions;
  ScheduleArgs schedule;
};
__global__ void __launch_bounds__(kStageThreads) read_segments_kernel(ReadSegmentsArgs a) {
  const int64_t i = thread_of_grid();
  if (i >= a.schedule.num_tokens) return;
  read_segment(a.schedule, i, *a.schedule.num_segments);
  a.positions[i] = static_cast<int32_t>(i);
}

__global__ void __launch_bounds__(kStageThreads) schedule_kernel(ScheduleArgs a) {
  write_schedule(a, thread_of_grid(), *a.num_segments);
}

// --- all stages in one block
// ------------------------------------------------------------------------ The value of lane
// `source`, of any type that is whole words.
template <typename T>
__device__ inline T shuffle(const T& value, int source) {
  uint32_t words[sizeof(T) / 4];
  std::memcpy(words, &value, sizeof(T));
#pragma unroll
  for (uint32_t& word : words) word = __shfl_sync(0xffffffffu, word, source);
  T result;
  std::memcpy(&result, words, sizeof(T));
  return result;
}

template <typename T>
__device__ inline T warp_inclusive_scan(T value) {
  const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const T below = shuffle(value, max(lane - delta, 0));
    if (lane >= delta) value = below + value;
  }
  return value;
}

// The sum of the values of threads 0 .. threadIdx.x. `sums_of_warps` [32] lies in shared memory.
template <typename T>
__device__ inline T block_inclusive_scan(T value, T* sums_of_warps) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  value = warp_inclusive_scan(value);
  if (blockDim.x == 32) return value;
  if (lane == 31) sums_of_warps[warp] = value;
  __syncthreads();
  const bool exists = lane < static_cast<int>(blockDim.x / 32);
  const T before =
      shuffle(warp_inclusive_scan(exists ? sums_of_warps[lane] : T{}), max(warp - 1, 0));
  return warp > 0 ? before + value : value;
}

// Where this thread's key goes in a stable sort of the block's keys [blockDim.x] in shared memory:
// the number of keys before it. Every key is compared with every other, four per load; for keys as
// few as a decode step's that is less than the barriers of a radix sort.
__device__ inline int stable_rank(const uint32_t* keys) {
  const auto* quads = reinterpret_cast<const uint4*>(keys);
  const int i = static_cast<int>(threadIdx.x);
  const int first = i / 32 * 8;  // the first of this warp's eight quads
  const uint32_t own = keys[i];
  int rank = 0;
  const auto count_below = [&](uint4 v, uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
    rank += (v.x < x) + (v.y < y) + (v.z < z) + (v.w < w);
  };
  const auto tie = [&](int j) { return own + (j < i ? 1 : 0); };  // an equal key before us counts
  for (int q = 0; q < first; ++q) count_below(quads[q], own + 1, own + 1, own + 1, own + 1);
  for (int q = first; q < first + 8; ++q) {
    count_below(quads[q], tie(4 * q), tie(4 * q + 1), tie(4 * q + 2), tie(4 * q + 3));
  }
  for (int q = first + 8; q < static_cast<int>(blockDim.x / 4); ++q) {
    count_below(quads[q], own, own, own, own);
  }
  return rank;
}

// What lies between the stages of one block; [threads] where nothing else is said.
struct BlockArrays {
  uint32_t* keys;
  uint32_t* sorted_keys;
  int32_t* starts;
  SegmentWork* work;
  SegmentWork* sums_of_warps;   // [32]
  int32_t* starts_before_warp;  // [32]
  int32_t* num_segments;        // [1]
};

constexpr int64_t block_array_bytes(int64_t threads) {
  return threads * int64_t{3 * 4 + sizeof(SegmentWork)} + 32 * int64_t{sizeof(SegmentWork) + 4} + 4;
}
static_assert(block_array_bytes(kDecodeTokens) <= 48 * 1024, "more would have to be asked for");

__device__ inline BlockArrays carve_block_arrays() {
  const int threads = static_cast<int>(blockDim.x);
  BlockArrays arrays;
  arrays.keys = reinterpret_cast<uint32_t*>(dynamic_shared());
  arrays.sorted_keys = arrays.keys + threads;
  arrays.starts = reinterpret_cast<int32_t*>(arrays.sorted_keys + threads);
  arrays.work = reinterpret_cast<SegmentWork*>(arrays.starts + threads);
  arrays.sums_of_warps = arrays.work + threads;
  arrays.starts_before_warp = reinterpret_cast<int32_t*>(arrays.sums_of_warps + 32);
  arrays.num_segments = arrays.starts_before_warp + 32;
  return arrays;
}

// From every segment's key and work to the schedule.
__device__ inline void schedule_in_block(const ScheduleArgs& a, const BlockArrays& arrays,
                                         int32_t num_segments) {
  const int i = static_cast<int>(threadIdx.x);
  if (i >= a.num_tokens) {
    a.keys[i] = kNoKey;
    a.work[i] = {};
  }
  __syncthreads();
  a.order[stable_rank(a.keys)] = i;
  __syncthreads();
  const SegmentWork element = WorkInOrder{a.work, a.order}(i);
  __syncthreads();  // the sums overwrite what was read, and in a lone warp the scan has no barrier
  a.sums[i] = block_inclusive_scan(element, arrays.sums_of_warps);
  __syncthreads();
  write_schedule(a, i, num_segments);
}

__device__ inline void use_block_arrays(ScheduleArgs& a, const BlockArrays& arrays) {
  a.keys = arrays.keys;
  a.work = arrays.work;
  // What has been read by then makes room: the tokens for the order, the work for its sums.
  a.order = reinterpret_cast<int32_t*>(arrays.sorted_keys);
  a.sums = arrays.work;
}

// One block of at least num_tokens threads, whole warps.
__global__ void __launch_bounds__(kDecodeTokens) plan_in_block_kernel(PlanArgs a) {
  const BlockArrays arrays = carve_block_arrays();
  use_block_arrays(a.schedule, arrays);
  a.sorted_keys = arrays.sorted_keys;
  a.schedule.starts = a.starts = arrays.starts;
  const int i = static_cast<int>(threadIdx.x);
  const bool is_token = i < a.schedule.num_tokens;

  const uint32_t key = is_token ? token_key(a, i) : kNoKey;
  arrays.keys[i] = key;
  __syncthreads();
  const int rank = stable_rank(arrays.keys);
  arrays.sorted_keys[rank] = key;
  if (is_token) a.permutation[rank] = i;
  __syncthreads();
  const bool is_start = is_token && IsStart{arrays.sorted_keys}(i);
  const int32_t starts = block_inclusive_scan<int32_t>(is_start, arrays.starts_before_warp);
  if (is_start) arrays.starts[starts - 1] = i;
  if (i == static_cast<int>(blockDim.x) - 1) *arrays.num_segments = *a.num_segments = starts;
  __syncthreads();
  const int32_t num_segments = *arrays.num_segments;
  write_segment(a, i, num_segments);
  schedule_in_block(a.schedule, arrays, num_segments);
}

__global__ void __launch_bounds__(kDecodeTokens) schedule_in_block_kernel(ScheduleArgs a) {
  const BlockArrays arrays = carve_block_arrays();
  use_block_arrays(a, arrays);
  const int32_t num_segments = *a.num_segments;
  const int i = static_cast<int>(threadIdx.x);
  if (i < a.num_tokens) read_segment(a, i, num_segments);
  schedule_in_block(a, arrays, num_segments);
}

}  // namespace l3ext::cuda
