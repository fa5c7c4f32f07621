// A growing array of plain values. std::vector would hold the old and the new block at once while
// it grows; realloc moves the pages of a large block instead of copying them, so a dictionary of
// gigabytes grows within the memory that it ends up with, and a failed growth leaves it as it was.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>
#include <type_traits>
#include <utility>

namespace l3ext::lzw {

template <typename T>
class FlatArray {
  static_assert(std::is_trivially_copyable_v<T>, "realloc moves the bytes");

 public:
  FlatArray() = default;
  FlatArray(FlatArray&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)),
        size_(std::exchange(other.size_, 0)),
        capacity_(std::exchange(other.capacity_, 0)) {}
  FlatArray& operator=(FlatArray&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(capacity_, other.capacity_);
    return *this;
  }
  ~FlatArray() { std::free(data_); }

  T* data() { return data_; }
  const T* data() const { return data_; }
  size_t size() const { return size_; }
  // Bytes in use; what growth reserved beyond them is address space, not memory, until it is
  // written.
  size_t nbytes() const { return size_ * sizeof(T); }
  T& operator[](size_t i) { return data_[i]; }
  const T& operator[](size_t i) const { return data_[i]; }
  T& back() { return data_[size_ - 1]; }

  void push_back(T value) {
    if (size_ == capacity_) [[unlikely]]
      reallocate(capacity_ < 64 ? 64 : capacity_ / 2 * 3);
    data_[size_++] = value;
  }
  void pop_back() { --size_; }
  // New elements hold no value yet. Throws std::bad_alloc; the array is then as it was.
  void resize(size_t size) {
    if (size > capacity_) reallocate(size);
    size_ = size;
  }
  // Drops the tail and gives its memory back.
  void truncate(size_t size) noexcept {
    size_ = size;
    if (void* block = std::realloc(data_, (size > 0 ? size : 1) * sizeof(T))) {
      data_ = static_cast<T*>(block);
      capacity_ = size;
    }
  }

 private:
  void reallocate(size_t capacity) {
    if (capacity > static_cast<size_t>(-1) / 2 / sizeof(T)) throw std::bad_alloc();
    void* block = std::realloc(data_, capacity * sizeof(T));
    if (block == nullptr) throw std::bad_alloc();
    data_ = static_cast<T*>(block);
    capacity_ = capacity;
  }

  T* data_ = nullptr;
  size_t size_ = 0;
  size_t capacity_ = 0;
};

}  // namespace l3ext::lzw
