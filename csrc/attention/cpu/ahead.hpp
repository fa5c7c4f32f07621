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
  return {reinterpret_cast<const std::byte*>(rows.data),
          reinterpret_cast<const std::byte*>(rows.row(rows.count - 1) + columns)};
}

// A prefetch from a page that the translation buffers do not know lets nothing after it retire
// until the page table has been walked. Next to each other, several are walked at once: so pages
// are touched before lines are asked for one by one.
inline void touch_pages(const MemoryRange& range) {
  constexpr uintptr_t kPage = 4096;
  for (const std::byte* p = range.begin; p < range.end;
       p += kPage - reinterpret_cast<uintptr_t>(p) % kPage) {
    __builtin_prefetch(p, 0, 2);
  }
  __asm__ volatile("");  // GCC drops calls of a function that only prefetches
}

// Memory to be asked for, in the order in which it will be read.
class WishList {
 public:
  void add(const MemoryRange& range) {
    if (range.begin != range.end) ranges_.push_back(range);
  }

  // Only the rows themselves, whatever lies between them.
  template <typename T>
  void add_rows(const RowBlock<T>& rows, int64_t columns) {
    if (rows.stride == columns) return add(range_of(rows, columns));
    for (int64_t r = 0; r < rows.count; ++r) add(range_of(rows.part(r, r + 1), columns));
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
