#include "lzw/pages.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

namespace l3ext::lzw {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

size_t whole_pages(size_t nbytes) { return (nbytes + kHugePage - 1) / kHugePage * kHugePage; }

// Address space that starts at a huge page: only such pages move as they are.
char* map_aligned(size_t nbytes) {
  if (nbytes > SIZE_MAX / 2) throw std::bad_alloc();
  void* map = ::mmap(nullptr, nbytes + kHugePage, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED) throw std::bad_alloc();
  auto* begin = static_cast<char*>(map);
  auto* aligned = begin + (kHugePage - reinterpret_cast<uintptr_t>(begin) % kHugePage) % kHugePage;
  if (aligned > begin) ::munmap(begin, static_cast<size_t>(aligned - begin));
  ::munmap(aligned + nbytes, kHugePage - static_cast<size_t>(aligned - begin));
  ::madvise(aligned, nbytes, MADV_HUGEPAGE);  // a wish: without huge pages it is only slower
  return aligned;
}

}  // namespace

Pages::~Pages() {
  if (mapped_) {
    ::munmap(data_, nbytes_);
  } else {
    std::free(data_);
  }
}

void Pages::grow(size_t nbytes) {
  if (nbytes <= nbytes_) return;
  if (nbytes < kHugePage) {
    constexpr size_t kLine = 64;
    nbytes = (nbytes + kLine - 1) / kLine * kLine;
    void* data = std::aligned_alloc(kLine, nbytes);
    if (data == nullptr) throw std::bad_alloc();
    if (nbytes_ > 0) std::memcpy(data, data_, nbytes_);
    std::memset(static_cast<char*>(data) + nbytes_, 0, nbytes - nbytes_);
    std::free(data_);
    data_ = data;
    nbytes_ = nbytes;
    return;
  }
  nbytes = whole_pages(nbytes);
  char* data = map_aligned(nbytes);
  if (mapped_) {
    void* moved = ::mremap(data_, nbytes_, nbytes, MREMAP_MAYMOVE | MREMAP_FIXED, data);
    // What was mapped at `data` may be gone already, and the place another thread's: left alone.
    if (moved == MAP_FAILED) throw std::bad_alloc();
  } else if (data_ != nullptr) {
    std::memcpy(data, data_, nbytes_);
    std::free(data_);
  }
  data_ = data;
  nbytes_ = nbytes;
  mapped_ = true;
}

void Pages::shrink(size_t nbytes) noexcept {
  if (mapped_) {
    const size_t keep = std::max(whole_pages(nbytes), kHugePage);
    if (keep < nbytes_) ::munmap(static_cast<char*>(data_) + keep, nbytes_ - keep);
    nbytes_ = std::min(nbytes_, keep);
  }
}

void Pages::release(size_t begin, size_t end) noexcept {
  begin = whole_pages(begin);
  end = end / kHugePage * kHugePage;
  if (mapped_ && begin < end) {
    ::madvise(static_cast<char*>(data_) + begin, end - begin, MADV_DONTNEED);
  }
}

void Pages::swap(Pages& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(nbytes_, other.nbytes_);
  std::swap(mapped_, other.mapped_);
}

}  // namespace l3ext::lzw
