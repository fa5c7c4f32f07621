#include <initializer_list>

#include "attention/cuda/heuristics.hpp"
#include "attention/cuda/kernels.hpp"
#include "attention/cuda/layout.hpp"
#include "attention/cuda/schedule.hpp"
#include "core/cuda/device.cuh"
#include "core/scratch.hpp"

namespace l3ext::cuda {
namespace {

constexpr int64_t kMostColumns = 8192;
constexpr int64_t kMostRows = 4096;         // of one segment: its scores lie in shared memory
constexpr int64_t kMostStride = 1ll << 24;  // 64 rows are reached by 32-bit offsets

template <typename F>
void dispatch(DType dtype, F&& f) {
  dispatch_float(dtype, "x", [&](auto tag) {
    if constexpr (sizeof(typename decltype(tag)::type) == 8) {
      throw Error(ErrorCode::kType,
                  "x: expected float32, bfloat16 or float16 on a CUDA device, got float64");
    } else {
      f(tag);
    }
  });
}

void check_width(const char* what, int64_t width) {
  L3EXT_CHECK(width > 0 && width <= kMostColumns && width % kTileColumns == 0, what,
              ": expected a multiple of 64 up to 8192 on a CUDA device, got ", width);
}

void check_rows(const char* what, const void* data, int64_t stride, int64_t element_bytes) {
  L3EXT_CHECK(reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * element_bytes % 16 == 0, what,
              ": expected rows aligned to 16 bytes on a CUDA device, got address ", data,
              " and a stride of ", stride * element_bytes, " bytes");
  L3EXT_CHECK(stride >= 0 && stride < kMostStride, what, ": expected a row stride below ",
              kMostStride, " elements on a CUDA device, got ", stride);
}

void check_inputs(const SegmentedAttentionInputs& inputs) {
  dispatch(inputs.dtype, [](auto) {});
  check_width("keys", inputs.d_in);
  check_width("values", inputs.d_emb);
  const auto bytes = static_cast<int64_t>(dtype_bytes(inputs.dtype));
  check_rows("x", inputs.x.data, inputs.x.stride, bytes);
  check_rows("keys", inputs.keys.data, inputs.keys.stride, bytes);
  check_rows("values", inputs.values.data, inputs.values.stride, bytes);
  if (inputs.directory != nullptr) {
    L3EXT_CHECK(inputs.value_offset * bytes % 16 == 0,
                "value_offset: expected a multiple of 16 bytes on a CUDA device, got ",
                inputs.value_offset, " elements");
    L3EXT_CHECK(inputs.plan.num_tokens == 0 || inputs.plan.segment_tokens != nullptr,
                "plan: expected segment_tokens beside a directory, got none");
  }
  L3EXT_CHECK(inputs.plan.max_rows >= 0 && inputs.plan.max_rows <= kMostRows,
              "plan: expected tokens of at most ", kMostRows,
              " rows on a CUDA device, got max_rows ", inputs.plan.max_rows);
  // Of no tokens too: it tells the backward that no row has an owner.
  L3EXT_CHECK(inputs.plan.schedule != nullptr,
              "plan: expected a schedule on a CUDA device, got none");
}

// Carves the workspace, or counts its bytes where `launch` is null.
Carver carver_over(const Launch* launch) {
  return Carver(launch == nullptr ? nullptr : static_cast<std::byte*>(launch->workspace));
}

void check_workspace(const Launch& launch, int64_t bytes) {
  L3EXT_CHECK(launch.workspace_bytes >= bytes, "workspace: expected ", bytes, " bytes, got ",
              launch.workspace_bytes);
  L3EXT_CHECK(reinterpret_cast<uintptr_t>(launch.workspace) % 256 == 0,
              "workspace: expected an address aligned to 256 bytes, got ", launch.workspace);
}

float* carve_scores(const SegmentedAttentionParams& params, Carver& carver) {
  if (params.plan.num_tokens > tuning().most_decode_tokens) return nullptr;
  return carver.take<float>(params.plan.num_tokens * score_stride(params.plan.max_rows));
}

// Split segments have more than kStreamQueries queries, so that at most every ninth token begins
// one, and their queries are rounded up by at most 7.
int64_t most_weights(const SegmentedAttentionBackwardParams& params) {
  const int64_t tokens = params.plan.num_tokens, rows = params.plan.max_rows;
  const int64_t split_rows = min(tokens / (kStreamQueries + 1) * rows, params.table_rows);
  return tokens * rows + 7 * split_rows;
}

BackwardWorkspace carve_weights(const SegmentedAttentionBackwardParams& params, Carver& carver) {
  if (params.dkeys.data == nullptr) return {};
  const auto bytes = most_weights(params) * static_cast<int64_t>(dtype_bytes(params.dtype));
  BackwardWorkspace workspace;
  workspace.p_weights = carver.take<std::byte>(bytes);
  workspace.ds_weights = carver.take<std::byte>(bytes);
  return workspace;
}

}  // namespace

int64_t segmented_attention_workspace(const SegmentedAttentionParams& params) {
  Carver carver = carver_over(nullptr);
  carve_scores(params, carver);
  return static_cast<int64_t>(carver.bytes());
}

void segmented_attention(const SegmentedAttentionParams& params, const Launch& launch) {
  check_inputs(params);
  check_rows("y", params.y.data, params.y.stride, static_cast<int64_t>(dtype_bytes(params.dtype)));
  check_workspace(launch, segmented_attention_workspace(params));
  if (params.plan.num_tokens == 0) return;
  Carver carver = carver_over(&launch);
  float* scores = carve_scores(params, carver);
  dispatch(params.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (scores != nullptr) {
      run_decode<T>(params, scores, launch);
    } else {
      run_forward<T>(params, launch);
    }
  });
}

int64_t segmented_attention_backward_workspace(const SegmentedAttentionBackwardParams& params) {
  Carver carver = carver_over(nullptr);
  carve_weights(params, carver);
  return static_cast<int64_t>(carver.bytes());
}

void segmented_attention_backward(const SegmentedAttentionBackwardParams& params,
                                  const Launch& launch) {
  check_inputs(params);
  const auto bytes = static_cast<int64_t>(dtype_bytes(params.dtype));
  check_rows("dy", params.dy.data, params.dy.stride, bytes);
  check_rows("dx", params.dx.data, params.dx.stride, bytes);
  check_rows("dkeys", params.dkeys.data, params.dkeys.stride, bytes);
  check_rows("dvalues", params.dvalues.data, params.dvalues.stride, bytes);
  L3EXT_CHECK(
      params.dkeys.data == nullptr || params.dvalues.data != nullptr || params.d_in == params.d_emb,
      "dvalues: a tied table needs d_in == d_emb, got ", params.d_in, " and ", params.d_emb);
  L3EXT_CHECK(params.directory == nullptr || params.dkeys.data == nullptr,
              "directory: row gradients need a table, got a directory");
  check_workspace(launch, segmented_attention_backward_workspace(params));
  Carver carver = carver_over(&launch);
  const BackwardWorkspace workspace = carve_weights(params, carver);
  dispatch(params.dtype, [&](auto tag) {
    run_backward<typename decltype(tag)::type>(params, workspace, launch);
  });
}

}  // namespace l3ext::cuda
