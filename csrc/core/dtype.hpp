// Element types, their storage classes, and dispatch from a run-time DType to a template.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>
#include <type_traits>

#include "core/error.hpp"

namespace l3ext {

enum class DType : uint8_t {
  kFloat64,
  kFloat32,
  kBFloat16,
  kFloat16,
  kFloat8E4M3,
  kInt64,
  kInt32,
  kInt8,
  kUInt8,
};

// Storage only: arithmetic happens in float or double.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
// Sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinity, and 0x7f and 0xff alone are NaN
// (the "fn" of torch's float8_e4m3fn): -448 to 448.
struct Float8E4M3 {
  uint8_t bits;
};

constexpr size_t dtype_bytes(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
    case DType::kInt64:
      return 8;
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    case DType::kBFloat16:
    case DType::kFloat16:
      return 2;
    case DType::kFloat8E4M3:
    case DType::kInt8:
    case DType::kUInt8:
      return 1;
  }
  return 0;
}

constexpr const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return "float64";
    case DType::kFloat32:
      return "float32";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat16:
      return "float16";
    case DType::kFloat8E4M3:
      return "float8_e4m3fn";
    case DType::kInt64:
      return "int64";
    case DType::kInt32:
      return "int32";
    case DType::kInt8:
      return "int8";
    case DType::kUInt8:
      return "uint8";
  }
  return "unknown";
}

// Whether rows are stored in 8 bits, each half times a float32 of its own.
constexpr bool is_quantized(DType dtype) {
  return dtype == DType::kFloat8E4M3 || dtype == DType::kInt8;
}

// The quantised dtype of this name, if there is one.
constexpr std::optional<DType> quantized_dtype(std::string_view name) {
  for (const DType dtype : {DType::kFloat8E4M3, DType::kInt8}) {
    if (name == dtype_name(dtype)) return dtype;
  }
  return std::nullopt;
}

template <typename T>
struct TypeTag {
  using type = T;
};

// What products and sums of T are computed in.
template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Calls f(TypeTag<T>{}) with the storage type of a floating-point dtype.
template <typename F>
decltype(auto) dispatch_float(DType dtype, const char* argument, F&& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(TypeTag<double>{});
    case DType::kFloat32:
      return f(TypeTag<float>{});
    case DType::kBFloat16:
      return f(TypeTag<BFloat16>{});
    case DType::kFloat16:
      return f(TypeTag<Float16>{});
    default:
      throw Error(ErrorCode::kType,
                  concat(argument, ": expected float64, float32, bfloat16 or float16, got ",
                         dtype_name(dtype)));
  }
}

// Calls f(TypeTag<T>{}) with the storage type of a quantised dtype.
template <typename F>
decltype(auto) dispatch_quantized(DType dtype, const char* argument, F&& f) {
  switch (dtype) {
    case DType::kFloat8E4M3:
      return f(TypeTag<Float8E4M3>{});
    case DType::kInt8:
      return f(TypeTag<int8_t>{});
    default:
      throw Error(ErrorCode::kType,
                  concat(argument, ": expected float8_e4m3fn or int8, got ", dtype_name(dtype)));
  }
}

// Calls f(TypeTag<T>{}) with int32_t or int64_t.
template <typename F>
decltype(auto) dispatch_integer(DType dtype, const char* argument, F&& f) {
  switch (dtype) {
    case DType::kInt64:
      return f(TypeTag<int64_t>{});
    case DType::kInt32:
      return f(TypeTag<int32_t>{});
    default:
      throw Error(ErrorCode::kType,
                  concat(argument, ": expected int64 or int32, got ", dtype_name(dtype)));
  }
}

}  // namespace l3ext
