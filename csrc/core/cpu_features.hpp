// What this processor can run, read once from cpuid and XGETBV (the OS must save the registers).
#pragma once

#include <string>

namespace l3ext {

enum class CpuIsa { kBaseline, kAvx2, kAvx512 };

const char* cpu_isa_name(CpuIsa isa);

// The best instruction set that this machine supports and this library holds kernels for.
CpuIsa best_cpu_isa();

// best_cpu_isa(), or what L3EXT_CPU_ISA ("baseline", "avx2", "avx512") forces; read once.
// Throws kValue for an unknown name, kRuntime for a set this processor lacks.
CpuIsa active_cpu_isa();

struct CpuFeatures {
  bool avx2 = false;    // AVX2, FMA and F16C
  bool avx512 = false;  // F, BW, DQ, VL
  bool avx512_bf16 = false;
  bool amx_bf16 = false;
};
CpuFeatures cpu_features();

}  // namespace l3ext
