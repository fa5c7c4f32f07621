// The launchers, one instance per dtype (instantiations/). Their callers have checked the
// parameters; see segmented_attention.cu.
#pragma once

#include "attention/cuda/segmented_attention.hpp"

namespace l3ext::cuda {

template <typename T>
void run_forward(const SegmentedAttentionParams& params, const Launch& launch);

// `scores`: float32 [num_tokens, score_stride(max_rows)] of workspace.
template <typename T>
void run_decode(const SegmentedAttentionParams& params, float* scores, const Launch& launch);

// Weights of the split segments, in the workspace; null where no row gradients are wanted.
struct BackwardWorkspace {
  void* p_weights = nullptr;
  void* ds_weights = nullptr;
};
template <typename T>
void run_backward(const SegmentedAttentionBackwardParams& params,
                  const BackwardWorkspace& workspace, const Launch& launch);

}  // namespace l3ext::cuda
