// The CUDA entry points of a build without CUDA: callers need no second way through the code.
#ifndef L3EXT_WITH_CUDA

#include "attention/cuda/segmented_attention.hpp"
#include "core/error.hpp"

namespace l3ext::cuda {
namespace {

[[noreturn]] void unavailable() {
  throw Error(ErrorCode::kRuntime,
              "this build of l3ext has no CUDA kernels: arrays must lie in host memory, or the "
              "library be built with nvcc and L3EXT_CUDA=ON");
}

}  // namespace

void plan(const PlanParams&, int32_t*, const Launch&) { unavailable(); }
int64_t plan_workspace(const PlanParams&) { unavailable(); }
void schedule(const PlanView&, const int32_t*, int32_t*, const Launch&) { unavailable(); }
int64_t schedule_workspace(int64_t) { unavailable(); }
void segmented_attention(const SegmentedAttentionParams&, const Launch&) { unavailable(); }
int64_t segmented_attention_workspace(const SegmentedAttentionParams&) { unavailable(); }
void segmented_attention_backward(const SegmentedAttentionBackwardParams&, const Launch&) {
  unavailable();
}
int64_t segmented_attention_backward_workspace(const SegmentedAttentionBackwardParams&) {
  unavailable();
}

}  // namespace l3ext::cuda

#endif
