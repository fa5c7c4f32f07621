// The instruction sets that there are kernels for, which of them this machine runs, and which one
// the kernels use.
#pragma once

#include <array>

namespace l3ext {

// Each holds all before it. Baseline is what every processor of the architecture has: SSE2 on
// x86-64, NEON on aarch64.
enum class CpuIsa {
  kBaseline,
  kAvx2,        // AVX2, FMA, F16C
  kAvx512,      // F, BW, DQ, VL
  kAvx512Bf16,  // vdpbf16ps
  kAmx,         // AMX-TILE, AMX-BF16
};
inline constexpr std::array kCpuIsas = {CpuIsa::kBaseline, CpuIsa::kAvx2, CpuIsa::kAvx512,
                                        CpuIsa::kAvx512Bf16, CpuIsa::kAmx};

const char* cpu_isa_name(CpuIsa isa);

// Whether the processor has it, the OS saves its registers, and, of kAmx, the kernel lets this
// process use it: for that the first call asks, on behalf of all its threads.
bool cpu_runs(CpuIsa isa);

// The last of kCpuIsas that runs here.
CpuIsa best_cpu_isa();

// best_cpu_isa(), or the one that the environment variable L3EXT_CPU_ISA names; read once.
// Throws kValue for an unknown name, kRuntime for a set that does not run here.
CpuIsa active_cpu_isa();

}  // namespace l3ext
