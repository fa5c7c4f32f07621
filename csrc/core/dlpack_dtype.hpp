// Element types as DLPack names them.
#pragma once

#include <cstdint>

#include "core/dtype.hpp"
#include "dlpack/dlpack.h"

namespace l3ext {

inline DLDataType dlpack_dtype(DType dtype) {
  const auto bits = static_cast<uint8_t>(8 * dtype_bytes(dtype));
  switch (dtype) {
    case DType::kFloat64:
    case DType::kFloat32:
    case DType::kFloat16:
      return {kDLFloat, bits, 1};
    case DType::kBFloat16:
      return {kDLBfloat, bits, 1};
    case DType::kFloat8E4M3:
      return {kDLFloat8_e4m3fn, bits, 1};
    case DType::kInt64:
    case DType::kInt32:
    case DType::kInt8:
      return {kDLInt, bits, 1};
    case DType::kUInt8:
      return {kDLUInt, bits, 1};
  }
  return {};
}

}  // namespace l3ext
