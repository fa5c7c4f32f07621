// What host and device must agree on: sizes of tiles, blocks and shared memory.
#pragma once

#include <cstdint>

#include "core/cuda/host_device.hpp"

namespace l3ext::cuda {

inline constexpr int kWarps = 8;  // of every block of the attention kernels
inline constexpr int kThreads = 32 * kWarps;

inline constexpr int kBlockRows = 16;    // rows of one tile of RowProducts
inline constexpr int kTileQueries = 8;   // queries of one tile of either product
inline constexpr int kTileColumns = 64;  // columns of one ColumnSums

// Queries of many tiles are staged through a ring in shared memory, 256 bytes of each at a time.
// Half a bank row over: the two queries that a quarter-warp reads lie in different halves.
inline constexpr int kRingStages = 3;
inline constexpr int kRingColumnBytes = 256;
inline constexpr int kRingQueryBytes = kRingColumnBytes + 64;

// Floats from one query's scores to the next: room for max_rows, and for the column slices of few
// rows; an odd multiple of 16, which keeps float4 reads of neighbouring queries in different banks.
L3EXT_HOST_DEVICE inline constexpr int score_stride(int64_t max_rows) {
  const int64_t rows = max_rows > 128 ? max_rows : 128;
  return static_cast<int>((rows + 31) / 32 * 32 + 16);
}
// And where its i-th score is among them: of every 32, the four eights change places from one pair
// of queries to the next. So in different banks lie the same rows, up to 8, of queries that are 2
// apart (as a matrix product leaves scores) and of queries that are 4 apart (as row gradients read
// weights). Not on sm_80, where ptxas 13.0 would spill for it.
L3EXT_HOST_DEVICE inline constexpr int score_place(int query, int i) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  return i;
#else
  return i ^ (query / 4 % 4 ^ query / 2 % 2 * 2) * 8;
#endif
}

// The decode kernel's warps leave their parts of a result in shared memory. Of scores [warp][query]
// [row]: four more floats from query to query, so that what a matrix product has side by side, 8
// rows of every other query, lies in different banks.
L3EXT_HOST_DEVICE inline constexpr int part_stride(int rows) { return rows + 4; }
// Of sums, four columns at a time: a query's even fours, then its odd ones. Warps write the same
// half of two neighbouring eights for every other query, and read all fours of one query.
inline constexpr int kPartFours = kTileColumns / 4 / 2;  // of a query, even or odd
inline constexpr int kOddFours = kTileQueries * (kPartFours + 1) + 4;
inline constexpr int kWarpFours = kOddFours + kTileQueries * (kPartFours + 1);
L3EXT_HOST_DEVICE inline constexpr int place_of_four(int query, int column) {
  const int four = column / 4;
  return four % 2 * kOddFours + query * (kPartFours + 1) + four / 2;
}
inline constexpr int kDecodeParts = kWarps * kWarpFours * 4;  // floats
static_assert(kDecodeParts >= kWarps * kTileQueries * part_stride(2 * kBlockRows));

// Tied tables: rows staged in shared memory serve both products. As many at a time as fit 64 KiB,
// beside which the queries leave room for a second block on a multiprocessor; 16 at least, and at
// most one block of 16 rows a warp. A function of the width alone, as the slabs show in the bits.
inline constexpr int kMostSlabRows = kWarps * kBlockRows;
inline constexpr int kSlabScoreStride = score_stride(kMostSlabRows);
L3EXT_HOST_DEVICE inline constexpr int slab_rows(int row_bytes) {
  const int rows = 64 * 1024 / row_bytes / kBlockRows * kBlockRows;
  return rows < kBlockRows ? kBlockRows : rows > kMostSlabRows ? kMostSlabRows : rows;
}
// Tiles of 64 columns whose sums one warp holds in registers from slab to slab.
inline constexpr int kSlabTiles = 4;
inline constexpr int kMostSlabColumns = kWarps * kSlabTiles * kTileColumns;
// --- bytes of shared memory; `tiles` > 1 stages its queries
// ----------------------------------------
constexpr int64_t ring_bytes(int tiles) {
  return tiles == 1 ? 0 : int64_t{kRingStages} * tiles * kTileQueries * kRingQueryBytes;
}
constexpr int64_t forward_shared_bytes(int tiles, int64_t max_rows) {
  return int64_t{4} * tiles * kTileQueries * (score_stride(max_rows) + 1) + ring_bytes(tiles);
}
constexpr int64_t backward_shared_bytes(int tiles, int64_t max_rows) {
  return int64_t{4} * tiles * kTileQueries * 2 * score_stride(max_rows) + ring_bytes(tiles);
}
constexpr int64_t decode_shared_bytes(int64_t max_rows) {
  return int64_t{4} * (kDecodeParts + kTileQueries * (score_stride(max_rows) + 1));
}
constexpr int64_t slab_shared_bytes(int row_bytes) {
  return int64_t{slab_rows(row_bytes) + kTileQueries} * row_bytes +
         int64_t{4} * kTileQueries * (kSlabScoreStride + 4);
}

}  // namespace l3ext::cuda
