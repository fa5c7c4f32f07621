// The widening of 8-bit rows in every instruction set that this machine runs: each code, at any
// place of a vector and in a tail, and nothing beyond the row is read.
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
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

}  // namespace

int main() {
  RUN(every_code_widens_exactly<Float8E4M3>);
  RUN(every_code_widens_exactly<int8_t>);
  RUN(scores_and_sums_meet_exact_elements<Float8E4M3>);
  RUN(scores_and_sums_meet_exact_elements<int8_t>);
  return check::failures == 0 ? 0 : 1;
}
