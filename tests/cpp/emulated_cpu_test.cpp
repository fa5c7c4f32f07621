// The software AVX512-BF16 and AMX: the manual's arithmetic, and an error where a processor faults.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#define L3EXT_ISA emulated_test
#include "attention/cpu/bf16_instructions.hpp"
#include "attention/cpu/row_kernels.hpp"
#include "check.hpp"
#include "core/cpu_features.hpp"

using l3ext::Error;
using l3ext::cpu::TileConfig;
using namespace l3ext::cpu::emulated_test;

namespace {

uint16_t bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return static_cast<uint16_t>(bits >> 16);
}

__m512i pairs(float low, float high) {
  return _mm512_set1_epi32(static_cast<int>(bf16(high)) << 16 | bf16(low));
}

float dot(float sum, float low_a, float high_a, float low_b, float high_b) {
  return add_dot_of_pairs(_mm512_set1_ps(sum), pairs(low_a, high_a), pairs(low_b, high_b))[5];
}

uint16_t rounded(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  alignas(32) uint16_t lanes[16];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), round_to_bf16(_mm512_set1_ps(value)));
  return lanes[3];
}

void pairs_are_multiplied_odd_first_and_every_step_rounds() {
  EXPECT(dot(1, 2, 3, 5, 7) == 1 + 2 * 5 + 3 * 7);
  // 2^24 + 1 rounds to 2^24: after the odd product of 2^24, the even one of 1 is lost.
  EXPECT(dot(0, 1, 0x1p12f, 1, 0x1p12f) == 0x1p24f);
  EXPECT(dot(-0x1p24f, 1, 0x1p12f, 1, 0x1p12f) == 1);
  EXPECT(dot(-0x1p24f, 0x1p12f, 1, 0x1p12f, 1) == 1);
  // -2^25 + 1 rounds to -2^25; the other order would give 1.
  EXPECT(dot(-0x1p25f, 0x1p13f, 1, 0x1p12f, 1) == 0);
  EXPECT(std::isnan(dot(0, 0, std::numeric_limits<float>::infinity(), 1, 0)));
}

void subnormals_are_zeros() {
  constexpr float kSubnormal = 0x1p-127f, kSmallest = 0x1p-126f;
  EXPECT(dot(0, kSubnormal, 0, 0x1p100f, 0) == 0);  // an operand
  EXPECT(dot(kSubnormal, 0, 0, 0, 0) == 0);         // a sum
  EXPECT(dot(0, kSmallest, 0, 0.5f, 0) == 0);       // a result
  EXPECT(dot(0, kSmallest, 0, 1, 0) == kSmallest);
  EXPECT(rounded(0x80000001u) == 0x8000u);
}

void rounding_is_to_nearest_even() {
  EXPECT(rounded(0x3f808000u) == 0x3f80u);  // a tie, even below
  EXPECT(rounded(0x3f818000u) == 0x3f82u);  // a tie, even above
  EXPECT(rounded(0x3f808001u) == 0x3f81u);
  EXPECT(rounded(0x7f7fffffu) == 0x7f80u);  // the largest float becomes infinity
  EXPECT(rounded(0x7f800001u) == 0x7fc0u);  // a NaN stays one, quiet
}

TileConfig config(int sums_rows, int a_rows, int b_rows, int sums_bytes, int a_bytes, int b_bytes) {
  TileConfig config;
  const int rows[] = {sums_rows, a_rows, b_rows}, bytes[] = {sums_bytes, a_bytes, b_bytes};
  for (int t = 0; t < 3; ++t) {
    config.rows[t] = static_cast<uint8_t>(rows[t]);
    config.row_bytes[t] = static_cast<uint16_t>(bytes[t]);
  }
  return config;
}

void a_product_of_tiles_is_that_of_matrices() {
  // 3 x 4 by 4 x 2, exact.
  uint16_t a[3][4], b[2][4];
  float sums[3][2], want[3][2];
  for (int m = 0; m < 3; ++m) {
    for (int n = 0; n < 2; ++n) sums[m][n] = want[m][n] = static_cast<float>(m - n);
  }
  for (int k = 0; k < 4; ++k) {
    for (int m = 0; m < 3; ++m) a[m][k] = bf16(static_cast<float>(m + 3 * k));
    for (int n = 0; n < 2; ++n) b[k / 2][2 * n + k % 2] = bf16(static_cast<float>(k - 5 * n));
    for (int m = 0; m < 3; ++m) {
      for (int n = 0; n < 2; ++n) want[m][n] += static_cast<float>((m + 3 * k) * (k - 5 * n));
    }
  }
  load_tile_config(config(3, 3, 2, 8, 8, 8));
  load_tile<0>(sums, 8), load_tile<1>(a, 8), load_tile<2>(b, 8);
  add_tile_product<0, 1, 2>();
  store_tile<0>(sums, 8);
  release_tiles();
  EXPECT(std::memcmp(sums, want, sizeof(sums)) == 0);
}

void what_faults_on_a_processor_is_an_error() {
  float memory[256] = {};
  const auto refused = [](const TileConfig& config, const char* part) {
    const std::string message = EXPECT_THROWS(Error, load_tile_config(config));
    EXPECT(message.find(part) != std::string::npos);
  };
  EXPECT_THROWS(Error, load_tile<0>(memory, 64));
  EXPECT_THROWS(Error, zero_tile<0>());
  refused(config(17, 1, 1, 4, 4, 4), "tile 0 of 17 rows");
  refused(config(1, 1, 1, 4, 68, 4), "tile 1 of 1 rows of 68 bytes");
  refused(config(1, 1, 1, 4, 4, 0), "tile 2 of 1 rows of 0 bytes");
  TileConfig other = config(1, 1, 1, 4, 4, 4);
  other.palette = 2;
  refused(other, "palette 2");

  load_tile_config(config(2, 2, 1, 4, 8, 4));  // `a` is two pairs deep, `b` one
  const std::string message = EXPECT_THROWS(Error, (add_tile_product<0, 1, 2>()));
  EXPECT(message.find("tdpbf16ps") != std::string::npos);
  EXPECT_THROWS(Error, load_tile<3>(memory, 64));
  release_tiles();
  EXPECT_THROWS(Error, store_tile<0>(memory, 64));
}

void kernels_leave_no_tiles_behind() {
  const auto& kernels = l3ext::cpu::row_kernels<l3ext::BFloat16>(l3ext::CpuIsa::kAmx);
  constexpr int64_t kCount = 32;  // of rows, queries and columns
  const std::vector<l3ext::BFloat16> rows(kCount * kCount, {bf16(1)});
  const std::vector<float> weights(kCount * kCount, 1);
  std::vector<const l3ext::BFloat16*> x;
  for (int64_t q = 0; q < kCount; ++q) x.push_back(rows.data() + q * kCount);
  std::vector<float> packed(kernels.packed_elements(kCount, kCount)), scores(kCount * kCount);
  std::vector<float> sums(kCount * kCount);
  const l3ext::cpu::RowBlock<l3ext::BFloat16> block = {rows.data(), kCount, kCount};
  kernels.pack(x.data(), kCount, kCount, packed.data());
  kernels.scores(block, packed.data(), kCount, kCount, 1, {}, scores.data());
  EXPECT(scores[7] == 32);
  EXPECT_THROWS(Error, zero_tile<0>());
  kernels.accumulate(block, weights.data(), kCount, 1, kCount, kCount, {}, true, sums.data(),
                     kCount);
  EXPECT(sums[7] == 32);
  EXPECT_THROWS(Error, zero_tile<0>());
}

}  // namespace

int main() {
  if (!l3ext::cpu_runs(l3ext::CpuIsa::kAvx512)) return 77;
  RUN(pairs_are_multiplied_odd_first_and_every_step_rounds);
  RUN(subnormals_are_zeros);
  RUN(rounding_is_to_nearest_even);
  RUN(a_product_of_tiles_is_that_of_matrices);
  RUN(kernels_leave_no_tiles_behind);
  RUN(what_faults_on_a_processor_is_an_error);
  return check::failures == 0 ? 0 : 1;
}
