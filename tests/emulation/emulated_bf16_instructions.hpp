// AVX512-BF16 and AMX-BF16 in software, as their manual defines them: every step of a sum is fused,
// rounds to nearest even, and takes subnormals for zeros, operands and results. What a processor
// answers with a fault is an l3ext::Error; memory beside a tile's rows is not touched.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/error.hpp"

namespace l3ext::cpu::emulated {

inline float flushed(float value) {
  return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0f, value) : value;
}
inline float widened(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return flushed(value);
}
inline float add_product(float sum, uint16_t a, uint16_t b) {
  return flushed(std::fma(widened(a), widened(b), flushed(sum)));
}

struct Tile {
  int rows = 0;
  int row_bytes = 0;
  std::array<std::array<std::byte, 64>, 16> data;

  template <typename T>
  T at(int row, int column) const {
    T value;
    std::memcpy(&value, &data[row][column * sizeof(T)], sizeof(T));
    return value;
  }
};

// The tiles of this thread; none before a configuration and after a release.
struct Tiles {
  bool configured = false;
  std::array<Tile, 8> tiles;

  Tile& used(int t) {
    if (!configured || tiles[t].rows == 0) {
      throw Error(ErrorCode::kRuntime, concat("AMX: tile ", t, " is used and not configured"));
    }
    return tiles[t];
  }
};
inline thread_local Tiles tiles_of_thread;

inline void configure(const TileConfig& config) {
  const auto fault = [](const auto&... what) {
    throw Error(ErrorCode::kRuntime, concat("AMX: ldtilecfg: ", what...));
  };
  if (config.palette != 1) fault("palette ", static_cast<int>(config.palette));
  for (const uint8_t byte : config.reserved) {
    if (byte != 0) fault("reserved bytes that are not zero");
  }
  for (int t = 0; t < 16; ++t) {
    const int rows = config.rows[t], row_bytes = config.row_bytes[t];
    if (rows > 16 || row_bytes > 64 || (rows == 0) != (row_bytes == 0) || (t >= 8 && rows != 0)) {
      fault("tile ", t, " of ", rows, " rows of ", row_bytes, " bytes");
    }
    if (t < 8) tiles_of_thread.tiles[t] = {rows, row_bytes, {}};
  }
  tiles_of_thread.configured = true;
}

inline void multiply(Tile& sums, const Tile& a, const Tile& b) {
  if (sums.rows != a.rows || sums.row_bytes != b.row_bytes || a.row_bytes != 4 * b.rows) {
    throw Error(ErrorCode::kRuntime,
                concat("AMX: tdpbf16ps: ", sums.rows, " x ", sums.row_bytes, " bytes from ", a.rows,
                       " x ", a.row_bytes, " and ", b.rows, " x ", b.row_bytes));
  }
  for (int m = 0; m < a.rows; ++m) {
    for (int n = 0; n < sums.row_bytes / 4; ++n) {
      float even = 0, odd = 0;
      for (int k = 0; k < b.rows; ++k) {
        even = add_product(even, a.at<uint16_t>(m, 2 * k), b.at<uint16_t>(k, 2 * n));
        odd = add_product(odd, a.at<uint16_t>(m, 2 * k + 1), b.at<uint16_t>(k, 2 * n + 1));
      }
      const float sum = flushed(flushed(sums.at<float>(m, n)) + flushed(even + odd));
      std::memcpy(&sums.data[m][n * sizeof(float)], &sum, sizeof(sum));
    }
  }
}

}  // namespace l3ext::cpu::emulated

namespace l3ext::cpu::L3EXT_ISA {
namespace {

// Lane by lane: of every pair the odd product first.
inline __m512 add_dot_of_pairs(__m512 sums, __m512i a, __m512i b) {
  float sum[16];
  uint16_t left[32], right[32];
  _mm512_storeu_ps(sum, sums);
  _mm512_storeu_si512(left, a);
  _mm512_storeu_si512(right, b);
  for (int i = 0; i < 16; ++i) {
    sum[i] = emulated::add_product(sum[i], left[2 * i + 1], right[2 * i + 1]);
    sum[i] = emulated::add_product(sum[i], left[2 * i], right[2 * i]);
  }
  return _mm512_loadu_ps(sum);
}

inline __m256i round_to_bf16(__m512 values) {
  uint32_t bits[16];
  uint16_t rounded[16];
  _mm512_storeu_ps(bits, values);
  for (int i = 0; i < 16; ++i) {
    const uint32_t exponent = bits[i] & 0x7f800000u;
    const bool is_nan = (bits[i] & 0x7fffffffu) > 0x7f800000u;
    uint32_t upper = (bits[i] + 0x7fffu + ((bits[i] >> 16) & 1u)) >> 16;
    if (exponent == 0) upper = (bits[i] >> 16) & 0x8000u;
    if (is_nan) upper = (bits[i] >> 16) | 0x40u;
    rounded[i] = static_cast<uint16_t>(upper);
  }
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rounded));
}

[[maybe_unused]] inline void load_tile_config(const TileConfig& config) {
  emulated::configure(config);
}
[[maybe_unused]] inline void release_tiles() { emulated::tiles_of_thread = {}; }

template <int kTile>
inline void zero_tile() {
  emulated::tiles_of_thread.used(kTile).data = {};
}
template <int kTile>
inline void load_tile(const void* from, int64_t stride) {
  emulated::Tile& tile = emulated::tiles_of_thread.used(kTile);
  for (int r = 0; r < tile.rows; ++r) {
    std::memcpy(tile.data[r].data(), static_cast<const std::byte*>(from) + r * stride,
                tile.row_bytes);
  }
}
template <int kTile>
inline void store_tile(void* to, int64_t stride) {
  const emulated::Tile& tile = emulated::tiles_of_thread.used(kTile);
  for (int r = 0; r < tile.rows; ++r) {
    std::memcpy(static_cast<std::byte*>(to) + r * stride, tile.data[r].data(), tile.row_bytes);
  }
}
template <int kSums, int kA, int kB>
inline void add_tile_product() {
  emulated::Tiles& tiles = emulated::tiles_of_thread;
  emulated::multiply(tiles.used(kSums), tiles.used(kA), tiles.used(kB));
}

}  // namespace
}  // namespace l3ext::cpu::L3EXT_ISA
