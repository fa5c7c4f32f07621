// Detection alone, so that tests can put another processor in its place.
#include "core/cpu_features.hpp"

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace l3ext {

#if defined(__x86_64__)
namespace {

struct Leaf {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};

// Zeros where the processor has no such leaf.
Leaf cpuid(uint32_t leaf, uint32_t subleaf = 0) {
  Leaf found;
  if (!__get_cpuid_count(leaf, subleaf, &found.a, &found.b, &found.c, &found.d)) return {};
  return found;
}

// Whether the OS saves these of the processor's register files.
bool os_saves(uint64_t registers) {
  if (!(cpuid(1).c & bit_OSXSAVE)) return false;
  uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  const uint64_t saved = (static_cast<uint64_t>(high) << 32) | low;
  return (saved & registers) == registers;
}

bool has_avx2() {
  const Leaf basic = cpuid(1);
  return os_saves(0x6) && (basic.c & bit_FMA) && (basic.c & bit_F16C) && (cpuid(7).b & bit_AVX2);
}

bool has_avx512() {
  constexpr uint32_t kNeeded = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
  return has_avx2() && os_saves(0xe6) && (cpuid(7).b & kNeeded) == kNeeded;
}

bool has_avx512_bf16() { return has_avx512() && (cpuid(7, 1).a & (1u << 5)); }

// Tiles are 8 KiB of state in every context switch and signal frame: Linux gives them to a process
// that asks, and to no other. It refuses where a signal stack would be too small.
bool tiles_granted() {
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}

bool has_amx() {
  constexpr uint32_t kNeeded = (1u << 24) | (1u << 22);  // AMX-TILE, AMX-BF16
  if (!has_avx512_bf16() || !os_saves(0x60000) || (cpuid(7).d & kNeeded) != kNeeded) return false;
  const Leaf palette = cpuid(0x1d, 1);  // what the kernels count on: 8 tiles of 16 rows of 64 bytes
  return (palette.b >> 16) >= 8 && (palette.b & 0xffff) >= 64 && (palette.c & 0xffff) >= 16 &&
         tiles_granted();
}

}  // namespace

bool cpu_runs(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::kBaseline:
      return true;
    case CpuIsa::kAvx2:
      return has_avx2();
    case CpuIsa::kAvx512:
      return has_avx512();
    case CpuIsa::kAvx512Bf16:
      return has_avx512_bf16();
    case CpuIsa::kAmx:
      return has_amx();
  }
  return false;
}
#else
bool cpu_runs(CpuIsa isa) { return isa == CpuIsa::kBaseline; }
#endif

}  // namespace l3ext
