// Decode: few tokens, so every chunk's rows and columns are shared over the whole device. One
// cooperative launch: blocks score slices of rows, all wait, blocks sum tiles of columns. Within a
// block the warps share the columns of a slice, then the rows of a tile, and add their parts in
// order; both splits depend on the widths and rows alone, so that a token's bits do not depend on
// the rest of the batch. Limited by latency up to some ten tokens (a launch, two dependent reads
// and the barrier), by the bytes of rows beyond.
#pragma once

#include "attention/cuda/heuristics.hpp"
#include "attention/cuda/kernels.hpp"
#include "attention/cuda/segments.cuh"

namespace l3ext::cuda {

struct DecodeArgs {
  Attention attention;
  float* scores;       // [num_tokens, score_stride(max_rows)], in sorted order
  int slice_blocks;    // 1 or 2: blocks of 16 rows that one block scores at a time
  int slices;          // per chunk
  int tiles_per_unit;  // tiles of 64 columns that one block sums after one softmax
};

template <typename T, int RowBlocks>
__device__ inline void score_slice(const DecodeArgs& args, const Chunk& chunk,
                                   const SegmentRows<T>& rows, int first, float* parts) {
  const Attention& a = args.attention;
  constexpr int kRows = RowBlocks * kBlockRows;
  const int32_t* permutation = a.permutation + chunk.query_begin;
  GatheredQueries<T, 1> queries(static_cast<const T*>(a.x), a.x_stride, permutation, chunk.queries);
  const int steps = a.d_in / kColumnStep<T>;
  RowProducts<T, RowBlocks, 1, RowBlocks == 1 ? 4 : 1> products;
  products.run(StridedRows<T>{rows.keys + static_cast<int64_t>(first) * a.table.key_stride,
                              a.table.key_stride},
               rows.count - first, queries, steps * warp() / kWarps * kColumnStep<T>,
               steps * (warp() + 1) / kWarps * kColumnStep<T>);
  products.finish([&](int row, int query, float value) {
    store_shared(parts + (warp() * kTileQueries + query) * part_stride(kRows) + row, value);
  });
  __syncthreads();
  const int stride = score_stride(a.table.max_rows);
  for (int i = threadIdx.x; i < chunk.queries * kRows; i += kThreads) {
    const int row = first + i % kRows;
    if (row >= rows.count) continue;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const int query = w * kTileQueries + i / kRows;
      sum += load_shared(parts + query * part_stride(kRows) + i % kRows);
    }
    args.scores[static_cast<int64_t>(chunk.query_begin + i / kRows) * stride + row] = sum;
  }
  __syncthreads();  // parts are free again
}

// Columns [64 * tile, +64) of the chunk's outputs, from the exponentials in shared memory.
template <typename T>
__device__ inline void sum_tile(const Attention& a, const Chunk& chunk, const SegmentRows<T>& rows,
                                int tile, const Scores& exponentials, const float* inverse,
                                float* parts) {
  const int share = padded_rows((rows.count + kWarps - 1) / kWarps);
  ColumnSums<T, 1, 1> sums;
  sums.clear();
  sums.run(StridedRows<T>{rows.values + tile * kTileColumns, a.table.value_stride}, share * warp(),
           min(share * (warp() + 1), rows.count), SharedWeights{exponentials});
  sums.finish([&](int q, int column, const float (&v)[kVector<T>]) {
    float4* part = reinterpret_cast<float4*>(parts) + warp() * kWarpFours;
#pragma unroll
    for (int i = 0; i < kVector<T>; i += 4) {
      store_shared(part + place_of_four(q, column + i), float4{v[i], v[i + 1], v[i + 2], v[i + 3]});
    }
  });
  __syncthreads();
  constexpr int kVectors = kTileColumns / kVector<T>;
  for (int i = threadIdx.x; i < chunk.queries * kVectors; i += kThreads) {
    const int q = i / kVectors, column = i % kVectors * kVector<T>;
    float v[kVector<T>] = {};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float4* part = reinterpret_cast<const float4*>(parts) + w * kWarpFours;
#pragma unroll
      for (int j = 0; j < kVector<T>; j += 4) {
        const float4 four = load_shared(part + place_of_four(q, column + j));
        v[j] += four.x, v[j + 1] += four.y, v[j + 2] += four.z, v[j + 3] += four.w;
      }
    }
#pragma unroll
    for (float& x : v) x *= inverse[q];
    store_vector<T>(row_of<T>(a.y, a.y_stride, __ldg(a.permutation + chunk.query_begin + q)) +
                        tile * kTileColumns + column,
                    v);
  }
  __syncthreads();  // parts are free again
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<T, false>)
    decode_kernel(DecodeArgs args) {
  const Attention& a = args.attention;
  const Schedule schedule = carve_schedule(a.schedule, a.num_tokens);
  const int chunks = schedule.header->stream_chunks;
  const int stride = score_stride(a.table.max_rows);
  auto* parts = reinterpret_cast<float*>(dynamic_shared());
  float* inverse = parts + kDecodeParts;
  const Scores weights{inverse + kTileQueries, stride};  // of 8 queries

  copy_chunks<T>(a, schedule);
  for (int unit = blockIdx.x; unit < chunks * args.slices; unit += gridDim.x) {
    const Chunk chunk = schedule.chunks[unit / args.slices];
    const auto rows = rows_of<T>(a.table, chunk.segment);
    const int first = unit % args.slices * args.slice_blocks * kBlockRows;
    if (rows.count <= first) continue;
    if (args.slice_blocks == 1) {
      score_slice<T, 1>(args, chunk, rows, first, parts);
    } else {
      score_slice<T, 2>(args, chunk, rows, first, parts);
    }
  }

  const int tiles = a.d_emb / kTileColumns;
  const int tile_groups = (tiles + args.tiles_per_unit - 1) / args.tiles_per_unit;
  const int units = chunks * tile_groups;
  if (static_cast<int>(blockIdx.x) < units) {  // the first values travel while the barrier waits
    const auto rows = rows_of<T>(a.table, schedule.chunks[blockIdx.x / tile_groups].segment);
    const int column = blockIdx.x % tile_groups * args.tiles_per_unit * kTileColumns;
    for (int r = threadIdx.x; r < rows.count; r += kThreads) {
      prefetch_l2(rows.values + static_cast<int64_t>(r) * a.table.value_stride + column);
    }
  }
  grid_barrier();

  for (int unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const Chunk chunk = schedule.chunks[unit / tile_groups];
    const auto rows = rows_of<T>(a.table, chunk.segment);
    if (rows.count <= 0) {
      if (unit % tile_groups == 0) {
        fill_outputs<T>(a, chunk, rows.count == 0 ? 0.0f : not_a_number());
      }
      continue;
    }
    for (int q = warp(); q < kTileQueries; q += kWarps) {
      const float* scores = args.scores + static_cast<int64_t>(chunk.query_begin + q) * stride;
      for (int r = lane(); r < rows.count; r += 32) {
        *weights.at(q, r) = q < chunk.queries ? scores[r] : 0.0f;
      }
      const float sum = exponentials(weights.of(q), rows.count, 1, a.scale);
      if (lane() == 0) inverse[q] = 1.0f / sum;
    }
    __syncthreads();
    const int first = unit % tile_groups * args.tiles_per_unit;
    for (int tile = first; tile < min(first + args.tiles_per_unit, tiles); ++tile) {
      sum_tile<T>(a, chunk, rows, tile, weights, inverse, parts);
    }
  }
}

// --- launch --------------------------------------------------------------------------------------
template <typename T>
void run_decode(const SegmentedAttentionParams& params, float* scores, const Launch& on) {
  DecodeArgs args = {};
  args.attention = attention_of(params);
  args.scores = scores;
  const int64_t shared = decode_shared_bytes(args.attention.table.max_rows);
  int resident = resident_blocks(decode_kernel<T>, kThreads, shared);
  if (params.spare_multiprocessors > 0) {
    resident =
        blocks_beside(resident, device_limits().multiprocessors, params.spare_multiprocessors);
  }
  const DecodeShape shape =
      decode_shape(params.plan.num_tokens, args.attention.table.max_rows, params.d_emb, resident);
  args.slice_blocks = shape.slice_blocks;
  args.slices = shape.slices;
  args.tiles_per_unit = shape.tiles_per_unit;
  launch(decode_kernel<T>, static_cast<int>(min(shape.units, static_cast<int64_t>(resident))),
         kThreads, shared, static_cast<Stream>(on.stream), args, /*cooperative=*/true);
}

}  // namespace l3ext::cuda
