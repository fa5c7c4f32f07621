// The CUDA kernels' choices of sizes: pure functions, tested where there is no GPU.
#include "attention/cuda/heuristics.hpp"

#include <cstdint>
#include <vector>

#include "attention/cuda/layout.hpp"
#include "check.hpp"

namespace {

using namespace l3ext::cuda;

// Shared memory of one block: H100 and H200, A100, and consumer cards.
constexpr int64_t kHopper = 227 * 1024, kAmpere = 163 * 1024, kConsumer = 99 * 1024;

void dense_tiles_are_the_largest_that_fit() {
  EXPECT(forward_tiles(2, 512, kHopper) == 8);
  EXPECT(forward_tiles(2, 512, kAmpere) == 4);
  EXPECT(forward_tiles(2, 256, kAmpere) == 8);
  EXPECT(forward_tiles(2, 1024, kHopper) == 4);
  EXPECT(forward_tiles(2, 4096, kHopper) == 1);
  EXPECT(forward_tiles(2, 512, kConsumer) == 4);
  EXPECT(backward_tiles(2, 512, kHopper) == 4);
  EXPECT(backward_tiles(2, 512, kAmpere) == 4);
  EXPECT(backward_tiles(2, 1024, kHopper) == 1);
  EXPECT(backward_tiles(2, 512, kConsumer) == 1);
}

void float32_has_registers_for_one_tile() {
  for (const int64_t rows : {1, 64, 512}) {
    EXPECT(forward_tiles(4, rows, kHopper) == 1);
    EXPECT(backward_tiles(4, rows, kHopper) == 1);
  }
}

void what_is_chosen_fits() {
  for (int64_t rows = 0; rows <= 4096; ++rows) {
    for (const int64_t shared : {kConsumer, kAmpere, kHopper}) {
      const int forward = forward_tiles(2, rows, shared),
                backward = backward_tiles(2, rows, shared);
      EXPECT(forward == 1 || forward_shared_bytes(forward, rows) <= shared);
      EXPECT(backward == 1 || backward_shared_bytes(backward, rows) <= shared);
    }
  }
  // The rows that every device of 227 KiB serves, whatever the tiles.
  EXPECT(forward_shared_bytes(1, 4096) <= kHopper);
  EXPECT(decode_shared_bytes(4096) <= kHopper);
  EXPECT(backward_shared_bytes(1, 3616) <= kHopper);
  EXPECT(backward_shared_bytes(1, 3617) > kHopper);
}

void slabs_are_whole_blocks_that_fit() {
  EXPECT(slab_rows(2 * 2048) == 16 && slab_rows(2 * 1024) == 32 && slab_rows(2 * 1536) == 16);
  EXPECT(slab_rows(4 * 2048) == 16 && slab_rows(2 * 64) == 128);
  for (const int element_bytes : {2, 4}) {
    for (int width = 64; width <= 8192; width += 64) {
      const int row_bytes = element_bytes * width, rows = slab_rows(row_bytes);
      EXPECT(rows % kBlockRows == 0 && rows >= kBlockRows && rows <= kWarps * kBlockRows);
      EXPECT(rows == kBlockRows || rows * row_bytes <= 64 * 1024);
      EXPECT(slabs_fit(element_bytes, width, kHopper) == (width <= 2048));
      EXPECT(!slabs_fit(element_bytes, width, kConsumer) ||
             slab_shared_bytes(row_bytes) <= kConsumer);
    }
  }
  // Two blocks on a multiprocessor of 228 KiB, of which every block costs one more.
  EXPECT(2 * (slab_shared_bytes(2 * 2048) + 1024) <= 228 * 1024);
  EXPECT(slabs_fit(2, 2048, kAmpere) && !slabs_fit(4, 2048, kAmpere));
  EXPECT(!slabs_fit(2, 2048, kConsumer) && slabs_fit(2, 1024, kConsumer));
}

void scores_of_neighbouring_queries_lie_in_other_banks() {
  for (int64_t rows = 0; rows <= 4096; ++rows) {
    EXPECT(score_stride(rows) >= rows && score_stride(rows) >= 128);
    EXPECT(score_stride(rows) % 32 == 16);
    for (int query = 0; query < 64; ++query) {  // no place is another query's
      EXPECT(score_place(query, static_cast<int>(rows)) / 32 == rows / 32);
    }
  }
  for (int query = 0; query < 64; ++query) {
    uint32_t places = 0;
    for (int i = 0; i < 32; ++i) places |= 1u << score_place(query, i);
    EXPECT(places == 0xffffffffu);  // each its own
    for (int i = 0; i < 32; ++i) {  // fours stay together: they are loaded as one
      EXPECT(score_place(query, i) == score_place(query, i / 4 * 4) + i % 4);
    }
  }
}

// Each four of a query has a place of its own among those of a warp.
void parts_do_not_overlap() {
  std::vector<int> used(kWarpFours);
  for (int query = 0; query < kTileQueries; ++query) {
    for (int column = 0; column < kTileColumns; column += 4) {
      const int place = place_of_four(query, column);
      EXPECT(place >= 0 && place < kWarpFours && used[place]++ == 0);
    }
  }
}

void decode_pieces_grow_with_the_batch() {
  constexpr int kResident = 264;  // two blocks on each of 132 multiprocessors
  const DecodeShape one = decode_shape(1, 512, 1024, kResident);
  EXPECT(one.slice_blocks == 1 && one.slices == 32 && one.tiles_per_unit == 1);
  EXPECT(one.units == 32);
  const DecodeShape many = decode_shape(512, 512, 1024, kResident);
  EXPECT(many.slice_blocks == 2 && many.slices == 16 && many.tiles_per_unit == 8);
  EXPECT(many.units == 512 * 16);
  // At the edge: 33 tokens of 32 blocks are four turns of 264, 34 are more.
  EXPECT(decode_shape(33, 512, 64, kResident).slice_blocks == 1);
  EXPECT(decode_shape(34, 512, 64, kResident).slice_blocks == 2);
}

void decode_covers_all_rows_and_columns() {
  for (const int64_t tokens : {1, 2, 7, 64, 300, 1024}) {
    for (const int64_t rows : {0, 1, 15, 16, 17, 33, 512, 4096}) {
      for (const int64_t d_emb : {64, 192, 1024, 8192}) {
        for (const int resident : {1, 3, 264}) {
          const DecodeShape shape = decode_shape(tokens, rows, d_emb, resident);
          EXPECT(int64_t{shape.slices} * shape.slice_blocks * kBlockRows >= rows);
          EXPECT(shape.slices >= 1 && shape.tiles_per_unit >= 1);
          const int64_t tiles = d_emb / kTileColumns;
          const int64_t groups = (tiles + shape.tiles_per_unit - 1) / shape.tiles_per_unit;
          EXPECT(shape.units >= tokens * shape.slices && shape.units >= tokens * groups);
        }
      }
    }
  }
}

void blocks_leave_room_for_others() {
  EXPECT(blocks_beside(264, 132, 0) == 264);
  EXPECT(blocks_beside(264, 132, 4) == 256);
  EXPECT(blocks_beside(132, 132, 4) == 128);
  for (const int spare : {132, 133, 1 << 30}) EXPECT(blocks_beside(264, 132, spare) == 1);
}

}  // namespace

int main() {
  RUN(dense_tiles_are_the_largest_that_fit);
  RUN(float32_has_registers_for_one_tile);
  RUN(what_is_chosen_fits);
  RUN(slabs_are_whole_blocks_that_fit);
  RUN(scores_of_neighbouring_queries_lie_in_other_banks);
  RUN(parts_do_not_overlap);
  RUN(blocks_leave_room_for_others);
  RUN(decode_pieces_grow_with_the_batch);
  RUN(decode_covers_all_rows_and_columns);
  return check::failures == 0 ? 0 : 1;
}
