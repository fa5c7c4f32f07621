// Backward, without atomics and with the same bits on every run. Two kernels:
//   query_gradients  parallel over chunks like the forward: takes the softmax again, then ds and
//   dx.
//                    A segment that is one stream chunk, as nearly all are, has its row gradients
//                    summed at once from shared memory. Of the split segments p and ds go to the
//                    workspace, [row][query].
//   row_gradients    parallel over (rows, columns) of the split segments: sums all their queries,
//   in
//                    order.
// Limited by the bytes of rows read (keys twice) and written; in split segments by the matrix
// units.
#pragma once

#include "attention/cuda/heuristics.hpp"
#include "attention/cuda/kernels.hpp"
#include "attention/cuda/segments.cuh"

namespace l3ext::cuda {

struct BackwardArgs {
  Table table;
  const void* x;   // [num_tokens, d_in]
  const void* dy;  // [num_tokens, d_emb]
  void* dx;        // [num_tokens, d_in]; null: not wanted
  int x_stride, dy_stride, dx_stride;
  void* dkeys;    // [rows, d_in]; null: no row gradients
  void* dvalues;  // [rows, d_emb]; null with dkeys: tied, the sum goes to dkeys
  int dkey_stride, dvalue_stride;
  const int64_t* segment_gradients;  // [num_segments]: first gradient row; null: segment_rows
  const int32_t* permutation;        // [num_tokens]
  const int32_t* segment_queries;    // [num_tokens + 1]
  int32_t* schedule;                 // [schedule_entries(num_tokens)]
  int64_t num_tokens;
  int64_t table_rows;
  int d_in;
  int d_emb;
  float scale;
  void* p_weights;    // of the split segments, [row][roundup8(queries)] at segment_weights
  void* ds_weights;   // likewise
  int whole_queries;  // segments of more have their row gradients summed by row_gradients
  bool dense;         // this launch serves the dense chunks
  bool stream;        // this launch serves the stream and copy chunks
};

__device__ inline int64_t first_gradient_row(const BackwardArgs& a, int segment) {
  return a.segment_gradients != nullptr ? a.segment_gradients[segment]
                                        : a.table.segment_rows[2 * static_cast<int64_t>(segment)];
}

// --- weights of row gradients: the queries are summed over ---------------------------------------
// In shared memory, read across: for row first + row of the table four queries, from a multiple of
// four on.
struct TransposedWeights {
  static constexpr int kTilesTogether = 1;
  Scores scores;
  int first;
  int rows;
  int queries;  // a multiple of 4
  __device__ float4 load(int row, int query) const {
    if (row >= rows || query >= queries) return {0, 0, 0, 0};
    const float* w = scores.at(query, first + row);
    const float* other = scores.at(query + 2, first + row);  // as the next, in another place
    return {load_shared(w), load_shared(w + scores.stride), load_shared(other),
            load_shared(other + scores.stride)};
  }
};

// [row][query] in the workspace: L2 is some 250 clocks away, as long as the products of eight tiles
// take (est).
template <typename T>
struct StoredWeights {
  static constexpr int kTilesTogether = 8;
  const T* base;
  int64_t stride;  // queries rounded up to 8
  int rows;
  __device__ auto load(int row, int query) const {
    using Four = std::conditional_t<sizeof(T) == 2, uint2, float4>;
    // A row past the end adds to what nobody reads; no branch, for loads to overtake each other.
    const int64_t last = stride - 4;
    const auto w = __ldg(reinterpret_cast<const Four*>(base + min(row, rows - 1) * stride +
                                                       min(last, int64_t{query})));
    return query <= last ? w : Four{};
  }
};

// Columns [64 * tile, +64) of row gradients: tiles of d_in come first, then those of d_emb.
template <typename T>
struct GradientTile {
  bool of_keys;             // weights are ds and queries x; otherwise p and dy
  bool tied;                // of_keys, and p and dy are to be added
  GatheredRows<T> queries;  // x or dy
  GatheredRows<T> dy;       // read where tied
  T* target;                // of the segment's first row
  int stride;

  __device__ GradientTile(const BackwardArgs& a, int segment, int query_begin, int tile) {
    const int key_tiles = a.d_in / kTileColumns;
    of_keys = tile < key_tiles;
    tied = of_keys && a.dvalues == nullptr;
    const int column = (of_keys ? tile : tile - key_tiles) * kTileColumns;
    dy = {static_cast<const T*>(a.dy) + column, a.dy_stride, a.permutation + query_begin};
    queries = dy;
    if (of_keys) {
      queries.base = static_cast<const T*>(a.x) + column;
      queries.stride = a.x_stride;
    }
    stride = of_keys ? a.dkey_stride : a.dvalue_stride;
    target = static_cast<T*>(of_keys ? a.dkeys : a.dvalues) +
             first_gradient_row(a, segment) * stride + column;
  }

  template <typename Sums>
  __device__ void store(Sums& sums, int first, int rows) const {
    sums.finish([&](int row, int column, const float (&v)[kVector<T>]) {
      if (row >= rows) return;
      store_vector<T>(target + static_cast<int64_t>(first + row) * stride + column, v);
    });
  }
};

__device__ inline int gradient_tiles(const BackwardArgs& a) {
  return (a.d_in + (a.dvalues == nullptr ? 0 : a.d_emb)) / kTileColumns;
}

// --- copy chunks: one row or none ----------------------------------------------------------------
// The softmax of one score is 1 and does not depend on it: dx is 0, dvalues the sum of dy.
template <typename T>
__device__ inline void copy_chunk_gradients(const BackwardArgs& a, const Schedule& schedule,
                                            const Chunk& chunk) {
  const auto rows = rows_of<T>(a.table, chunk.segment);
  if (a.dx != nullptr) {
    for (int i = 0; i < chunk.queries; ++i) {
      fill_row(row_of<T>(a.dx, a.dx_stride, a.permutation[chunk.query_begin + i]), a.d_in,
               rows.count >= 0 ? 0.0f : not_a_number());
    }
  }
  if (a.dkeys == nullptr || rows.count != 1) return;
  const int begin = a.segment_queries[chunk.segment];
  if (a.segment_queries[chunk.segment + 1] - begin > a.whole_queries) {
    if (lane() < (chunk.queries + 7) / 8 * 8) {
      const int64_t i =
          schedule.segment_weights[chunk.segment] + chunk.query_begin - begin + lane();
      static_cast<T*>(a.p_weights)[i] = element<T>(lane() < chunk.queries ? 1.0f : 0.0f);
      static_cast<T*>(a.ds_weights)[i] = element<T>(0.0f);
    }
    return;
  }
  const int64_t row = first_gradient_row(a, chunk.segment);
  T* dkey = static_cast<T*>(a.dkeys) + row * a.dkey_stride;
  const bool tied = a.dvalues == nullptr;
  if (!tied) fill_row(dkey, a.d_in, 0.0f);
  T* dvalue = tied ? dkey : static_cast<T*>(a.dvalues) + row * a.dvalue_stride;
  for (int c = lane() * kVector<T>; c < a.d_emb; c += 32 * kVector<T>) {
    float sum[kVector<T>] = {};
    for (int i = 0; i < chunk.queries; ++i) {
      const T* dy = static_cast<const T*>(a.dy) +
                    static_cast<int64_t>(a.permutation[chunk.query_begin + i]) * a.dy_stride + c;
      add_vector<T>(sum, __ldg(reinterpret_cast<const uint4*>(dy)));
    }
    store_vector<T>(dvalue + c, sum);
  }
}

// --- query gradients -----------------------------------------------------------------------------
// p and ds of one query, by one warp, in place of its scores and of dp; both in `slices` parts.
__device__ inline void softmax_backward(const Scores::OfQuery& p, const Scores::OfQuery& dp,
                                        int rows, int p_slices, int dp_slices, float scale) {
  const int padded = padded_rows(rows);
  const float inverse = 1.0f / exponentials(p, rows, p_slices, scale);
  float dot = 0;
  for (int r = lane(); r < rows; r += 32) {
    p[r] *= inverse;
    dp[r] = whole_score(dp, r, dp_slices, padded);
    dot += p[r] * dp[r];
  }
  dot = warp_sum(dot);
  for (int r = lane(); r < padded; r += 32) dp[r] = r < rows ? scale * p[r] * (dp[r] - dot) : 0.0f;
}

// [query][row] to [row][query] in the workspace; the whole block.
template <typename T>
__device__ inline void store_weights(const Scores& weights, int rows, int queries, T* target,
                                     int64_t target_stride) {
  const int tiles = (queries + kTileQueries - 1) / kTileQueries;
  for (int i = threadIdx.x; i < rows * tiles; i += kThreads) {
    const int row = i / tiles, tile = i % tiles;
    T* to = target + row * target_stride + tile * kTileQueries;
#pragma unroll
    for (int j = 0; j < kTileQueries; j += kVector<T>) {
      float v[kVector<T>];
#pragma unroll
      for (int k = 0; k < kVector<T>; ++k) {
        v[k] = load_shared(weights.at(tile * kTileQueries + j + k, row));
      }
      store_vector<T>(to + j, v);
    }
  }
}

template <typename T, int Tiles, bool Staged, bool Tied>
__device__ inline void query_gradients(const BackwardArgs& a, const Schedule& schedule,
                                       const SegmentRows<T>& rows, int segment, int query_begin,
                                       int queries) {
  const int stride = score_stride(a.table.max_rows);
  const Scores p{reinterpret_cast<float*>(dynamic_shared()), stride};
  const Scores ds{p.base + Tiles * kTileQueries * stride, stride};
  auto* ring = reinterpret_cast<std::byte*>(ds.base + Tiles * kTileQueries * stride);
  const int32_t* permutation = a.permutation + query_begin;

  prefetch_rows(rows.values, a.table.value_stride, rows.count, a.d_emb);
  const QuerySource<T> x{static_cast<const T*>(a.x), a.x_stride, permutation, queries};
  score_rows<T, Tiles, Staged>(rows.keys, a.table.key_stride, rows.count, x, a.d_in, p, ring);
  if constexpr (Staged) __syncthreads();  // the ring is free again
  const QuerySource<T> dy{static_cast<const T*>(a.dy), a.dy_stride, permutation, queries};
  score_rows<T, Tiles, Staged>(rows.values, a.table.value_stride, rows.count, dy, a.d_emb, ds,
                               ring);
  __syncthreads();
  const int padded = (queries + kTileQueries - 1) / kTileQueries * kTileQueries;
  const int slices = column_slices(rows.count);
  for (int q = warp(); q < padded; q += kWarps) {
    if (q < queries) {
      softmax_backward(p.of(q), ds.of(q), rows.count, slices, slices, a.scale);
    } else {
      for (int r = lane(); r < rows.count; r += 32) *p.at(q, r) = *ds.at(q, r) = 0.0f;
    }
  }
  __syncthreads();

  if (a.dx != nullptr) {
    for (int tile = warp(); tile < a.d_in / kTileColumns; tile += kWarps) {
      ColumnSums<T, Tiles, 1> sums;
      sums.clear();
      sums.tiles = padded / kTileQueries;
      sums.run(StridedRows<T>{rows.keys + tile * kTileColumns, a.table.key_stride}, 0, rows.count,
               SharedWeights{ds});
      sums.finish([&](int q, int column, const float (&v)[kVector<T>]) {
        if (q >= queries) return;
        store_vector<T>(
            row_of<T>(a.dx, a.dx_stride, __ldg(permutation + q)) + tile * kTileColumns + column, v);
      });
    }
  }
  if (a.dkeys == nullptr) return;
  const int begin = a.segment_queries[segment];
  const int all_queries = a.segment_queries[segment + 1] - begin;
  if (all_queries > a.whole_queries) {
    const int64_t target_stride = (all_queries + 7) / 8 * 8;
    const int64_t target = schedule.segment_weights[segment] + query_begin - begin;
    store_weights<T>(p, rows.count, queries, static_cast<T*>(a.p_weights) + target, target_stride);
    store_weights<T>(ds, rows.count, queries, static_cast<T*>(a.ds_weights) + target,
                     target_stride);
    return;
  }
  // The block holds all queries: they stay in registers while the rows pass.
  constexpr int kRowTiles = Staged ? 4 : 1;
  constexpr int kSteps = (Tiles * kTileQueries + kRowStep<T> - 1) / kRowStep<T>;
  for (int i = warp(); i < gradient_tiles(a); i += kWarps) {
    const GradientTile<T> tile(a, segment, query_begin, i);
    HeldRows<T, kSteps> held;
    held.load(tile.queries, queries);
    const Scores weights{tile.of_keys ? ds.base : p.base, stride};
    for (int r = 0; r < rows.count; r += kRowTiles * kTileQueries) {
      const int count = min(rows.count - r, kRowTiles * kTileQueries);
      ColumnSums<T, kRowTiles, 1> sums;
      sums.clear();
      sums.tiles = (count + kTileQueries - 1) / kTileQueries;
      sums.add(held, TransposedWeights{weights, r, count, padded});
      if constexpr (Tied) {
        if (tile.of_keys) {
          sums.run(tile.dy, 0, queries, TransposedWeights{p, r, count, padded});
        }
      }
      tile.store(sums, r, count);
    }
  }
}

// Tied has an instance of its own: in the others its code would make registers spill.
template <typename T, int Tiles, bool Staged, bool Tied>
__global__ void __launch_bounds__(
    kThreads, kBlocksPerMultiprocessor<T, Staged || (Tied && kTiedNeedsRegisters)>)
    query_gradients_kernel(BackwardArgs a) {
  const Schedule schedule = carve_schedule(a.schedule, a.num_tokens);
  const ScheduleHeader& header = *schedule.header;
  const int begin = a.dense ? 0 : header.dense_chunks;
  const int end = header.dense_chunks + (a.stream ? header.stream_chunks : 0);
  for (int turn = 0, i = 0; (i = chunk_of_turn<Staged>(turn, end - begin)) >= 0; ++turn) {
    const Chunk chunk = schedule.chunks[begin + i];
    const auto rows = rows_of<T>(a.table, chunk.segment);
    if (rows.count <= 0) {
      for (int q = warp(); a.dx != nullptr && q < chunk.queries; q += kWarps) {
        fill_row(row_of<T>(a.dx, a.dx_stride, a.permutation[chunk.query_begin + q]), a.d_in,
                 rows.count == 0 ? 0.0f : not_a_number());
      }
      continue;
    }
    for (int q = 0; q < chunk.queries; q += Tiles * kTileQueries) {
      query_gradients<T, Tiles, Staged, Tied>(a, schedule, rows, chunk.segment,
                                              chunk.query_begin + q,
                                              min(chunk.queries - q, Tiles * kTileQueries));
      __syncthreads();  // the next chunk's scores take this one's place
    }
  }
  if (!a.stream) return;
  const Chunk* copies = schedule.chunks + header.dense_chunks + header.stream_chunks;
  for (int i = blockIdx.x * kWarps + warp(); i < header.copy_chunks; i += gridDim.x * kWarps) {
    copy_chunk_gradients<T>(a, schedule, copies[i]);
  }
}

// --- row gradients of segments that no block holds whole -----------------------------------------
template <typename T>
inline constexpr int kGradientTiles = sizeof(T) == 2 ? 8 : 1;  // of 8 rows, one warp at a time

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) row_gradients_kernel(BackwardArgs a) {
  constexpr int kRows = kGradientTiles<T> * kTileQueries;
  const Schedule schedule = carve_schedule(a.schedule, a.num_tokens);
  const int tiles = gradient_tiles(a);
  const int tile_groups = (tiles + kWarps - 1) / kWarps;
  const int row_groups = static_cast<int>((a.table.max_rows + kRows - 1) / kRows);
  const int segments = a.whole_queries == kWideQueries ? schedule.header->wide_segments
                                                       : schedule.header->split_segments;
  const int64_t units = static_cast<int64_t>(segments) * row_groups * tile_groups;
  for (int64_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const int segment = schedule.segment_order[unit / (row_groups * tile_groups)];
    const auto rows = rows_of<T>(a.table, segment);
    const int r = static_cast<int>(unit / tile_groups % row_groups) * kRows;
    const int i = static_cast<int>(unit % tile_groups) * kWarps + warp();
    if (r >= rows.count || i >= tiles) continue;
    const int begin = a.segment_queries[segment];
    const int queries = a.segment_queries[segment + 1] - begin;
    const int64_t stride = (queries + 7) / 8 * 8;
    const int64_t from = schedule.segment_weights[segment] + r * stride;
    const int count = min(rows.count - r, kRows);
    const GradientTile<T> tile(a, segment, begin, i);
    ColumnSums<T, kGradientTiles<T>, 1> sums;
    sums.clear();
    sums.tiles = (count + kTileQueries - 1) / kTileQueries;
    const auto* weights = static_cast<const T*>(tile.of_keys ? a.ds_weights : a.p_weights);
    sums.run(tile.queries, 0, queries, StoredWeights<T>{weights + from, stride, count});
    if (tile.tied) {
      const auto* p = static_cast<const T*>(a.p_weights);
      sums.run(tile.dy, 0, queries, StoredWeights<T>{p + from, stride, count});
    }
    tile.store(sums, r, count);
  }
}

// --- rows that nothing touched -------------------------------------------------------------------
// Dense gradients have a zero for every row that no segment owns; segments' rows ascend. Parallel
// over blocks of rows, so that one long gap occupies the whole device; one warp a block of rows.
template <typename T>
__global__ void __launch_bounds__(kThreads) zero_gaps_kernel(BackwardArgs a) {
  constexpr int64_t kRows = 64;
  const Schedule schedule = carve_schedule(a.schedule, a.num_tokens);
  const int64_t* segments = a.table.segment_rows;
  int count = schedule.header->num_segments;
  if (count > 0 && segments[2 * static_cast<int64_t>(count) - 2] < 0) --count;  // invalid ids
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t begin = (static_cast<int64_t>(blockIdx.x) * kWarps + warp()) * kRows;
       begin < a.table_rows; begin += warps * kRows) {
    const int64_t end = min(begin + kRows, a.table_rows);
    int low = 0, high = count;  // the first segment that ends behind `begin`
    while (low < high) {
      const int middle = (low + high) / 2;
      if (segments[2 * static_cast<int64_t>(middle) + 1] > begin) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    for (int64_t row = begin; row < end; ++row) {
      while (low < count && segments[2 * static_cast<int64_t>(low) + 1] <= row) ++low;
      if (low < count && segments[2 * static_cast<int64_t>(low)] <= row) {
        row = min(segments[2 * static_cast<int64_t>(low) + 1], end) - 1;  // owned
        continue;
      }
      fill_row(static_cast<T*>(a.dkeys) + row * a.dkey_stride, a.d_in, 0.0f);
      if (a.dvalues != nullptr) {
        fill_row(static_cast<T*>(a.dvalues) + row * a.dvalue_stride, a.d_emb, 0.0f);
      }
    }
  }
}

// --- launch --------------------------------------------------------------------------------------
template <typename T, int Tiles, bool Staged>
void launch_query_gradients(const BackwardArgs& args, int64_t most_chunks, Stream stream) {
  const bool tied = args.dkeys != nullptr && args.dvalues == nullptr;
  const auto kernel = tied ? query_gradients_kernel<T, Tiles, Staged, true>
                           : query_gradients_kernel<T, Tiles, Staged, false>;
  const int64_t shared = backward_shared_bytes(Tiles, args.table.max_rows);
  const int resident = resident_blocks(kernel, kThreads, shared);
  launch(kernel, static_cast<int>(min(most_chunks, static_cast<int64_t>(resident))), kThreads,
         shared, stream, args);
}

template <typename T>
void run_backward(const SegmentedAttentionBackwardParams& params,
                  const BackwardWorkspace& workspace, const Launch& on) {
  BackwardArgs args = {};
  args.table = table_of(params);
  args.x = params.x.data;
  args.dy = params.dy.data;
  args.dx = params.dx.data;
  args.dkeys = params.dkeys.data;
  args.dvalues = params.dvalues.data;
  args.x_stride = static_cast<int>(params.x.stride);
  args.dy_stride = static_cast<int>(params.dy.stride);
  args.dx_stride = static_cast<int>(params.dx.stride);
  args.dkey_stride = static_cast<int>(params.dkeys.stride);
  args.dvalue_stride = static_cast<int>(params.dvalues.stride);
  args.segment_gradients = params.segment_gradients;
  args.permutation = params.plan.permutation;
  args.segment_queries = params.plan.segment_queries;
  args.schedule = params.plan.schedule;
  args.num_tokens = params.plan.num_tokens;
  args.table_rows = params.table_rows;
  args.d_in = static_cast<int>(params.d_in);
  args.d_emb = static_cast<int>(params.d_emb);
  args.scale = static_cast<float>(params.scale);
  args.p_weights = workspace.p_weights;
  args.ds_weights = workspace.ds_weights;
  const auto stream = static_cast<Stream>(on.stream);
  const int64_t tokens = args.num_tokens;

  const int tiles = tokens <= kDecodeTokens ? 1
                                            : backward_tiles(sizeof(T), args.table.max_rows,
                                                             device_limits().shared_bytes);
  args.whole_queries = tiles > 1 ? kWideQueries : kStreamQueries;
  if constexpr (sizeof(T) == 2) {
    if (tiles > 1) {
      static_assert(4 * kTileQueries == kWideQueries);
      args.dense = true;
      launch_query_gradients<T, 4, true>(args, tokens / kStreamQueries, stream);
    }
  }
  args.dense = tiles == 1;
  args.stream = true;
  launch_query_gradients<T, 1, false>(args, tokens, stream);
  if (args.dkeys == nullptr) return;

  const int resident = resident_blocks(row_gradients_kernel<T>, kThreads, 0);
  if (tokens > args.whole_queries) {
    launch(row_gradients_kernel<T>, resident, kThreads, 0, stream, args);
  }
  if (args.segment_gradients == nullptr) {
    launch(zero_gaps_kernel<T>, resident_blocks(zero_gaps_kernel<T>, kThreads, 0), kThreads, 0,
           stream, args);
  }
}

}  // namespace l3ext::cuda
