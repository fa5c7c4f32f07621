// Memory with a page before and a page behind it that fault.
#pragma once

#include <sanitizer/asan_interface.h>
#include <sys/mman.h>

#include <cstddef>
#include <new>

namespace l3ext::cuda::emulated {

class GuardedPages {
 public:
  // Zeros; `bytes` rounded up to whole pages.
  explicit GuardedPages(size_t bytes) : bytes_((bytes + kPage - 1) / kPage * kPage) {
    // No promise of memory: most of a stack, and of a table that is large for its addresses, is
    // never touched.
    constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* pages = mmap(nullptr, bytes_ + 2 * kPage, PROT_NONE, kFlags, -1, 0);
    if (pages == MAP_FAILED) throw std::bad_alloc();
    begin_ = static_cast<std::byte*>(pages) + kPage;
    if (bytes_ != 0 && mprotect(begin_, bytes_, PROT_READ | PROT_WRITE) != 0) {
      throw std::bad_alloc();
    }
  }
  ~GuardedPages() {
    // A stack left half way: AddressSanitizer keeps its marks, even for what is mapped here next.
    ASAN_UNPOISON_MEMORY_REGION(begin_, bytes_);
    munmap(begin_ - kPage, bytes_ + 2 * kPage);
  }
  GuardedPages(const GuardedPages&) = delete;
  GuardedPages& operator=(const GuardedPages&) = delete;

  std::byte* begin() const { return begin_; }
  std::byte* end() const { return begin_ + bytes_; }
  size_t bytes() const { return bytes_; }

  static constexpr size_t kPage = 4096;

 private:
  size_t bytes_;
  std::byte* begin_;
};

}  // namespace l3ext::cuda::emulated
