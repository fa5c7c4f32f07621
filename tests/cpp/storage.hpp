// Float64 into every storage type, rounded to nearest even, and back.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/dtype.hpp"

inline void assign(double& to, double value) { to = value; }
inline void assign(float& to, double value) { to = static_cast<float>(value); }
inline void assign(l3ext::BFloat16& to, double value) {
  const auto narrow = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &narrow, sizeof(bits));
  if (!std::isnan(value)) bits += 0x7fffu + ((bits >> 16) & 1u);
  to.bits = static_cast<uint16_t>(bits >> 16);
}
inline void assign(l3ext::Float16& to, double value) {
  const uint32_t sign = std::signbit(value) ? 0x8000u : 0u;
  if (std::isnan(value) || value == 0) {
    to.bits = static_cast<uint16_t>(sign | (value == 0 ? 0u : 0x7e00u));
    return;
  }
  int exponent = 0;
  std::frexp(value, &exponent);
  // Ten bits after the leading one, of which subnormals have fewer; a carry moves up the exponent.
  const int lowest = std::max(exponent, -13) - 11;
  const auto units = static_cast<uint32_t>(std::nearbyint(std::ldexp(std::abs(value), -lowest)));
  const uint32_t bits = std::min((static_cast<uint32_t>(lowest + 24) << 10) + units, 0x7c00u);
  to.bits = static_cast<uint16_t>(sign | bits);
}

inline double value_of(double stored) { return stored; }
inline double value_of(float stored) { return stored; }
inline double value_of(l3ext::BFloat16 stored) {
  const uint32_t bits = static_cast<uint32_t>(stored.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline double value_of(l3ext::Float16 stored) {
  const int exponent = (stored.bits >> 10) & 0x1f, fraction = stored.bits & 0x3ff;
  const double sign = stored.bits & 0x8000 ? -1 : 1;
  if (exponent == 31) return fraction != 0 ? std::nan("") : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(fraction, -24);
  return sign * std::ldexp(fraction + 1024, exponent - 25);
}
