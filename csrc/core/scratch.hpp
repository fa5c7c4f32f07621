// Working memory of one thread, kept between calls: a fresh large allocation per call would cost
// a page fault per 4 KiB.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "core/huge_pages.hpp"

namespace l3ext {

// Carves aligned arrays out of one block. Sizes come from the same code that carves: run it once
// in counting mode (no block), then again over a block of bytes() bytes.
class Carver {
 public:
  explicit Carver(std::byte* block = nullptr) : block_(block) {}

  template <typename T>
  T* take(int64_t count) {
    T* array = block_ == nullptr ? nullptr : reinterpret_cast<T*>(block_ + used_);
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return array;
  }
  size_t bytes() const { return used_; }

  static constexpr size_t kAlignment = 64;

 private:
  std::byte* block_;
  size_t used_ = 0;
};

// A block that grows and is kept; what it held is lost when it grows.
class Scratch {
 public:
  // At least `bytes` long; valid until the next call.
  std::byte* get(size_t bytes) {
    if (bytes > capacity_) {
      bytes = (bytes + 4095) / 4096 * 4096;
      release();
      block_.reset(static_cast<std::byte*>(std::aligned_alloc(4096, bytes)));
      if (!block_) throw std::bad_alloc();
      capacity_ = bytes;
      advise_huge_pages(block_.get(), bytes);
    }
    return block_.get();
  }
  void release() {
    block_.reset();
    capacity_ = 0;
  }

 private:
  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };
  std::unique_ptr<std::byte, Free> block_;
  size_t capacity_ = 0;
};

// The calling thread's block, valid until its next call in this thread.
inline std::byte* thread_scratch(size_t bytes) {
  thread_local Scratch scratch;
  return scratch.get(bytes);
}

}  // namespace l3ext
