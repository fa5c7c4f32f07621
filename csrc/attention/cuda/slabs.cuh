// Attention to a tied table, whose rows are keys and values in one: its rows go through shared
// memory in slabs, each of which serves the scores and then the sums, with a running softmax
// between. So a row is read once. One block attends up to 8 queries: its warps share the rows and
// columns of the scores, then the columns of the sums, which stay in registers from slab to slab.
//
// Limited by the bytes of rows. At d = 2048 in 16 bits a slab is 64 KiB: at an H200's 4.3 TB/s a
// multiprocessor gets one in 2 us (est). Shared memory then moves 64 KiB in, 128 out and 32 of
// queries, 1 us at 128 bytes a clock (est), and while one block computes the other one loads: the
// next slab is on its way to L2 by then. Reading the rows a second time from L2 instead would be
// twice the bytes through an L2 that is hardly faster than an H200's memory.
#pragma once

#include "attention/cuda/segments.cuh"

namespace l3ext::cuda {

// --- rows in shared memory -----------------------------------------------------------------------
// Rows of `row_bytes`, a multiple of 128. Of the 16-byte vectors in 128 bytes, row r holds the i-th
// at i ^ swizzle(r): the lanes that a quarter of a warp serves at a time, which read two
// neighbouring rows (RowProducts) or every fourth one (ColumnSums), meet no bank twice.
template <typename T>
struct SlabRows {
  std::byte* base;
  int row_bytes;
  int first_row = 0;
  int first_column = 0;

  __device__ uint4* at(int r, int column) const {
    const int row = first_row + r;
    const int swizzle = row / 4 % 4 * 2 ^ row % 2 * 4;
    const int vector = (first_column + column) / kVector<T> ^ swizzle;
    return reinterpret_cast<uint4*>(base + row * row_bytes) + vector;
  }
  __device__ uint4 load(int r, int column) const { return load_shared(at(r, column)); }
  __device__ SlabRows from(int column) const {
    return {base, row_bytes, first_row, first_column + column};
  }
  __device__ SlabRows from_row(int r) const { return {base, row_bytes, r, first_column}; }

  // One row, or zeros where it is not valid, in the background; one warp.
  __device__ void stage(int r, const T* row, int width, bool valid = true) const {
    for (int c = lane() * kVector<T>; c < width; c += 32 * kVector<T>) {
      copy_async(at(r, c), row + c, valid);
    }
  }
};

template <typename T>
struct SlabQueries {
  SlabRows<T> rows;
  __device__ void begin_step(int) {}
  __device__ uint4 load(int i, int column) const {
    return rows.load(query_of_lane(i, sizeof(T)), column + kVector<T> * (lane() % 4));
  }
};

// Dense chunks of at most this many queries go through slabs too, 8 at a time. In 16 bits two
// blocks then read the rows, once from memory and once from L2. The dense tiles' sums (at d = 2048
// half a megabyte) fit no multiprocessor beside the rows, so those read every row twice from
// memory; but from three blocks on the reads from L2 would cost what the second one from memory
// does.
template <typename T>
inline constexpr int kSlabQueries = sizeof(T) == 2 ? 2 * kTileQueries : kDenseQueries;

// --- attention -----------------------------------------------------------------------------------
template <typename T>
class SlabAttention {
 public:
  __device__ explicit SlabAttention(const Attention& a)
      : a_(a), slab_(slab_rows(a.d_in * static_cast<int>(sizeof(T)))) {
    const int row_bytes = a.d_in * static_cast<int>(sizeof(T));
    rows_ = {dynamic_shared(), row_bytes};
    queries_.rows = {dynamic_shared() + slab_ * row_bytes, row_bytes};
    scores_ = {reinterpret_cast<float*>(queries_.rows.base + kTileQueries * row_bytes),
               kSlabScoreStride};
    state_ = reinterpret_cast<State*>(scores_.base + kTileQueries * kSlabScoreStride);
  }

  // Rows [0, count), count >= 1, for at most 8 queries; the whole block, as all members.
  __device__ void run(const T* rows, int count, int query_begin, int queries) {
    static_assert(kWarps == kTileQueries, "a warp stages one query and takes its softmax");
#pragma unroll
    for (auto& sums : sums_) sums.clear();
    const int32_t position =
        warp() < queries ? __ldg(a_.permutation + query_begin + warp()) : int32_t{-1};
    if (lane() == 0) {
      state_->positions[warp()] = position;
      state_->largest[warp()] = -INFINITY;
      state_->sums[warp()] = 0;
    }
    queries_.rows.stage(warp(),
                        static_cast<const T*>(a_.x) + max(position, 0) * int64_t{a_.x_stride},
                        a_.d_in, position >= 0);
    for (int first = 0; first < count; first += slab_) {
      add_slab(rows + static_cast<int64_t>(first) * a_.table.key_stride, count - first);
    }
  }

  __device__ void store_outputs() {
    if (lane() == 0) state_->factors[warp()] = 1.0f / state_->sums[warp()];
    __syncthreads();
    each_tile([&](ColumnSums<T, 1, 1>& sums, int tile) {
      sums.scale(state_->factors);
      sums.finish([&](int q, int column, const float (&v)[kVector<T>]) {
        const int32_t position = state_->positions[q];
        if (position < 0) return;
        store_vector<T>(row_of<T>(a_.y, a_.y_stride, position) + tile * kTileColumns + column, v);
      });
    });
    __syncthreads();  // the next queries take these ones' place
  }

 private:
  struct State {  // of every query
    float factors[kTileQueries];
    float largest[kTileQueries];
    float sums[kTileQueries];
    int32_t positions[kTileQueries];  // -1: no query
  };

  template <typename F>
  __device__ void each_tile(F&& f) {
#pragma unroll
    for (int i = 0; i < kSlabTiles; ++i) {
      const int tile = i * kWarps + warp();
      if (tile < a_.d_in / kTileColumns) f(sums_[i], tile);
    }
  }

  __device__ static void prefetch_row(const T* row, int width) {
    constexpr int kLine = 128 / static_cast<int>(sizeof(T));
    for (int c = lane() * kLine; c < width; c += 32 * kLine) prefetch_l2(row + c);
  }

  __device__ void add_slab(const T* rows, int rows_left) {
    const int stride = a_.table.key_stride, width = a_.d_in, count = min(rows_left, slab_);
    for (int r = warp(); r < count; r += kWarps) {
      rows_.stage(r, rows + static_cast<int64_t>(r) * stride, width);
    }
    commit_copies();
    for (int r = slab_ + warp(); r < min(rows_left, 2 * slab_); r += kWarps) {
      prefetch_row(rows + static_cast<int64_t>(r) * stride, width);
    }
    wait_copies<0>();
    __syncthreads();  // the slab is there for all
    const int slices = column_slices(count);
    const int block = warp() / slices;  // no warp has a second one
    if (block * kBlockRows < count) {
      score_block<T, 1, 1, 1>(rows_.from_row(block * kBlockRows), count, block, queries_,
                              kTileQueries, width, warp() % slices, slices, scores_);
    }
    __syncthreads();
    const float factor = more_exponentials(scores_.of(warp()), count, slices, a_.scale,
                                           &state_->largest[warp()], &state_->sums[warp()]);
    if (lane() == 0) state_->factors[warp()] = factor;
    __syncthreads();
    each_tile([&](ColumnSums<T, 1, 1>& sums, int tile) {
      sums.scale(state_->factors);
#pragma unroll 1
      for (int r = 0; r < count; r += kRowStep<T>) {
        HeldRows<T, 1> rows;  // and none ahead: what a multiprocessor's own memory holds is near
        rows.load(rows_.from_row(r).from(tile * kTileColumns), count - r);
        sums.add(rows, SharedWeights{scores_, r});
      }
    });
    __syncthreads();  // rows, scores and factors are free again
  }

  const Attention& a_;
  int slab_;  // rows
  SlabRows<T> rows_;
  SlabQueries<T> queries_;
  Scores scores_;
  State* state_;
  ColumnSums<T, 1, 1> sums_[kSlabTiles];
};

}  // namespace l3ext::cuda
