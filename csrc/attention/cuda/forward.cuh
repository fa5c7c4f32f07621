// Forward for training and prefill. Parallel over chunks: one block attends the queries of a chunk
// to all rows of their segment. First its warps share the rows (scores), then the columns (sums),
// so keys and values are read once and no partial sums cross warps; the scores lie in shared memory
// between. Limited by the bytes of rows for the stream chunks, by the matrix units and L1 for the
// dense ones. The permutation is applied where queries are loaded and outputs stored.
#pragma once

#include "attention/cuda/heuristics.hpp"
#include "attention/cuda/kernels.hpp"
#include "attention/cuda/segments.cuh"
#include "attention/cuda/slabs.cuh"

namespace l3ext::cuda {

struct ForwardArgs {
  Attention attention;
  bool dense;          // this launch serves the dense chunks
  bool stream;         // this launch serves the stream and copy chunks
  int fewest_queries;  // of the chunks that it serves
};

// `queries` of at most 8 * Tiles queries, by the block.
template <typename T, int Tiles, bool Staged>
__device__ inline void attend(const Attention& a, const SegmentRows<T>& rows, int query_begin,
                              int queries) {
  const int stride = score_stride(a.table.max_rows);
  const Scores scores{reinterpret_cast<float*>(dynamic_shared()), stride};
  float* inverse = scores.base + Tiles * kTileQueries * stride;
  auto* ring = reinterpret_cast<std::byte*>(inverse + Tiles * kTileQueries);
  const int32_t* permutation = a.permutation + query_begin;

  prefetch_rows(rows.values, a.table.value_stride, rows.count, a.d_emb);
  const QuerySource<T> source{static_cast<const T*>(a.x), a.x_stride, permutation, queries};
  score_rows<T, Tiles, Staged>(rows.keys, a.table.key_stride, rows.count, source, a.d_in, scores,
                               ring);
  __syncthreads();
  // Queries that pad the last tile too: their scores are those of zeros, and finite.
  const int slices = column_slices(rows.count);
  const int padded = (queries + kTileQueries - 1) / kTileQueries * kTileQueries;
  for (int q = warp(); q < padded; q += kWarps) {
    const float sum = exponentials(scores.of(q), rows.count, slices, a.scale);
    if (lane() == 0) inverse[q] = 1.0f / sum;
  }
  __syncthreads();
  for (int tile = warp(); tile < a.d_emb / kTileColumns; tile += kWarps) {
    ColumnSums<T, Tiles, 1> sums;
    sums.clear();
    sums.tiles = padded / kTileQueries;
    sums.run(StridedRows<T>{rows.values + tile * kTileColumns, a.table.value_stride}, 0, rows.count,
             SharedWeights{scores});
    sums.finish([&](int q, int column, float (&v)[kVector<T>]) {
      if (q >= queries) return;
#pragma unroll
      for (float& x : v) x *= inverse[q];
      store_vector<T>(
          row_of<T>(a.y, a.y_stride, __ldg(permutation + q)) + tile * kTileColumns + column, v);
    });
  }
}

template <typename T, int Tiles, bool Staged>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<T, Staged>)
    forward_kernel(ForwardArgs args) {
  const Attention& a = args.attention;
  const Schedule schedule = carve_schedule(a.schedule, a.num_tokens);
  const ScheduleHeader& header = *schedule.header;
  const int first = args.dense ? 0 : header.dense_chunks;
  const int last = header.dense_chunks + (args.stream ? header.stream_chunks : 0);
  for (int turn = 0, i = 0; (i = chunk_of_turn<Staged>(turn, last - first)) >= 0; ++turn) {
    const Chunk chunk = schedule.chunks[first + i];
    if (chunk.queries < args.fewest_queries) continue;
    const auto rows = rows_of<T>(a.table, chunk.segment);
    if (rows.count <= 0) {
      fill_outputs<T>(a, chunk, rows.count == 0 ? 0.0f : not_a_number());
      continue;
    }
    for (int q = 0; q < chunk.queries; q += Tiles * kTileQueries) {
      attend<T, Tiles, Staged>(a, rows, chunk.query_begin + q,
                               min(chunk.queries - q, Tiles * kTileQueries));
      __syncthreads();  // the next chunk's scores take this one's place
    }
  }
  if (args.stream) copy_chunks<T>(a, schedule);
}

// --- tied tables ---------------------------------------------------------------------------------
// Stream chunks, and small dense ones in groups of 8 queries. These are neighbours in the list, and
// so attended side by side: the first block to read a row brings it to L2 for the others.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<T, false>)
    slab_kernel(Attention a) {
  constexpr int kGroups = kSlabQueries<T> / kTileQueries;
  const Schedule schedule = carve_schedule(a.schedule, a.num_tokens);
  const ScheduleHeader& header = *schedule.header;
  const int dense = header.dense_chunks * kGroups;
  SlabAttention<T> attention(a);
  for (int turn = 0, i = 0; (i = chunk_of_turn<false>(turn, dense + header.stream_chunks)) >= 0;
       ++turn) {
    Chunk chunk = schedule.chunks[i < dense ? i / kGroups : header.dense_chunks + i - dense];
    const int done = i < dense ? i % kGroups * kTileQueries : 0;
    if (done >= chunk.queries || chunk.queries > kSlabQueries<T>) continue;
    chunk.query_begin += done;
    chunk.queries = min(chunk.queries - done, kTileQueries);
    const auto rows = rows_of<T>(a.table, chunk.segment);
    if (rows.count <= 0) {
      fill_outputs<T>(a, chunk, rows.count == 0 ? 0.0f : not_a_number());
      continue;
    }
    attention.run(rows.keys, rows.count, chunk.query_begin, chunk.queries);
    attention.store_outputs();
  }
  copy_chunks<T>(a, schedule);
}

// --- launch --------------------------------------------------------------------------------------
template <typename T, int Tiles, bool Staged>
void launch_forward(const ForwardArgs& args, int64_t most_chunks, Stream stream) {
  const auto kernel = forward_kernel<T, Tiles, Staged>;
  const int64_t shared = forward_shared_bytes(Tiles, args.attention.table.max_rows);
  const int resident = resident_blocks(kernel, kThreads, shared);
  launch(kernel, static_cast<int>(min(most_chunks, static_cast<int64_t>(resident))), kThreads,
         shared, stream, args);
}

template <typename T>
void launch_slabs(const Attention& a, int64_t most_units, Stream stream) {
  const int64_t shared = slab_shared_bytes(a.d_in * static_cast<int>(sizeof(T)));
  const int resident = resident_blocks(slab_kernel<T>, kThreads, shared);
  launch(slab_kernel<T>, static_cast<int>(min(most_units, static_cast<int64_t>(resident))),
         kThreads, shared, stream, a);
}

template <typename T>
void run_forward(const SegmentedAttentionParams& params, const Launch& on) {
  ForwardArgs args = {};
  args.attention = attention_of(params);
  const auto stream = static_cast<Stream>(on.stream);
  const DeviceLimits limits = device_limits();
  const int64_t tokens = params.plan.num_tokens, most_dense = tokens / kStreamQueries;
  const int tiles =
      tokens <= kDecodeTokens
          ? 1
          : forward_tiles(sizeof(T), args.attention.table.max_rows, limits.shared_bytes);
  const bool slabs = is_tied(params) && slabs_fit(sizeof(T), params.d_in, limits.shared_bytes);
  if (slabs) args.fewest_queries = kSlabQueries<T> + 1;
  if constexpr (sizeof(T) == 2) {
    // Heavy chunks first: the stream chunks then fill the device while the last of them finish.
    args.dense = true;
    if (tiles == 8) {
      launch_forward<T, 8, true>(args, most_dense, stream);
    } else if (tiles == 4) {
      launch_forward<T, 4, true>(args, most_dense, stream);
    } else if (slabs) {
      launch_forward<T, 1, false>(args, most_dense, stream);
    }
  }
  if (slabs) {
    launch_slabs<T>(args.attention, tokens, stream);
  } else {
    args.dense = tiles == 1;
    args.stream = true;
    launch_forward<T, 1, false>(args, tokens, stream);
  }
}

}  // namespace l3ext::cuda
