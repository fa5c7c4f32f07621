// What a thread asks memory for before it reads it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "attention/cpu/row_kernels.hpp"

namespace l3ext::cpu {

// From the first of some rows to behind the last, what lies between them included.
template <typename T>
MemoryRange range_of(const RowBlock<T>& rows, int64_t columns) {
  if (rows.count == 0) return {};
  const int64_t elements = (rows.count - 1) * rows.stride + columns;
  return {.begin = reinterpret_cast<const std::byte*>(rows.data),
          .bytes = elements * static_cast<int64_t>(sizeof(T))};
}

// Only the rows themselves.
template <typename T>
MemoryRange rows_of(const RowBlock<T>& rows, int64_t columns) {
  if (rows.stride == columns || rows.count <= 1) return range_of(rows, columns);
  constexpr auto kSize = static_cast<int64_t>(sizeof(T));
  return {.begin = reinterpret_cast<const std::byte*>(rows.data),
          .bytes = columns * kSize,
          .stride = rows.stride * kSize,
          .count = rows.count};
}

// A prefetch from a page that the translation buffers do not know lets nothing after it retire
// until the page table has been walked. Next to each other, several are walked at once: so pages
// are touched before lines are asked for one by one.
inline void touch_pages(const MemoryRange& range) {
  constexpr uintptr_t kPage = 4096;
  uintptr_t untouched = 0;  // where the page after the last one begins
  for (int64_t i = 0; i < range.count; ++i) {
    const std::byte* piece = range.begin + i * range.stride;
    const auto end = reinterpret_cast<uintptr_t>(piece) + static_cast<uintptr_t>(range.bytes);
    for (auto p = std::max(reinterpret_cast<uintptr_t>(piece), untouched); p < end; p = untouched) {
      __builtin_prefetch(piece + (p - reinterpret_cast<uintptr_t>(piece)), 0, 2);
      untouched = (p / kPage + 1) * kPage;
    }
  }
  __asm__ volatile("");  // GCC drops calls of a function that only prefetches
}

// Memory to be asked for, in the order in which it will be read.
class WishList {
 public:
  void add(const MemoryRange& range) {
    if (range.bytes > 0) ranges_.push_back(range);
  }

  void clear() { ranges_.clear(); }
  // Touches the pages of all.
  Wanted wanted() const {
    for (const MemoryRange& range : ranges_) touch_pages(range);
    return {ranges_.data(), ranges_.data() + ranges_.size()};
  }

 private:
  std::vector<MemoryRange> ranges_;
};

}  // namespace l3ext::cpu
