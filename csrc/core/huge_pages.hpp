// Large outputs come as fresh memory. Filling it costs a page fault, some 1 to 2 us on a virtual
// machine, for every 4 KiB: more than the work itself where little is computed for each page.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace l3ext {

// Asks for huge pages where the memory has no pages yet. Advice alone: what lies there stays, and
// where there are none to be had nothing happens.
inline void advise_huge_pages(void* data, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  // NOLINTNEXTLINE(performance-no-int-to-ptr): the first address of a page.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  static_cast<void>(data), static_cast<void>(bytes);
#endif
}

}  // namespace l3ext
