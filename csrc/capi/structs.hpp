// Structs that cross the edge begin with the size that the caller's header gave them. What both
// sides know is copied; the rest stays at its default, or must be, or becomes, zero.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include "core/error.hpp"
#include "l3ext/l3ext.h"

namespace l3ext::capi {

// Where a handle goes: null until there is one.
template <typename Handle>
void clear_result(Handle** result, const char* argument) {
  L3EXT_CHECK(result != nullptr, argument, ": expected an address for the result, got null");
  *result = nullptr;
}

inline const char* check_string(const char* text, const char* argument) {
  L3EXT_CHECK(text != nullptr, argument, ": expected a string, got null");
  return text;
}

// Elements of so many bytes are read there.
inline void check_aligned(const void* data, size_t bytes, const std::string& argument) {
  L3EXT_CHECK(std::bit_cast<uintptr_t>(data) % bytes == 0, argument,
              ": expected an address that is a multiple of ", bytes, ", got ", data);
}

// Every field is eight bytes: there is no padding, and no size can end inside a field.
inline constexpr size_t kFieldBytes = 8;
inline constexpr size_t kMaxStructBytes = 4096;  // beyond: a size that nobody set

inline void check_struct_size(size_t size, const char* argument) {
  L3EXT_CHECK(size >= kFieldBytes && size <= kMaxStructBytes && size % kFieldBytes == 0, argument,
              ".struct_size: expected the struct's size, a multiple of ", kFieldBytes, " up to ",
              kMaxStructBytes, ", got ", size);
}

// What the caller gave, over `defaults`.
template <typename Struct>
Struct read_struct(const Struct* given, const char* argument, Struct defaults = {}) {
  static_assert(std::is_trivially_copyable_v<Struct> && sizeof(Struct) % kFieldBytes == 0);
  L3EXT_CHECK(given != nullptr, argument, ": expected a struct, got null");
  const size_t size = given->struct_size;
  check_struct_size(size, argument);
  std::memcpy(&defaults, given, std::min(size, sizeof(Struct)));
  const auto* bytes = reinterpret_cast<const std::byte*>(given);
  for (size_t i = sizeof(Struct); i < size; ++i) {
    L3EXT_CHECK(bytes[i] == std::byte{0}, argument, ": expected 0 in what this library, of ABI ",
                L3EXT_ABI_VERSION, ", does not know of the struct, got ",
                static_cast<int>(bytes[i]), " at byte ", i, " of ", size);
  }
  return defaults;
}

// The size of a struct for results, checked before the work is done.
template <typename Struct>
size_t result_size(const Struct* result, const char* argument) {
  L3EXT_CHECK(result != nullptr, argument, ": expected a struct for the result, got null");
  check_struct_size(result->struct_size, argument);
  return result->struct_size;
}

template <typename Struct>
void write_struct(Struct value, Struct* result, size_t size) {
  static_assert(std::is_trivially_copyable_v<Struct> && sizeof(Struct) % kFieldBytes == 0);
  value.struct_size = size;
  const size_t known = std::min(size, sizeof(Struct));
  std::memcpy(result, &value, known);
  std::memset(reinterpret_cast<std::byte*>(result) + known, 0, size - known);
}

}  // namespace l3ext::capi
