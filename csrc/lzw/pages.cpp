#include "lzw/pages.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "core/huge_pages.hpp"

namespace l3ext::lzw {
namespace {

size_t whole_pages(size_t nbytes) { return (nbytes + kHugePage - 1) / kHugePage * kHugePage; }

// Only pages that begin where huge ones do move as they are.
char* map_aligned(size_t nbytes) {
  std::byte* mapped = map_huge_pages(nbytes, MAP_NORESERVE);
  if (mapped == nullptr) throw std::bad_alloc();
  return reinterpret_cast<char*>(mapped);
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
