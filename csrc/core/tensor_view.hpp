// A borrowed, typed, strided block of memory: what crosses from Python into the library.
#pragma once

#include <cstdint>
#include <string>

#include "core/dtype.hpp"
#include "core/error.hpp"

namespace l3ext {

// Where an array lies.
struct Place {
  enum class Kind : uint8_t { kHost, kCuda, kOther };  // pinned memory is the host's
  Kind kind = Kind::kHost;
  int index = 0;  // of the CUDA device

  bool on_host() const { return kind == Kind::kHost; }
  friend bool operator==(const Place&, const Place&) = default;
};

inline std::string place_name(const Place& place) {
  switch (place.kind) {
    case Place::Kind::kHost:
      return "in host memory";
    case Place::Kind::kCuda:
      return concat("on cuda:", place.index);
    case Place::Kind::kOther:
      return "on another kind of device";
  }
  return "unknown";
}

struct TensorView {
  static constexpr int kMaxDims = 4;

  void* data = nullptr;
  DType dtype = DType::kFloat32;
  Place place;
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
    if (numel() == 0) return true;  // whatever its strides say
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
