// What every kernel does with a segment: find its rows, score them, take the softmax.
#pragma once

#include <cmath>

#include "attention/cuda/schedule.hpp"
#include "attention/cuda/tiles.cuh"
#include "attention/segmented_attention.hpp"

namespace l3ext::cuda {

// Streaming wants blocks that load while others wait at a barrier; the dense tiles and the FMA
// units' accumulators want all registers.
template <typename T, bool Dense>
inline constexpr int kBlocksPerMultiprocessor = sizeof(T) == 2 && !Dense ? 2 : 1;

// --- rows ----------------------------------------------------------------------------------------
// A table, or a directory of where each token's rows lie; see SegmentedAttentionInputs.
struct Table {
  const void* keys;
  const void* values;
  int key_stride;
  int value_stride;
  const int64_t* directory;
  int64_t value_offset;
  const int32_t* segment_tokens;
  const int64_t* segment_rows;
  int64_t max_rows;
};

inline Table table_of(const SegmentedAttentionInputs& inputs) {
  return {inputs.keys.data,
          inputs.values.data,
          static_cast<int>(inputs.keys.stride),
          static_cast<int>(inputs.values.stride),
          inputs.directory,
          inputs.value_offset,
          inputs.plan.segment_tokens,
          inputs.plan.segment_rows,
          inputs.plan.max_rows};
}

// Values that are the keys: one row serves both.
inline bool is_tied(const SegmentedAttentionInputs& inputs) {
  const bool same_rows = inputs.directory != nullptr ? inputs.value_offset == 0
                                                     : inputs.values.data == inputs.keys.data;
  return same_rows && inputs.values.stride == inputs.keys.stride && inputs.d_in == inputs.d_emb;
}

template <typename T>
struct SegmentRows {
  const T* keys;
  const T* values;
  int count;  // -1: no such token, no address, or more rows than promised; its outputs are NaN
};

template <typename T>
__device__ inline SegmentRows<T> rows_of(const Table& table, int segment) {
  const int64_t begin = table.segment_rows[2 * static_cast<int64_t>(segment)];
  const int64_t count = table.segment_rows[2 * static_cast<int64_t>(segment) + 1] - begin;
  if (begin < 0 || count < 0 || count > table.max_rows) return {nullptr, nullptr, -1};
  const int rows = static_cast<int>(count);
  if (table.directory == nullptr) {
    return {static_cast<const T*>(table.keys) + begin * table.key_stride,
            static_cast<const T*>(table.values) + begin * table.value_stride, rows};
  }
  const int64_t address = table.directory[table.segment_tokens[segment]];
  if (address == 0 && rows > 0) return {nullptr, nullptr, -1};
  const T* keys = reinterpret_cast<const T*>(address);
  return {keys, keys + table.value_offset, rows};
}

// --- turns ---------------------------------------------------------------------------------------
// Which of `count` chunks, most work first, this block attends in its turn-th turn; -1: no more. In
// order where chunks are dense. Otherwise large chunks are all bandwidth and small ones all
// latency, and the device would idle over the latter at the end: half of the blocks take from
// either end.
template <bool InOrder>
__device__ inline int chunk_of_turn(int turn, int count) {
  const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  if (InOrder || blocks % 2 != 0) {
    const int next = turn * blocks + block;
    return next < count ? next : -1;
  }
  const int rank = turn * (blocks / 2) + block / 2;
  const bool from_front = (turn + block) % 2 == 0;
  if (rank >= (from_front ? count - count / 2 : count / 2)) return -1;
  return from_front ? rank : count - 1 - rank;
}

// --- outputs -------------------------------------------------------------------------------------
// What every forward kernel reads and writes.
struct Attention {
  Table table;
  const void* x;  // [num_tokens, d_in]
  int x_stride;   // elements, as all strides
  void* y;        // [num_tokens, d_emb]
  int y_stride;
  const int32_t* permutation;  // [num_tokens]
  int32_t* schedule;           // [schedule_entries(num_tokens)]
  int64_t num_tokens;
  int d_in;
  int d_emb;
  float scale;
};

inline Attention attention_of(const SegmentedAttentionParams& params) {
  return {table_of(params),
          params.x.data,
          static_cast<int>(params.x.stride),
          params.y.data,
          static_cast<int>(params.y.stride),
          params.plan.permutation,
          params.plan.schedule,
          params.plan.num_tokens,
          static_cast<int>(params.d_in),
          static_cast<int>(params.d_emb),
          static_cast<float>(params.scale)};
}

template <typename T>
__device__ inline T* row_of(void* base, int stride, int64_t row) {
  return static_cast<T*>(base) + row * stride;
}

__device__ inline float not_a_number() { return __uint_as_float(0x7fc00000u); }

// Fills one row; one warp.
template <typename T>
__device__ inline void fill_row(T* row, int width, float value) {
  float v[kVector<T>];
#pragma unroll
  for (float& x : v) x = value;
  for (int i = lane() * kVector<T>; i < width; i += 32 * kVector<T>) store_vector<T>(row + i, v);
}

// Fills the outputs of a chunk; the whole block.
template <typename T>
__device__ inline void fill_outputs(const Attention& a, const Chunk& chunk, float value) {
  for (int q = warp(); q < chunk.queries; q += kWarps) {
    fill_row(row_of<T>(a.y, a.y_stride, a.permutation[chunk.query_begin + q]), a.d_emb, value);
  }
}

// Segments of one row (a softmax of 1, whatever the key), of none, or of no such token; one warp.
template <typename T>
__device__ inline void copy_chunk(const Attention& a, const Chunk& chunk) {
  const auto rows = rows_of<T>(a.table, chunk.segment);
  for (int i = 0; i < chunk.queries; ++i) {
    T* y = row_of<T>(a.y, a.y_stride, a.permutation[chunk.query_begin + i]);
    if (rows.count != 1) {
      fill_row(y, a.d_emb, rows.count == 0 ? 0.0f : not_a_number());
      continue;
    }
    for (int c = lane() * kVector<T>; c < a.d_emb; c += 32 * kVector<T>) {
      store_global(reinterpret_cast<uint4*>(y + c),
                   __ldg(reinterpret_cast<const uint4*>(rows.values + c)));
    }
  }
}

// The copy chunks of the schedule, over all warps of the grid.
template <typename T>
__device__ inline void copy_chunks(const Attention& a, const Schedule& schedule) {
  const Chunk* chunks =
      schedule.chunks + schedule.header->dense_chunks + schedule.header->stream_chunks;
  for (int i = blockIdx.x * kWarps + warp(); i < schedule.header->copy_chunks;
       i += gridDim.x * kWarps) {
    copy_chunk<T>(a, chunks[i]);
  }
}

// --- queries -------------------------------------------------------------------------------------
// Rows of x (or dy) in the plan's order.
template <typename T>
struct QuerySource {
  const T* base;
  int stride;
  const int32_t* permutation;  // at the first query
  int count;
};

// Queries of many tiles, staged by the whole block: a ring of column chunks in shared memory,
// filled in the background. Every warp calls begin_step for the same columns, `passes` times from 0
// to width.
template <typename T, int Tiles>
class StagedQueries {
 public:
  static constexpr int kStages = kRingStages;
  static constexpr int kColumns = kRingColumnBytes / static_cast<int>(sizeof(T));
  static constexpr int kStageBytes = Tiles * kTileQueries * kRingQueryBytes;

  __device__ StagedQueries(std::byte* ring, const QuerySource<T>& source, int width, int passes)
      : ring_(ring),
        source_(source),
        width_(width),
        chunks_((width + kColumns - 1) / kColumns),
        total_(passes * chunks_) {
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) fill(i);
  }

  __device__ void begin_step(int column) {
    if (column % kColumns != 0) return;
    wait_copies<kStages - 2>();
    // The chunk is there for all; and all are done with the one before it, whose place is next.
    __syncthreads();
    fill(++index_ + kStages - 1);
  }

  __device__ uint4 load(int tile, int column) const {
    const int query = query_of_lane(tile, sizeof(T));
    const int bytes = (column % kColumns + kVector<T> * (lane() % 4)) * static_cast<int>(sizeof(T));
    return load_shared(reinterpret_cast<const uint4*>(ring_ + index_ % kStages * kStageBytes +
                                                      query * kRingQueryBytes + bytes));
  }

 private:
  __device__ void fill(int index) {
    if (index < total_) {
      constexpr int kVectors = kColumns / kVector<T>;
      std::byte* stage = ring_ + index % kStages * kStageBytes;
      const int first = index % chunks_ * kColumns;
      for (int i = threadIdx.x; i < Tiles * kTileQueries * kVectors; i += kThreads) {
        const int query = i / kVectors, column = i % kVectors * kVector<T>;
        const bool valid = query < source_.count && first + column < width_;
        const T* from = source_.base;
        if (valid) {
          from += static_cast<int64_t>(__ldg(source_.permutation + query)) * source_.stride +
                  first + column;
        }
        copy_async(stage + query * kRingQueryBytes + column * sizeof(T), from, valid);
      }
    }
    commit_copies();  // an empty group too: wait_copies counts groups
  }

  std::byte* ring_;
  const QuerySource<T>& source_;
  int width_;
  int chunks_;
  int total_;
  int index_ = -1;  // of the chunk in use
};

// Where ptxas 13.0 spills on sm_100 and nowhere else: with four blocks of 16 rows that a warp of a
// dense chunk multiplies at a time, and with two blocks of tied row gradients a multiprocessor.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
inline constexpr int kMostRowBlocks = 2;
inline constexpr bool kTiedNeedsRegisters = true;
#else
inline constexpr int kMostRowBlocks = 4;
inline constexpr bool kTiedNeedsRegisters = false;
#endif

// --- scores --------------------------------------------------------------------------------------
__device__ inline int padded_rows(int rows) {
  return (rows + kBlockRows - 1) / kBlockRows * kBlockRows;
}

// Where rows are too few to occupy the block's warps, the warps share out columns instead. A
// function of the rows alone, so that it does not change a query's bits.
__device__ inline int column_slices(int rows) {
  const int blocks = padded_rows(rows) / kBlockRows;
  return blocks > 4 ? 1 : blocks > 2 ? 2 : blocks > 1 ? 4 : 8;
}

// One warp's part of the scores of `count` rows, laid out as score_rows says: RowBlocks blocks of
// 16 rows from `block` on, in one of `slices` column slices. `rows` begins at the first of these
// rows.
template <typename T, int RowBlocks, int Tiles, int Depth, typename Rows, typename Queries>
__device__ inline void score_block(const Rows& rows, int count, int block, Queries& queries,
                                   int num_queries, int width, int slice, int slices,
                                   const Scores& scores) {
  const int blocks = padded_rows(count) / kBlockRows;
  const int steps = width / kColumnStep<T>;
  RowProducts<T, RowBlocks, Tiles, Depth> products;
  products.tiles = (num_queries + kTileQueries - 1) / kTileQueries;
  products.run(rows, count - block * kBlockRows, queries, steps * slice / slices * kColumnStep<T>,
               steps * (slice + 1) / slices * kColumnStep<T>);
  products.finish([&](int row, int query, float value) {
    const int r = block * kBlockRows + row;
    if (r < blocks * kBlockRows) {
      store_shared(scores.at(query, slice * blocks * kBlockRows + r), value);
    }
  });
}

// Scores of rows [0, count), count >= 1, in column_slices(count) slices: that of a query's row is
// its slice * padded_rows(count) + row-th. Barriers are the caller's: before it (scores and ring
// are free) and after.
template <typename T, int Tiles, bool Staged>
__device__ inline void score_rows(const T* rows, int row_stride, int count,
                                  const QuerySource<T>& source, int width, const Scores& scores,
                                  std::byte* ring) {
  const int blocks = padded_rows(count) / kBlockRows;
  const auto run = [&]<int RowBlocks, int Depth>(auto& queries, int block, int slice, int slices) {
    const StridedRows<T> from{rows + static_cast<int64_t>(block) * kBlockRows * row_stride,
                              row_stride};
    score_block<T, RowBlocks, Tiles, Depth>(from, count, block, queries, source.count, width, slice,
                                            slices, scores);
  };
  if (!Staged || blocks <= kWarps) {
    const int slices = column_slices(count);
    GatheredQueries<T, Tiles> queries(source.base, source.stride, source.permutation, source.count);
    for (int block = warp() / slices; block < blocks; block += kWarps / slices) {
      run.template operator()<1, Tiles == 1 ? 2 : 1>(queries, block, warp() % slices, slices);
    }
  } else if constexpr (Staged) {
    const auto staged = [&]<int RowBlocks>() {
      const int passes = (blocks + kWarps * RowBlocks - 1) / (kWarps * RowBlocks);
      StagedQueries<T, Tiles> queries(ring, source, width, passes);
      for (int pass = 0; pass < passes; ++pass) {
        const int block = (pass * kWarps + warp()) * RowBlocks;
        if (block < blocks) {
          run.template operator()<RowBlocks, 1>(queries, block, 0, 1);
        } else {
          for (int k = 0; k < width; k += kColumnStep<T>) queries.begin_step(k);
        }
      }
    };
    if (kMostRowBlocks == 2 || blocks <= 2 * kWarps) {
      staged.template operator()<2>();
    } else {
      staged.template operator()<kMostRowBlocks>();
    }
  }
}

// Asks for the first rows of a matrix while something else is computed; the whole block. Few rows
// are all latency: without it the values would only start to travel when the scores are done.
template <typename T>
__device__ inline void prefetch_rows(const T* rows, int stride, int count, int width) {
  constexpr int kMostRows = 64;
  constexpr int kLine = 128 / static_cast<int>(sizeof(T));
  const int lines = width / kLine;
  for (int i = threadIdx.x; i < min(count, kMostRows) * lines; i += kThreads) {
    prefetch_l2(rows + static_cast<int64_t>(i / lines) * stride + i % lines * kLine);
  }
}

// Reductions that leave every lane the same bits.
__device__ inline float warp_sum(float v) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) v += __shfl_xor_sync(0xffffffffu, v, i);
  return v;
}
__device__ inline float warp_max(float v) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, i));
  return v;
}

// The sum of a row's column slices, in order.
__device__ inline float whole_score(const Scores::OfQuery& scores, int row, int slices,
                                    int slice_stride) {
  float sum = scores[row];
  for (int j = 1; j < slices; ++j) sum += scores[j * slice_stride + row];
  return sum;
}

// One query's softmax by one warp: scores of `rows` rows in `slices` parts, as score_rows leaves
// them, become exp(scale * (score - max)); zeros follow to the next multiple of 16. Returns their
// sum; NaN where a score is NaN or all are -infinity, as the definition has it.
__device__ inline float exponentials(const Scores::OfQuery& scores, int rows, int slices,
                                     float scale) {
  const int padded = padded_rows(rows);
  float largest = -INFINITY;
  for (int r = lane(); r < rows; r += 32) {
    const float score = scale * whole_score(scores, r, slices, padded);
    scores[r] = score;
    largest = fmaxf(largest, score);
  }
  largest = warp_max(largest);
  float sum = 0;
  for (int r = lane(); r < padded; r += 32) {
    const float e = r < rows ? expf(scores[r] - largest) : 0.0f;
    scores[r] = e;
    sum += e;
  }
  return warp_sum(sum);
}

// The same for one slab of a segment's rows after the other: exponentials relative to the largest
// score so far. `largest` and `sum` are in shared memory, -infinity and 0 before the first slab.
// What was summed with the weights of the slabs before is to be multiplied by the result.
__device__ inline float more_exponentials(const Scores::OfQuery& scores, int rows, int slices,
                                          float scale, float* largest, float* sum) {
  const int padded = padded_rows(rows);
  const float before = *largest;
  float now = before;
  for (int r = lane(); r < rows; r += 32) {
    const float score = scale * whole_score(scores, r, slices, padded);
    scores[r] = score;
    now = fmaxf(now, score);
  }
  now = warp_max(now);
  // All scores so far -infinity: no weights yet, but a NaN among them stays one.
  const float relative_to = now == -INFINITY ? 0.0f : now;
  const float factor = expf(before - relative_to);
  float part = 0;
  for (int r = lane(); r < padded; r += 32) {
    const float e = r < rows ? expf(scores[r] - relative_to) : 0.0f;
    scores[r] = e;
    part += e;
  }
  part = warp_sum(part);
  // All lanes have read `largest`, on which what they shuffled since depends; but no shuffle orders
  // memory.
  __syncwarp();
  if (lane() == 0) {
    *largest = now;
    *sum = factor * *sum + part;
  }
  return factor;
}

}  // namespace l3ext::cuda
