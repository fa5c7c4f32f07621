// Large outputs come as fresh memory. Filling it costs a page fault, some 1 to 2 us on a virtual
// machine, for every 4 KiB: more than the work itself where little is computed for each page.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

namespace l3ext {

inline constexpr size_t kHugePage = size_t{2} << 20;

// Asks for huge pages where the memory has no pages yet. Advice alone: what lies there stays, and
// where there are none to be had nothing happens.
inline void advise_huge_pages(void* data, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  // NOLINTNEXTLINE(performance-no-int-to-ptr): the first address of a page.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  static_cast<void>(data), static_cast<void>(bytes);
#endif
}

// Fresh zeros from the start of a huge page, in such pages where there are any, until munmap();
// null where there is no memory. `flags`: further ones of mmap().
inline std::byte* map_huge_pages(size_t nbytes, int flags = 0) noexcept {
  if (nbytes > SIZE_MAX / 2) return nullptr;
  void* mapped = ::mmap(nullptr, nbytes + kHugePage, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  auto* begin = static_cast<std::byte*>(mapped);
  const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(begin) % kHugePage) % kHugePage;
  if (before > 0) ::munmap(begin, before);
  ::munmap(begin + before + nbytes, kHugePage - before);
  advise_huge_pages(begin + before, nbytes);
  return begin + before;
}

}  // namespace l3ext
