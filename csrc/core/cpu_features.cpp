#include "core/cpu_features.hpp"

#include <cstdint>
#include <cstdlib>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "core/error.hpp"

namespace l3ext {
namespace {

#if defined(__x86_64__)
uint64_t read_xcr0() {
  uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

CpuFeatures detect() {
  CpuFeatures features;
  uint32_t a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return features;
  const bool osxsave = c & bit_OSXSAVE;
  const bool fma = c & bit_FMA;
  const bool f16c = c & bit_F16C;
  if (!osxsave) return features;
  const uint64_t xcr0 = read_xcr0();
  const bool saves_ymm = (xcr0 & 0x6) == 0x6;
  const bool saves_zmm = (xcr0 & 0xe6) == 0xe6;
  const bool saves_tiles = (xcr0 & 0x60000) == 0x60000;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return features;
  features.avx2 = saves_ymm && fma && f16c && (b & bit_AVX2);
  features.avx512 = features.avx2 && saves_zmm && (b & bit_AVX512F) && (b & bit_AVX512BW) &&
                    (b & bit_AVX512DQ) && (b & bit_AVX512VL);
  features.amx_bf16 = saves_tiles && (d & (1u << 22));
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) {
    features.avx512_bf16 = features.avx512 && (a & (1u << 5));
  }
  return features;
}
#else
CpuFeatures detect() { return {}; }
#endif

CpuIsa choose() {
  const char* forced = std::getenv("L3EXT_CPU_ISA");
  if (forced == nullptr || *forced == '\0') return best_cpu_isa();
  const std::string name = forced;
  for (CpuIsa isa : {CpuIsa::kBaseline, CpuIsa::kAvx2, CpuIsa::kAvx512}) {
    if (name != cpu_isa_name(isa)) continue;
    if (isa > best_cpu_isa()) {
      throw Error(ErrorCode::kRuntime,
                  concat("L3EXT_CPU_ISA: this processor runs at most \"",
                         cpu_isa_name(best_cpu_isa()), "\", got \"", name, "\""));
    }
    return isa;
  }
  throw Error(
      ErrorCode::kValue,
      concat("L3EXT_CPU_ISA: expected \"baseline\", \"avx2\" or \"avx512\", got \"", name, "\""));
}

}  // namespace

const char* cpu_isa_name(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::kBaseline:
      return "baseline";
    case CpuIsa::kAvx2:
      return "avx2";
    case CpuIsa::kAvx512:
      return "avx512";
  }
  return "unknown";
}

CpuFeatures cpu_features() {
  static const CpuFeatures features = detect();
  return features;
}

CpuIsa best_cpu_isa() {
  const CpuFeatures features = cpu_features();
  if (features.avx512) return CpuIsa::kAvx512;
  if (features.avx2) return CpuIsa::kAvx2;
  return CpuIsa::kBaseline;
}

CpuIsa active_cpu_isa() {
  static const CpuIsa isa = choose();
  return isa;
}

}  // namespace l3ext
