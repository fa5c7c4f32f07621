// A product of blocks with AMX: tdpbf16ps multiplies a tile of 16 x 32 by one of 32 x 16. Four
// tiles of sums, two of `a` and two of `b`: every loaded tile is used twice.
#define L3EXT_ISA amx
#include "attention/cpu/bf16_instructions.hpp"
#include "attention/cpu/row_kernels.hpp"

namespace l3ext::cpu::L3EXT_ISA {
namespace {

#include "attention/cpu/prefetches.inl"

constexpr int64_t kTile = 16;       // rows of a tile, and its float32 columns
constexpr int64_t kTileDepth = 32;  // bfloat16 columns of a tile

// One or two tiles of rows by one or two of columns.
template <bool kTall, bool kWide>
inline void multiply_tiles(const BFloat16* a, int64_t a_stride, int64_t rows,
                           const Prefetches& prefetches, int64_t first_row, const float* b,
                           int64_t b_stride, int64_t depth, bool add, float* sums,
                           int64_t sums_stride) {
  const int64_t a_bytes = a_stride * static_cast<int64_t>(sizeof(BFloat16));
  const int64_t b_bytes = b_stride * static_cast<int64_t>(sizeof(float));
  const int64_t sums_bytes = sums_stride * static_cast<int64_t>(sizeof(float));
  float* lower = sums + kTile * sums_stride;
  if (add) {
    load_tile<0>(sums, sums_bytes);
    if constexpr (kWide) load_tile<1>(sums + kTile, sums_bytes);
    if constexpr (kTall) load_tile<2>(lower, sums_bytes);
    if constexpr (kTall && kWide) load_tile<3>(lower + kTile, sums_bytes);
  } else {
    zero_tile<0>();
    if constexpr (kWide) zero_tile<1>();
    if constexpr (kTall) zero_tile<2>();
    if constexpr (kTall && kWide) zero_tile<3>();
  }
  for (int64_t k = 0; k < depth; k += kTileDepth) {
    const float* pairs = b + k / 2 * b_stride;
    load_tile<4>(a + k, a_bytes);
    load_tile<6>(pairs, b_bytes);
    add_tile_product<0, 4, 6>();
    if constexpr (kTall) {
      load_tile<5>(a + kTile * a_stride + k, a_bytes);
      add_tile_product<2, 5, 6>();
    }
    if constexpr (kWide) {
      load_tile<7>(pairs + kTile, b_bytes);
      add_tile_product<1, 4, 7>();
    }
    if constexpr (kTall && kWide) add_tile_product<3, 5, 7>();
    // The step used up a line of every row.
    prefetches.ask(first_row, rows, k);
  }
  store_tile<0>(sums, sums_bytes);
  if constexpr (kWide) store_tile<1>(sums + kTile, sums_bytes);
  if constexpr (kTall) store_tile<2>(lower, sums_bytes);
  if constexpr (kTall && kWide) store_tile<3>(lower + kTile, sums_bytes);
}

// See row_kernels_bf16.inl. Releases the thread's tiles in the end: else every later context switch
// would save their 8 KiB.
class BlockProduct {
 public:
  static constexpr int64_t kQueries = 16, kPairQueries = 8, kFewQueries = 8,
                           kDepthStep = kTileDepth, kFewRows = 8;

  BlockProduct() = default;
  BlockProduct(const BlockProduct&) = delete;
  BlockProduct& operator=(const BlockProduct&) = delete;
  ~BlockProduct() { release_tiles(); }

  void operator()(const BFloat16* a, int64_t a_stride, int64_t rows, const Prefetches& prefetches,
                  const float* b, int64_t b_stride, int64_t columns, int64_t depth, bool add,
                  float* sums, int64_t sums_stride) {
    for (int64_t r = 0; r < rows; r += 2 * kTile) {
      const int64_t count = rows - r < 2 * kTile ? rows - r : 2 * kTile;
      const bool tall = count > kTile, wide = columns > kTile;
      configure(tall ? kTile : count, tall ? count - kTile : kTile);
      const auto multiply =
          tall ? (wide ? multiply_tiles<true, true> : multiply_tiles<true, false>)
               : (wide ? multiply_tiles<false, true> : multiply_tiles<false, false>);
      multiply(a + r * a_stride, a_stride, count, prefetches, r, b, b_stride, depth, add,
               sums + r * sums_stride, sums_stride);
    }
  }

 private:
  // Rows of the upper tiles (sums 0 and 1, `a` 4) and the lower ones (sums 2 and 3, `a` 5). Only
  // these differ: rows past the last are neither read nor written.
  void configure(int64_t upper, int64_t lower) {
    if (upper == upper_ && lower == lower_) return;
    TileConfig config;
    for (int t = 0; t < 8; ++t) {
      config.row_bytes[t] = 64;
      config.rows[t] = kTile;
    }
    for (const int t : {0, 1, 4}) config.rows[t] = static_cast<uint8_t>(upper);
    for (const int t : {2, 3, 5}) config.rows[t] = static_cast<uint8_t>(lower);
    load_tile_config(config);
    upper_ = upper;
    lower_ = lower;
  }

  int64_t upper_ = 0;
  int64_t lower_ = 0;
};

}  // namespace
}  // namespace l3ext::cpu::L3EXT_ISA

#include "attention/cpu/row_kernels_bf16.inl"
