// The DLPack caster: a function that takes `const TensorArg&` accepts any torch, NumPy or CuPy
// array. It borrows; it never converts or copies; what it cannot use it rejects by name.
#pragma once

#include <dlpack/dlpack.h>
#include <pybind11/pybind11.h>

#include <initializer_list>
#include <utility>

#include "core/tensor_view.hpp"

namespace l3ext::python {

class TensorArg {
 public:
  TensorArg() = default;
  TensorArg(TensorArg&& other) noexcept
      : view_(other.view_),
        managed_(std::exchange(other.managed_, nullptr)),
        versioned_(std::exchange(other.versioned_, nullptr)) {}
  TensorArg& operator=(TensorArg&& other) noexcept {
    std::swap(view_, other.view_);
    std::swap(managed_, other.managed_);
    std::swap(versioned_, other.versioned_);
    return *this;
  }
  ~TensorArg() {
    if (managed_ != nullptr && managed_->deleter != nullptr) managed_->deleter(managed_);
    if (versioned_ != nullptr && versioned_->deleter != nullptr) versioned_->deleter(versioned_);
  }

  // Throws kType where `object` is no array that the library can read.
  static TensorArg from_object(pybind11::handle object);

  const TensorView& view() const { return view_; }
  const TensorView* operator->() const { return &view_; }

 private:
  TensorView view_;
  DLManagedTensor* managed_ = nullptr;
  DLManagedTensorVersioned* versioned_ = nullptr;
};

// What every binding checks first; each throws with the argument's name.
// `shape`: one entry per dimension, -1 for any length.
void check_host(const TensorView& tensor, const char* argument);
void check_dtype(const TensorView& tensor, const char* argument, DType dtype);
void check_shape(const TensorView& tensor, const char* argument,
                 std::initializer_list<int64_t> shape);
void check_contiguous(const TensorView& tensor, const char* argument);
void check_writable(const TensorView& tensor, const char* argument);

}  // namespace l3ext::python

namespace pybind11::detail {

template <>
struct type_caster<l3ext::python::TensorArg> {
  PYBIND11_TYPE_CASTER(l3ext::python::TensorArg, const_name("Array"));
  bool load(handle source, bool) {
    value = l3ext::python::TensorArg::from_object(source);
    return true;
  }
};

}  // namespace pybind11::detail
