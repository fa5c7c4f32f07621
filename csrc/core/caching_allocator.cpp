#include "core/caching_allocator.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <new>
#include <utility>

#include "core/error.hpp"
#include "core/huge_pages.hpp"

namespace l3ext {
namespace {

void unmap(std::byte* data, size_t nbytes) noexcept { ::munmap(data, nbytes); }

}  // namespace

CachingAllocator& CachingAllocator::of_process() {
  static auto* const allocator = new CachingAllocator;
  return *allocator;
}

CachingAllocator::Block CachingAllocator::allocate(size_t nbytes) {
  // Steps touch a few rows more or fewer than the one before.
  const size_t with_room = (nbytes + nbytes / 8 + kHugePage) / kHugePage * kHugePage;
  L3EXT_CHECK(with_room > nbytes && with_room < SIZE_MAX / 2, "nbytes: expected less, got ",
              nbytes);
  if (Block kept = kept_block(nbytes)) return kept;
  std::byte* data = map_huge_pages(with_room);
  if (data == nullptr) {
    release();
    data = map_huge_pages(with_room);
  }
  if (data == nullptr) {
    throw Error(ErrorCode::kRuntime,
                concat("the system has no ", nbytes, " bytes of memory for an output"));
  }
  return Block(data, {this, with_room});
}

// The smallest that is kept and large enough, unless most of it would go to waste; or null.
CachingAllocator::Block CachingAllocator::kept_block(size_t nbytes) {
  const std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock) return {};
  ++allocations_;
  std::erase_if(kept_, [&](const Kept& kept) {
    const bool old = allocations_ - kept.freed_at > kKeptFor;
    if (old) unmap(kept.data, kept.nbytes);
    return old;
  });
  auto best = kept_.end();
  for (auto kept = kept_.begin(); kept != kept_.end(); ++kept) {
    if (kept->nbytes < nbytes || kept->nbytes / 2 > std::max(nbytes, kHugePage)) continue;
    if (best == kept_.end() || kept->nbytes < best->nbytes) best = kept;
  }
  if (best == kept_.end()) return {};
  Block block(best->data, {this, best->nbytes});
  kept_.erase(best);
  return block;
}

void CachingAllocator::free(std::byte* data, size_t nbytes) noexcept {
#if defined(MADV_FREE)
  // The system may take these pages where it is short of memory, and the next owner gets zeros.
  ::madvise(data, nbytes, MADV_FREE);
#endif
  const std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock) return unmap(data, nbytes);
  try {
    kept_.push_back({data, nbytes, allocations_});
  } catch (const std::bad_alloc&) {
    unmap(data, nbytes);
  }
}

void CachingAllocator::release() noexcept {
  const std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock) return;
  for (const Kept& kept : std::exchange(kept_, {})) unmap(kept.data, kept.nbytes);
}

size_t CachingAllocator::kept_bytes() const {
  const std::scoped_lock lock(mutex_);
  size_t nbytes = 0;
  for (const Kept& kept : kept_) nbytes += kept.nbytes;
  return nbytes;
}

}  // namespace l3ext
