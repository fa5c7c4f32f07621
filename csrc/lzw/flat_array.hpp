// A growing array of plain values. std::vector would hold the old and the new block at once while
// it grows; the system moves the pages of a large block instead of copying them, so a dictionary of
// gigabytes grows within the memory that it ends up with, and a failed growth leaves it as it was.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>
#include <type_traits>
#include <utility>

#include "lzw/pages.hpp"

namespace l3ext::lzw {

template <typename T>
class FlatArray {
  static_assert(std::is_trivially_copyable_v<T>, "the bytes move");

 public:
  FlatArray() = default;
  FlatArray(FlatArray&& other) noexcept
      : pages_(std::move(other.pages_)), size_(std::exchange(other.size_, 0)) {}
  FlatArray& operator=(FlatArray&& other) noexcept {
    std::swap(pages_, other.pages_);
    std::swap(size_, other.size_);
    return *this;
  }

  T* data() { return static_cast<T*>(pages_.data()); }
  const T* data() const { return static_cast<const T*>(pages_.data()); }
  size_t size() const { return size_; }
  // Bytes in use; what growth reserved beyond them is address space, not memory, until it is
  // written, but for the rest of a page.
  size_t nbytes() const { return size_ * sizeof(T); }
  T& operator[](size_t i) { return data()[i]; }
  const T& operator[](size_t i) const { return data()[i]; }
  T& back() { return data()[size_ - 1]; }

  void push_back(T value) {
    if ((size_ + 1) * sizeof(T) > pages_.nbytes()) [[unlikely]]
      reserve(size_ / 2 * 3 + 64);
    data()[size_++] = value;
  }
  void pop_back() { --size_; }
  // New elements of a new array are zeros; of others they hold no value yet. Throws std::bad_alloc;
  // the array is then as it was.
  void resize(size_t size) {
    if (size * sizeof(T) > pages_.nbytes()) reserve(std::max(size, size_ / 2 * 3));
    size_ = size;
  }
  // Drops the tail and gives its memory back.
  void truncate(size_t size) noexcept {
    size_ = size;
    pages_.shrink(nbytes());
  }

  // Elements [begin .. end) are not needed any more: gives memory that is all theirs back. They may
  // be zeros then.
  void release(size_t begin, size_t end) noexcept {
    pages_.release(begin * sizeof(T), end * sizeof(T));
  }

 private:
  void reserve(size_t size) {
    if (size > SIZE_MAX / 2 / sizeof(T)) throw std::bad_alloc();
    pages_.grow(size * sizeof(T));
  }

  Pages pages_;
  size_t size_ = 0;
};

}  // namespace l3ext::lzw
