#include <cstdlib>
#include <string>

#include "core/cpu_features.hpp"
#include "core/error.hpp"

namespace l3ext {
namespace {

CpuIsa choose() {
  const char* forced = std::getenv("L3EXT_CPU_ISA");
  if (forced == nullptr || *forced == '\0') return best_cpu_isa();
  const std::string name = forced;
  std::string names;
  for (const CpuIsa isa : kCpuIsas) {
    if (name == cpu_isa_name(isa)) {
      if (cpu_runs(isa)) return isa;
      throw Error(ErrorCode::kRuntime,
                  concat("L3EXT_CPU_ISA: this machine runs at most \"",
                         cpu_isa_name(best_cpu_isa()), "\", got \"", name, "\""));
    }
    names += concat(names.empty() ? "" : ", ", "\"", cpu_isa_name(isa), "\"");
  }
  throw Error(ErrorCode::kValue,
              concat("L3EXT_CPU_ISA: expected one of ", names, ", got \"", name, "\""));
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
    case CpuIsa::kAvx512Bf16:
      return "avx512_bf16";
    case CpuIsa::kAmx:
      return "amx";
  }
  return "unknown";
}

CpuIsa best_cpu_isa() {
  CpuIsa best = CpuIsa::kBaseline;
  for (const CpuIsa isa : kCpuIsas) {
    if (cpu_runs(isa)) best = isa;
  }
  return best;
}

CpuIsa active_cpu_isa() {
  static const CpuIsa isa = choose();
  return isa;
}

}  // namespace l3ext
