#include "attention/cpu/row_kernels.hpp"

#include <type_traits>

namespace l3ext::cpu {

// One definition per translation unit row_kernels_<isa>.cpp.
namespace baseline {
template <typename T>
const RowKernels<T>& table();
}
#if defined(__x86_64__)
namespace avx2 {
template <typename T>
const RowKernels<T>& table();
}
namespace avx512 {
template <typename T>
const RowKernels<T>& table();
}
// Products of bfloat16 alone; all else is that of avx512.
namespace avx512_bf16 {
const RowKernels<BFloat16>& table();
}
namespace amx {
const RowKernels<BFloat16>& table();
}
#endif

template <typename T>
const RowKernels<T>& row_kernels(CpuIsa isa) {
#if defined(__x86_64__)
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (isa == CpuIsa::kAmx) return amx::table();
    if (isa == CpuIsa::kAvx512Bf16) return avx512_bf16::table();
  }
  if (isa >= CpuIsa::kAvx512) return avx512::table<T>();
  if (isa == CpuIsa::kAvx2) return avx2::table<T>();
#endif
  static_cast<void>(isa);
  return baseline::table<T>();
}

template const RowKernels<double>& row_kernels(CpuIsa);
template const RowKernels<float>& row_kernels(CpuIsa);
template const RowKernels<BFloat16>& row_kernels(CpuIsa);
template const RowKernels<Float16>& row_kernels(CpuIsa);
template const RowKernels<Float8E4M3>& row_kernels(CpuIsa);
template const RowKernels<int8_t>& row_kernels(CpuIsa);

}  // namespace l3ext::cpu
