// Plan and segmented attention on a CUDA device. The same parameters as on the CPU, with pointers
// to device memory; everything is enqueued on the caller's stream: no allocation, no
// synchronisation, capturable in a graph. Errors that only the data shows are not thrown: see
// plan().
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention/plan.hpp"
#include "attention/segmented_attention.hpp"

namespace l3ext::cuda {

// Where the work goes and what it may use.
struct Launch {
  void* stream = nullptr;     // cudaStream_t
  void* workspace = nullptr;  // on the device, aligned to 256 bytes; left dirty
  int64_t workspace_bytes = 0;
};

// As l3ext::plan, and the schedule (schedule.hpp; [schedule_entries(num_tokens)], aligned to 16
// bytes). What only the data shows is not thrown: offsets are trusted, whatever check_offsets says;
// the positions of ids outside [0, vocab_size) come last, in one segment of token -1 and rows
// -1..-1, of which segmented_attention makes NaN. Throws kValue for sizes out of range, a
// misaligned schedule or a workspace smaller than plan_workspace(), kType for ids of another type.
void plan(const PlanParams& params, int32_t* schedule, const Launch& launch);
int64_t plan_workspace(const PlanParams& params);

// The schedule alone, of a plan that was made on the host and copied to the device. `plan` needs
// segment_queries, segment_rows and num_tokens, and is trusted; num_segments [1] lies on the
// device. Throws as plan() does.
void schedule(const PlanView& plan, const int32_t* num_segments, int32_t* schedule,
              const Launch& launch);
int64_t schedule_workspace(int64_t num_tokens);

// Restrictions beyond the CPU's, thrown as kValue: float32, bfloat16 or float16; d_in and d_emb
// multiples of 64 up to 8192; data and row strides aligned to 16 bytes; plan.max_rows at most 4096,
// and no more than shared memory holds the scores of (in the backward 3616 of 227 KiB), which is
// kRuntime. The rows of the plan's segments are trusted; more of them than max_rows make NaN.
void segmented_attention(const SegmentedAttentionParams& params, const Launch& launch);
int64_t segmented_attention_workspace(const SegmentedAttentionParams& params);

void segmented_attention_backward(const SegmentedAttentionBackwardParams& params,
                                  const Launch& launch);
int64_t segmented_attention_backward_workspace(const SegmentedAttentionBackwardParams& params);

}  // namespace l3ext::cuda
