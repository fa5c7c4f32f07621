// Copies by warps: each takes pieces of 2 KiB, all 16-byte loads of a piece on their way at once.
// Limited by the link to the host: 55 GB/s of PCIe 5 over some 1.3 us there and back are 72 KB in
// flight, 36 warps (est). So a few blocks do, and attention keeps the other multiprocessors. Bulk
// copies (Hopper) would take fewer threads; the loads run on every device from sm_80 on.
#pragma once

#include "core/cuda/primitives.cuh"
#include "runtime/cuda/fetch_blocks.hpp"

namespace l3ext::cuda {

inline constexpr int kFetchThreads = 512;
inline constexpr int kFetchWarps = kFetchThreads / 32;
inline constexpr int kLoads = 4;  // of 16 bytes, on their way per lane
inline constexpr int kPieceBytes = kLoads * 32 * 16;
inline constexpr int64_t kSlotBytes = 16;  // slots of the ring are multiples of it

// At most kPieceBytes, by one warp.
__device__ inline void copy_piece(std::byte* target, const std::byte* source, int bytes) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const auto to = reinterpret_cast<uintptr_t>(target), from = reinterpret_cast<uintptr_t>(source);
  if (((to ^ from) & 15) != 0) {  // no aligned word of the one is one of the other
    for (int i = lane; i < bytes; i += 32) target[i] = source[i];
    return;
  }
  const int head = min(bytes, static_cast<int>((16 - to % 16) % 16));
  const int words = (bytes - head) / 16;
  uint4 loaded[kLoads];
#pragma unroll
  for (int j = 0; j < kLoads; ++j) {
    const int i = lane + 32 * j;
    if (i < words) loaded[j] = load_streaming(source + head + 16 * i);
  }
#pragma unroll
  for (int j = 0; j < kLoads; ++j) {
    const int i = lane + 32 * j;
    if (i < words) {
      store_global(reinterpret_cast<uint4*>(target + head + 16 * i), loaded[j]);
    }
  }
  const int tail = head + 16 * words + lane - 16;  // lanes from 16 on; the others have the head
  if (lane < head) target[lane] = source[lane];
  if (lane >= 16 && tail < bytes) target[tail] = source[tail];
}

__device__ inline int64_t warp_of_grid() {
  return static_cast<int64_t>(blockIdx.x) * kFetchWarps + threadIdx.x / 32;
}
__device__ inline int64_t warps_of_grid() { return static_cast<int64_t>(gridDim.x) * kFetchWarps; }

// --- copies that the host lists ------------------------------------------------------------------
struct FetchBlocksArgs {
  static constexpr int kMost = 128;  // with less than the 4 KiB of a kernel's arguments
  struct {
    std::byte* target;
    const std::byte* source;
    int64_t bytes;
  } copies[kMost];
  int count;
};

__global__ void __launch_bounds__(kFetchThreads) fetch_blocks_kernel(FetchBlocksArgs args) {
  // Pieces of all copies, numbered through; a warp's come in ascending order.
  int64_t first = 0;  // piece of copy i
  int64_t piece = warp_of_grid();
  for (int i = 0; i < args.count; ++i) {
    const auto& copy = args.copies[i];
    const int64_t pieces = (copy.bytes + kPieceBytes - 1) / kPieceBytes;
    for (; piece < first + pieces; piece += warps_of_grid()) {
      const int64_t at = (piece - first) * kPieceBytes;
      copy_piece(copy.target + at, copy.source + at,
                 static_cast<int>(min(copy.bytes - at, int64_t{kPieceBytes})));
    }
    first += pieces;
  }
}

// --- a step that the device lists ----------------------------------------------------------------
struct FetchSlot {
  const std::byte* source;
  int64_t begin;  // in the ring; ascending
  int64_t bytes;  // 0: nothing to copy
};
struct FetchTotals {
  int64_t slots;
  int64_t bytes;  // of the ring that are taken
};

struct FetchStepArgs {
  FetchStepParams params;
  FetchTotals* totals;
  FetchSlot* slots;  // [most_tokens]
};

// The sum of `value` over the threads before this one, of a block of kFetchThreads; `total` is that
// of all. `sums`: [kFetchWarps] in shared memory, free when all threads have come back.
__device__ inline int64_t sum_before(int64_t value, int64_t* sums, int64_t& total) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  int64_t sum = value;
  for (int distance = 1; distance < 32; distance *= 2) {
    const auto other = static_cast<int64_t>(
        __shfl_up_sync(0xffffffffu, static_cast<long long>(sum), static_cast<unsigned>(distance)));
    if (lane >= distance) sum += other;
  }
  if (lane == 31) sums[warp] = sum;
  __syncthreads();
  int64_t before = 0;
  total = 0;
  for (int w = 0; w < kFetchWarps; ++w) {
    if (w < warp) before += sums[w];
    total += sums[w];
  }
  __syncthreads();
  return before + sum - value;
}

// One block: where each token's rows will be. A token takes the bytes behind those of the tokens
// before it, whatever the order in which threads run.
__global__ void __launch_bounds__(kFetchThreads) claim_slots_kernel(FetchStepArgs args) {
  const FetchStepParams& p = args.params;
  auto* sums = reinterpret_cast<int64_t*>(dynamic_shared());
  const int64_t count = min(static_cast<int64_t>(*p.num_tokens), p.most_tokens);
  int64_t taken = 0;                                       // by all before this round
  int64_t resident = 0, fetched = 0, bytes = 0, left = 0;  // of this thread
  for (int64_t round = 0; round < count; round += kFetchThreads) {
    const int64_t i = round + threadIdx.x;
    const int64_t token = i < count ? p.tokens[i] : -1;
    const bool is_token =
        token >= 0 && token < p.vocab_size && (i == 0 || p.tokens[i - 1] != token);
    const int64_t resident_at = is_token ? p.resident[token] : 0;
    const int64_t source = is_token ? p.sources[token] : 0;
    const bool absent = is_token && resident_at == 0 && source != 0;
    const int64_t needed = absent ? p.source_bytes[token] : 0;
    int64_t total = 0;
    const int64_t begin =
        taken + sum_before((needed + kSlotBytes - 1) / kSlotBytes * kSlotBytes, sums, total);
    const bool fits = begin + needed <= p.ring_bytes;
    if (i < count) {
      args.slots[i] = {reinterpret_cast<const std::byte*>(source), begin, fits ? needed : 0};
    }
    if (is_token) {
      p.directory[token] = !absent ? resident_at
                           : fits
                               ? static_cast<int64_t>(reinterpret_cast<uintptr_t>(p.ring)) + begin
                               : source;
      resident += resident_at != 0;
      fetched += absent && fits;
      bytes += absent && fits ? needed : 0;
      left += absent && !fits;
    }
    taken += total;
  }
  if (threadIdx.x == 0) *args.totals = {count, min(taken, p.ring_bytes)};
  if (p.counters == nullptr) return;
  const int64_t of_thread[] = {resident, fetched, bytes, left};
  for (int c = 0; c < 4; ++c) {
    int64_t total = 0;
    sum_before(of_thread[c], sums, total);
    if (threadIdx.x == 0) p.counters[c] += total;
  }
}

// The bytes of the ring that are taken, piece by piece: even work, however long the rows are.
__global__ void __launch_bounds__(kFetchThreads) fetch_step_kernel(FetchStepArgs args) {
  const FetchTotals totals = *args.totals;
  for (int64_t piece = warp_of_grid(); piece * kPieceBytes < totals.bytes;
       piece += warps_of_grid()) {
    const int64_t begin = piece * kPieceBytes, end = begin + kPieceBytes;
    int64_t low = 0, high = totals.slots;  // the last slot that begins here or before
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      (args.slots[middle].begin <= begin ? low : high) = middle;
    }
    for (int64_t s = low; s < totals.slots && args.slots[s].begin < end; ++s) {
      const FetchSlot slot = args.slots[s];
      const int64_t from = max(begin, slot.begin), to = min(end, slot.begin + slot.bytes);
      if (from < to) {
        copy_piece(args.params.ring + from, slot.source + (from - slot.begin),
                   static_cast<int>(to - from));
      }
    }
  }
}

}  // namespace l3ext::cuda
