// A borrowed, typed, strided block of memory: what crosses from Python into the library.
#pragma once

#include <cstdint>

#include "core/dtype.hpp"
#include "core/error.hpp"

namespace l3ext {

struct TensorView {
  static constexpr int kMaxDims = 4;

  void* data = nullptr;
  DType dtype = DType::kFloat32;
  bool on_host = true;
  bool read_only = false;
  int ndim = 0;
  int64_t shape[kMaxDims] = {};
  int64_t strides[kMaxDims] = {};  // in elements

  int64_t numel() const {
    int64_t count = 1;
    for (int i = 0; i < ndim; ++i) count *= shape[i];
    return count;
  }
  bool contiguous() const {
    if (numel() == 0) return true;  // whatever the strides say
    int64_t expected = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      if (shape[i] != 1 && strides[i] != expected) return false;
      expected *= shape[i];
    }
    return true;
  }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

}  // namespace l3ext
