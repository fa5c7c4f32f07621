// An array in the place of device memory for the emulation: reads and writes outside of it fault,
// or show in the bytes before the guard page, which stay all ones.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <vector>

#include "check.hpp"
#include "guarded_pages.hpp"

template <typename T>
class DeviceBuffer {
 public:
  // All ones: NaN, -1. The array ends at the guard page, up to `alignment` bytes.
  explicit DeviceBuffer(int64_t count, size_t alignment = 16)
      : pages_(static_cast<size_t>(count) * sizeof(T) + alignment), count_(count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    begin_ = pages_.end() - (bytes + alignment - 1) / alignment * alignment;
    poison();
  }
  DeviceBuffer(const std::vector<T>& values) : DeviceBuffer(static_cast<int64_t>(values.size())) {
    std::copy(values.begin(), values.end(), data());
  }
  ~DeviceBuffer() { EXPECT(nothing_written_outside()); }

  T* data() { return reinterpret_cast<T*>(begin_); }
  const T* data() const { return reinterpret_cast<const T*>(begin_); }
  int64_t size() const { return count_; }
  T& operator[](int64_t i) { return data()[i]; }
  const T& operator[](int64_t i) const { return data()[i]; }
  std::vector<T> values() const { return {data(), data() + count_}; }

  void poison() { std::memset(pages_.begin(), 0xff, pages_.bytes()); }
  bool nothing_written_outside() const {
    const auto is_poison = [](std::byte b) { return b == std::byte{0xff}; };
    const std::byte* end = begin_ + static_cast<size_t>(count_) * sizeof(T);
    return std::all_of(static_cast<const std::byte*>(pages_.begin()),
                       static_cast<const std::byte*>(begin_), is_poison) &&
           std::all_of(end, static_cast<const std::byte*>(pages_.end()), is_poison);
  }

 private:
  l3ext::cuda::emulated::GuardedPages pages_;
  int64_t count_;
  std::byte* begin_;
};
