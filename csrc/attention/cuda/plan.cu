// Launches of the plan and of the schedule.
//
// Up to kDecodeTokens: one kernel. Beyond, for 64K ids of a vocabulary of 2^16 to 2^24 tokens, 15
// kernels and 8 memsets: three kernels are ours, and CUB takes 5 + 5 to sort by token, 2 to select
// the starts of segments, 3 + 3 to sort by work and 2 to sum up. An estimate, not measured: 2 to 3
// us each, for none has enough work to hide its own start; 45 to 65 us in all.
#include <algorithm>
#include <bit>
#include <limits>

#include "attention/cuda/device_algorithms.cuh"
#include "attention/cuda/plan_kernels.cuh"
#include "attention/cuda/segmented_attention.hpp"
#include "core/scratch.hpp"

namespace l3ext::cuda {
namespace {

// --- workspace
// -------------------------------------------------------------------------------------- What lies
// between the kernels of a larger step; [num_tokens] where nothing else is said.
struct Workspace {
  uint32_t* keys;
  uint32_t* sorted_keys;
  int32_t* positions;
  int32_t* starts;
  int32_t* order;
  SegmentWork* work;
  SegmentWork* sums;
  std::byte* storage;  // [storage_bytes]: of one device algorithm at a time
  size_t storage_bytes;
};

// Keys are tokens, and vocab_size for what is none. A sort needs a bit.
int token_key_bits(int64_t vocab_size) {
  return std::max<int>(std::bit_width(static_cast<uint64_t>(vocab_size)), 1);
}

// The most that any algorithm of a step needs. Both sorts are of at most `key_bits`, or of the
// schedule's own keys.
size_t storage_bytes(int64_t num_tokens, int key_bits) {
  size_t most = 0, bytes = 0;
  for (const int bits : {key_bits, kOrderKeyBits}) {
    sort_pairs(nullptr, bytes, nullptr, nullptr, nullptr, nullptr, num_tokens, bits, nullptr);
    most = std::max(most, bytes);
  }
  select_indices(nullptr, bytes, IsStart{}, nullptr, nullptr, num_tokens, nullptr);
  most = std::max(most, bytes);
  inclusive_scan<SegmentWork>(nullptr, bytes, WorkInOrder{}, nullptr, num_tokens, nullptr);
  return std::max(most, bytes);
}

Workspace carve(Carver& carver, int64_t num_tokens, int key_bits) {
  Workspace w = {};
  w.keys = carver.take<uint32_t>(num_tokens);
  w.sorted_keys = carver.take<uint32_t>(num_tokens);
  w.positions = carver.take<int32_t>(num_tokens);
  w.starts = carver.take<int32_t>(num_tokens);
  w.order = carver.take<int32_t>(num_tokens);
  w.work = carver.take<SegmentWork>(num_tokens);
  w.sums = carver.take<SegmentWork>(num_tokens);
  w.storage_bytes = storage_bytes(num_tokens, key_bits);
  w.storage = carver.take<std::byte>(static_cast<int64_t>(w.storage_bytes));
  return w;
}

int64_t workspace_bytes(int64_t num_tokens, int key_bits) {
  if (num_tokens <= kDecodeTokens) return 0;
  Carver counting;
  carve(counting, num_tokens, key_bits);
  return static_cast<int64_t>(counting.bytes());
}

Workspace checked_workspace(const Launch& launch, int64_t num_tokens, int key_bits) {
  Carver carver(static_cast<std::byte*>(launch.workspace));
  const Workspace w = carve(carver, num_tokens, key_bits);
  const auto needed = static_cast<int64_t>(carver.bytes());
  L3EXT_CHECK(launch.workspace_bytes >= needed, "workspace: expected ", needed, " bytes for ",
              num_tokens, " tokens, got ", launch.workspace_bytes);
  L3EXT_CHECK(
      launch.workspace != nullptr && reinterpret_cast<uintptr_t>(launch.workspace) % 256 == 0,
      "workspace: expected an address aligned to 256 bytes, got ", launch.workspace);
  return w;
}

// --- arguments
// --------------------------------------------------------------------------------------
void check_num_tokens(int64_t num_tokens) {
  constexpr int32_t kMost = std::numeric_limits<int32_t>::max();
  L3EXT_CHECK(num_tokens >= 0 && num_tokens <= kMost, "token_ids: expected 0 to ", kMost,
              " tokens in a step, got ", num_tokens);
}

void check_vocab_size(int64_t vocab_size) {
  constexpr int32_t kMost = std::numeric_limits<int32_t>::max();
  L3EXT_CHECK(vocab_size >= 0 && vocab_size <= kMost, "offsets: expected 0 to ", kMost,
              " tokens, got ", vocab_size);
}

// A misaligned access on the device would be the end of the process's context.
void check_schedule(const int32_t* schedule) {
  L3EXT_CHECK(reinterpret_cast<uintptr_t>(schedule) % alignof(uint4) == 0,
              "schedule: expected an array aligned to ", alignof(uint4), " bytes, got ", schedule);
}

bool is_int64(DType token_dtype) {
  return dispatch_integer(token_dtype, "token_ids",
                          [](auto tag) { return sizeof(typename decltype(tag)::type) == 8; });
}

PlanArgs plan_args(const PlanParams& params, int32_t* schedule) {
  PlanArgs args = {};
  args.token_ids = params.token_ids;
  args.int64_ids = is_int64(params.token_dtype);
  args.offsets = params.offsets;
  args.vocab_size = params.vocab_size;
  args.permutation = params.permutation;
  args.segment_tokens = params.segment_tokens;
  args.segment_queries = params.segment_queries;
  args.segment_rows = params.segment_rows;
  args.num_segments = params.num_segments;
  args.table_rows = params.table_rows;
  args.schedule.num_tokens = params.num_tokens;
  args.schedule.segment_rows = params.segment_rows;
  args.schedule.num_segments = params.num_segments;
  args.schedule.schedule = schedule;
  return args;
}

void use_workspace(ScheduleArgs& args, const Workspace& w) {
  args.keys = w.keys;
  args.order = w.order;
  args.work = w.work;
  args.sums = w.sums;
}

// --- launches
// ---------------------------------------------------------------------------------------
template <typename Args>
void launch_stage(void (*kernel)(Args), int64_t num_tokens, Stream stream, const Args& args) {
  const int64_t blocks = (num_tokens + kStageThreads - 1) / kStageThreads;
  cuda::launch(kernel, static_cast<int>(blocks), kStageThreads, 0, stream, args);
}

// As many warps as there are tokens for: one id waits for no others.
template <typename Args>
void launch_block(void (*kernel)(Args), int64_t num_tokens, Stream stream, const Args& args) {
  const int threads = std::max(static_cast<int>(num_tokens + 31) / 32 * 32, 32);
  cuda::launch(kernel, 1, threads, block_array_bytes(threads), stream, args);
}

// From every segment's key and work to the schedule.
void launch_schedule(const ScheduleArgs& args, Workspace w, Stream stream) {
  sort_pairs(w.storage, w.storage_bytes, w.keys, w.sorted_keys, w.positions, w.order,
             args.num_tokens, kOrderKeyBits, stream);
  inclusive_scan(w.storage, w.storage_bytes, WorkInOrder{w.work, w.order}, w.sums, args.num_tokens,
                 stream);
  launch_stage(schedule_kernel, args.num_tokens, stream, args);
}

}  // namespace

int64_t plan_workspace(const PlanParams& params) {
  check_num_tokens(params.num_tokens);
  check_vocab_size(params.vocab_size);
  return workspace_bytes(params.num_tokens, token_key_bits(params.vocab_size));
}

void plan(const PlanParams& params, int32_t* schedule, const Launch& launch) {
  const int64_t num_tokens = params.num_tokens;
  check_num_tokens(num_tokens);
  check_vocab_size(params.vocab_size);
  check_schedule(schedule);
  const auto stream = static_cast<Stream>(launch.stream);
  PlanArgs args = plan_args(params, schedule);
  if (num_tokens <= kDecodeTokens) {
    return launch_block(plan_in_block_kernel, num_tokens, stream, args);
  }

  const int key_bits = token_key_bits(params.vocab_size);
  Workspace w = checked_workspace(launch, num_tokens, key_bits);
  use_workspace(args.schedule, w);
  args.positions = w.positions;
  args.sorted_keys = w.sorted_keys;
  args.schedule.starts = args.starts = w.starts;
  launch_stage(token_keys_kernel, num_tokens, stream, args);
  sort_pairs(w.storage, w.storage_bytes, w.keys, w.sorted_keys, w.positions, params.permutation,
             num_tokens, key_bits, stream);
  select_indices(w.storage, w.storage_bytes, IsStart{w.sorted_keys}, w.starts, params.num_segments,
                 num_tokens, stream);
  launch_stage(segments_kernel, num_tokens, stream, args);
  launch_schedule(args.schedule, w, stream);
}

int64_t schedule_workspace(int64_t num_tokens) {
  check_num_tokens(num_tokens);
  return workspace_bytes(num_tokens, kOrderKeyBits);
}

void schedule(const PlanView& plan, const int32_t* num_segments, int32_t* schedule,
              const Launch& launch) {
  check_num_tokens(plan.num_tokens);
  check_schedule(schedule);
  const auto stream = static_cast<Stream>(launch.stream);
  ScheduleArgs args = {};
  args.num_tokens = plan.num_tokens;
  args.starts = plan.segment_queries;
  args.segment_rows = plan.segment_rows;
  args.num_segments = num_segments;
  args.schedule = schedule;
  if (plan.num_tokens <= kDecodeTokens) {
    return launch_block(schedule_in_block_kernel, plan.num_tokens, stream, args);
  }

  const Workspace w = checked_workspace(launch, plan.num_tokens, kOrderKeyBits);
  use_workspace(args, w);
  launch_stage(read_segments_kernel, plan.num_tokens, stream, ReadSegmentsArgs{w.positions, args});
  launch_schedule(args, w, stream);
}

}  // namespace l3ext::cuda
