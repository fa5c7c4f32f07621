// Segmented attention: every query of a segment attends to the rows of that segment's token.
//   s = softmax(scale * K_t x)     y = V_t^T s
// with t the token of the query, K_t and V_t the rows that it owns.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>

#include "core/dtype.hpp"

namespace l3ext {

// A matrix whose rows may be strided; elements of a row are contiguous.
struct Rows {
  const void* data = nullptr;
  int64_t stride = 0;  // elements from one row to the next
};
struct MutableRows {
  void* data = nullptr;
  int64_t stride = 0;
};

// A plan as the kernels read it; see attention/plan.hpp.
struct PlanView {
  const int32_t* permutation = nullptr;      // [num_tokens]
  const int32_t* segment_queries = nullptr;  // [num_tokens + 1]
  const int64_t* segment_rows = nullptr;     // [>= num_segments, 2]
  const int32_t* segment_tokens = nullptr;   // [>= num_segments]; read with a directory only
  int64_t num_tokens = 0;
  int64_t num_segments = 0;     // on the CPU; on a device it lies in the schedule
  int32_t* schedule = nullptr;  // on a device: attention/cuda/schedule.hpp
  int64_t max_rows = 0;         // on a device: no segment has more rows
};

// A float32 for each row, at any distance from the next.
struct RowScales {
  const std::byte* data = nullptr;
  int64_t stride = 0;  // bytes from one scale to the next

  float operator[](int64_t row) const {
    float scale;
    std::memcpy(&scale, data + row * stride, sizeof(scale));  // a directory's may lie unaligned
    return scale;
  }
};

// Keys and values stored in 8 bits: row r stands for its elements times its scale.
struct Quantization {
  DType dtype = DType::kInt8;  // or kFloat8E4M3
  RowScales keys;              // [table_rows]
  RowScales values;            // [table_rows]
  // Of a directory, whose rows have their scales beside them: bytes from a row's start to the scale
  // of its key. That of its value follows, unless value_offset is 0 (tied).
  int64_t scale_offset = 0;
};

// What forward and backward both read.
struct SegmentedAttentionInputs {
  DType dtype = DType::kFloat32;  // of every matrix, but for quantised keys and values
  Rows x;                         // [num_tokens, d_in]
  Rows keys;                      // [table_rows, d_in]
  Rows values;                    // [table_rows, d_emb]
  // [vocab_size], or null: the address of each token's first row, wherever it lies; forward only.
  // Then keys.data
  // and values.data are null, the strides hold, and values start value_offset elements behind keys.
  const int64_t* directory = nullptr;
  int64_t vocab_size = 0;  // of the directory
  int64_t value_offset = 0;
  PlanView plan;
  int64_t table_rows = 0;
  int64_t d_in = 0;
  int64_t d_emb = 0;
  std::optional<Quantization> quantization;  // on the CPU, forward only, dtype not kFloat64
  double scale = 1.0;
  int num_threads = 1;  // on the CPU; any number gives the same bits
  // On CUDA: left to work beside. The decode kernel starts when all its blocks find room at once,
  // so one that fills the device would wait for what runs there; any number gives the same bits.
  int spare_multiprocessors = 0;
};

struct SegmentedAttentionParams : SegmentedAttentionInputs {
  MutableRows y;  // [num_tokens, d_emb]
};

// The plan's segment_rows must ascend and be disjoint, as plan() makes them, where row gradients
// are wanted.
struct SegmentedAttentionBackwardParams : SegmentedAttentionInputs {
  Rows dy;              // [num_tokens, d_emb]
  MutableRows dx;       // [num_tokens, d_in]; null data: not wanted
  MutableRows dkeys;    // [table_rows, d_in]; null data: no row gradients. Every row is written
  MutableRows dvalues;  // [table_rows, d_emb]; null data with dkeys set: tied, the sum into dkeys
  // [>= num_segments], or null: where each segment's gradient rows begin in dkeys and dvalues, if
  // not at its segment_rows. Then only the segments' rows are written, packed by the caller's wish,
  // and dkeys and dvalues have gradient_rows rows.
  const int64_t* segment_gradients = nullptr;
  int64_t gradient_rows = 0;
};

// Both throw kValue for a plan that does not fit (positions or rows out of range) before they
// write anything. Sums are float32 (float64 for float64 inputs), in an order that depends on the
// segment alone: the same bits on every run, for any thread count and any other tokens beside.
// (Of bfloat16 by AVX512-BF16 or AMX, how many queries share a segment shows in the bits.)
void segmented_attention(const SegmentedAttentionParams& params);
void segmented_attention_backward(const SegmentedAttentionBackwardParams& params);

}  // namespace l3ext
