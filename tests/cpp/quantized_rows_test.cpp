// The widening of 8-bit rows in every instruction set that this machine runs: each code, at any
// place of a vector and in a tail, and nothing beyond the row is read.
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

#include "attention/cpu/row_kernels.hpp"
#include "check.hpp"

using l3ext::CpuIsa;
using l3ext::Float8E4M3;

namespace {

std::vector<CpuIsa> isas() {
  std::vector<CpuIsa> known;
  for (const CpuIsa isa : l3ext::kCpuIsas) {
    if (l3ext::cpu_runs(isa)) known.push_back(isa);
  }
  return known;
}

// By the definition of e4m3fn.
float value_of(Float8E4M3 code) {
  const int exponent = code.bits >> 3 & 15, mantissa = code.bits & 7;
  if ((code.bits & 0x7f) == 0x7f) return NAN;
  const float magnitude = exponent == 0
                              ? std::ldexp(static_cast<float>(mantissa), -9)
                              : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
  return (code.bits & 0x80) != 0 ? -magnitude : magnitude;
}
float value_of(int8_t code) { return code; }

bool same(float got, float expected) {
  if (std::isnan(expected)) return std::isnan(got);
  return std::bit_cast<uint32_t>(got) == std::bit_cast<uint32_t>(expected);  // -0 is not 0
}

template <typename T>
void every_code_widens_exactly() {
  std::vector<T> codes(256);
  for (int i = 0; i < 256; ++i) {
    const auto bits = static_cast<uint8_t>(i);
    std::memcpy(&codes[i], &bits, 1);
  }
  for (const CpuIsa isa : isas()) {
    const auto& kernels = l3ext::cpu::row_kernels<T>(isa);
    for (int begin = 0; begin < 256; ++begin) {
      for (const int count : {1, 3, 4, 7, 8, 15, 16, 17, 33, 256}) {
        if (begin + count > 256) continue;
        // Exactly as large as needed: a sanitizer sees any over-read.
        const std::vector<T> row(codes.begin() + begin, codes.begin() + begin + count);
        std::vector<float> widened(count, 1e30f);
        kernels.load(row.data(), widened.data(), count);
        bool exact = true;
        for (int i = 0; i < count; ++i) exact = exact && same(widened[i], value_of(row[i]));
        EXPECT(exact);
      }
    }
  }
}

// Queries that pick one element, through the kernels for few queries and for many.
template <typename T>
void scores_and_sums_meet_exact_elements() {
  std::vector<T> row;
  for (int i = 0; i < 256; ++i) {
    const auto bits = static_cast<uint8_t>(i);
    T code;
    std::memcpy(&code, &bits, 1);
    if (!std::isnan(value_of(code))) row.push_back(code);
  }
  const auto depth = static_cast<int64_t>(row.size());
  for (const CpuIsa isa : isas()) {
    const auto& kernels = l3ext::cpu::row_kernels<T>(isa);
    for (const int64_t queries : {int64_t{1}, int64_t{2}, kernels.query_block}) {
      const int64_t padded = kernels.padded(queries);
      std::vector<float> x(queries * depth), scores(padded), out(queries * depth);
      std::vector<float> packed(kernels.packed_elements(queries, depth));
      bool exact = true;
      for (int64_t k = 0; k < depth; k += queries) {
        std::fill(x.begin(), x.end(), 0.0f);
        for (int64_t q = 0; q < queries && k + q < depth; ++q) x[q * depth + k + q] = 1;
        std::vector<const float*> addresses;
        for (int64_t q = 0; q < queries; ++q) addresses.push_back(x.data() + q * depth);
        kernels.pack(addresses.data(), queries, depth, packed.data());
        kernels.scores({row.data(), depth, 1}, packed.data(), queries, depth, 1.0f, {},
                       scores.data());
        for (int64_t q = 0; q < queries && k + q < depth; ++q) {
          exact = exact && scores[q] == value_of(row[k + q]);
        }
      }
      EXPECT(exact);
      const std::vector<float> weights(padded, 1.0f);
      kernels.accumulate({row.data(), depth, 1}, weights.data(), 1, padded, queries, depth, {},
                         true, out.data(), depth);
      for (int64_t i = 0; i < queries * depth; ++i) {
        exact = exact && out[i] == value_of(row[i % depth]);
      }
      EXPECT(exact);
    }
  }
}

// Scores over more elements than are summed across lanes at once match float64. A query's scores
// and sums have the same bits alone as among others, and a code that is no number is in its row's
// scores and in its column of the sums, and nowhere else.
template <typename T>
void long_rows_and_other_queries() {
  constexpr int64_t kRows = 7, kDepth = 1300, kNaNRow = 5;
  std::mt19937 random(1);
  std::vector<T> rows(kRows * kDepth);
  for (T& code : rows) {
    const auto bits = static_cast<uint8_t>(random() % 127 + (random() & 0x80));
    std::memcpy(&code, &bits, 1);
  }
  for (const CpuIsa isa : isas()) {
    const auto& kernels = l3ext::cpu::row_kernels<T>(isa);
    std::vector<float> x(kernels.query_block * kDepth);
    for (float& value : x) value = static_cast<float>(random() % 512) / 256 - 1;
    const auto run = [&](int64_t first, int64_t count) {
      std::vector<const float*> addresses;
      for (int64_t q = first; q < first + count; ++q) addresses.push_back(x.data() + q * kDepth);
      std::vector<float> packed(kernels.packed_elements(count, kDepth));
      std::vector<float> scores(kRows * kernels.padded(count)), sums(count * kDepth);
      const std::vector<float> weights(scores.size(), 0.75f);
      kernels.pack(addresses.data(), count, kDepth, packed.data());
      kernels.scores({rows.data(), kDepth, kRows}, packed.data(), count, kDepth, 0.5f, {},
                     scores.data());
      kernels.accumulate({rows.data(), kDepth, kRows}, weights.data(), 1, kernels.padded(count),
                         count, kDepth, {}, false, sums.data(), kDepth);
      return std::pair(scores, sums);
    };
    for (const int64_t bad : {int64_t{-1}, int64_t{0}, int64_t{20}, int64_t{1299}}) {
      if (bad >= 0 && !std::is_same_v<T, Float8E4M3>) continue;
      T kept{};
      if (bad >= 0) {
        kept = std::exchange(rows[kNaNRow * kDepth + bad], std::bit_cast<T>(uint8_t{0xff}));
      }
      const auto [scores, sums] = run(0, kernels.query_block);
      bool right = true;
      for (int64_t r = 0; r < kRows; ++r) {
        if (bad >= 0 && r == kNaNRow) continue;
        double sum = 0, magnitude = 0;
        for (int64_t k = 0; k < kDepth; ++k) {
          const double product = static_cast<double>(x[k]) * value_of(rows[r * kDepth + k]) / 2;
          sum += product;
          magnitude += std::abs(product);
        }
        const double got = scores[r * kernels.padded(kernels.query_block)];
        right = right && std::abs(got - sum) <= magnitude * kDepth * 0x1p-23;
      }
      for (const int64_t count : {int64_t{1}, int64_t{2}, int64_t{3}, int64_t{4}, int64_t{6},
                                  int64_t{13}, kernels.query_block}) {
        const int64_t first = kernels.query_block - count;
        const auto [some_scores, some_sums] = run(first, count);
        for (int64_t q = 0; q < count; ++q) {
          for (int64_t r = 0; r < kRows; ++r) {
            const float got = some_scores[r * kernels.padded(count) + q];
            right = right &&
                    same(got, scores[r * kernels.padded(kernels.query_block) + first + q]) &&
                    std::isnan(got) == (bad >= 0 && r == kNaNRow);
          }
          for (int64_t c = 0; c < kDepth; ++c) {
            const float got = some_sums[q * kDepth + c];
            right =
                right && same(got, sums[(first + q) * kDepth + c]) && std::isnan(got) == (c == bad);
          }
        }
      }
      EXPECT(right);
      if (bad >= 0) rows[kNaNRow * kDepth + bad] = kept;
    }
  }
}

}  // namespace

int main() {
  RUN(every_code_widens_exactly<Float8E4M3>);
  RUN(every_code_widens_exactly<int8_t>);
  RUN(scores_and_sums_meet_exact_elements<Float8E4M3>);
  RUN(scores_and_sums_meet_exact_elements<int8_t>);
  RUN(long_rows_and_other_queries<Float8E4M3>);
  RUN(long_rows_and_other_queries<int8_t>);
  return check::failures == 0 ? 0 : 1;
}
