#include "attention/cuda/heuristics.hpp"

#include <algorithm>
#include <initializer_list>

#include "attention/cuda/layout.hpp"

namespace l3ext::cuda {
namespace {

// float32 runs on the FMA units, whose accumulators leave no room for more than one tile.
template <typename Bytes>
int most_tiles(int64_t element_bytes, std::initializer_list<int> choices, int most,
               int64_t shared_bytes, Bytes&& bytes) {
  if (element_bytes == 2) {
    for (const int tiles : choices) {
      if (tiles <= most && bytes(tiles) <= shared_bytes) return tiles;
    }
  }
  return 1;
}

}  // namespace

Tuning& tuning() {
  static Tuning tuning;
  return tuning;
}

int forward_tiles(int64_t element_bytes, int64_t max_rows, int64_t shared_bytes) {
  return most_tiles(element_bytes, {8, 4}, tuning().most_forward_tiles, shared_bytes,
                    [=](int tiles) { return forward_shared_bytes(tiles, max_rows); });
}

int backward_tiles(int64_t element_bytes, int64_t max_rows, int64_t shared_bytes) {
  return most_tiles(element_bytes, {4}, tuning().most_backward_tiles, shared_bytes,
                    [=](int tiles) { return backward_shared_bytes(tiles, max_rows); });
}

bool slabs_fit(int64_t element_bytes, int64_t width, int64_t shared_bytes) {
  return tuning().slabs && width <= kMostSlabColumns &&
         slab_shared_bytes(static_cast<int>(width * element_bytes)) <= shared_bytes;
}

int blocks_beside(int resident, int multiprocessors, int spare) {
  const int each = (resident + multiprocessors - 1) / multiprocessors;
  return std::max(1, resident - each * std::min(spare, multiprocessors));
}

DecodeShape decode_shape(int64_t num_tokens, int64_t max_rows, int64_t d_emb, int resident) {
  const int64_t enough = int64_t{tuning().decode_turns} * resident;
  const int64_t blocks = std::max<int64_t>(1, (max_rows + kBlockRows - 1) / kBlockRows);
  DecodeShape shape;
  shape.slice_blocks = num_tokens * blocks <= enough ? 1 : 2;
  shape.slices = static_cast<int>((blocks + shape.slice_blocks - 1) / shape.slice_blocks);
  const int tiles = static_cast<int>(d_emb / kTileColumns);
  shape.tiles_per_unit = 1;
  while (shape.tiles_per_unit < tiles &&
         num_tokens * ((tiles + shape.tiles_per_unit - 1) / shape.tiles_per_unit) > enough) {
    shape.tiles_per_unit *= 2;
  }
  const int64_t groups = (tiles + shape.tiles_per_unit - 1) / shape.tiles_per_unit;
  shape.units = num_tokens * std::max<int64_t>(shape.slices, groups);
  return shape;
}

}  // namespace l3ext::cuda
