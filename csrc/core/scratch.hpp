// Working memory of one thread, kept between calls: a fresh large allocation per call would cost
// a page fault per 4 KiB.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

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

// The calling thread's block, at least `bytes` long; valid until its next call in this thread.
inline std::byte* thread_scratch(size_t bytes) {
  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<std::byte, Free> block;
  thread_local size_t capacity = 0;
  if (bytes > capacity) {
    bytes = (bytes + 4095) / 4096 * 4096;
    block.reset();
    capacity = 0;
    block.reset(static_cast<std::byte*>(std::aligned_alloc(4096, bytes)));
    if (!block) throw std::bad_alloc();
    capacity = bytes;
  }
  return block.get();
}

}  // namespace l3ext
