#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pnfs {
namespace {

// The features of x86-64-v4 and x86-64-v3 that the variants are compiled for, see setup.py.
bool has(Isa isa) {
#if defined(__x86_64__)
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  static const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                             __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512dq") &&
                             __builtin_cpu_supports("avx512vl");
  if (isa == Isa::avx2) return avx2;
  if (isa == Isa::avx512) return avx512;
#endif
  return isa == Isa::portable;
}

// AMX's registers are a process's only after it has asked for them; Linux alone has that call.
bool may_use_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

#if defined(__x86_64__)
bool is_intel() {
  unsigned most = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(0, &most, &b, &c, &d) != 0 && b == signature_INTEL_ebx;
}
#endif

// Intel's AVX-512 multiplies pairs no faster than it does float32, and the operands must be rounded:
// the network takes half as long again.
bool pays(Bf16Unit unit) {
#if defined(__x86_64__)
  static const bool intel = is_intel();
  return unit != Bf16Unit::avx512 || !intel;
#else
  return unit == Bf16Unit::none;
#endif
}

bool has(Bf16Unit unit) {
#if defined(__x86_64__)
  const auto bit = [](unsigned leaf, bool in_edx, unsigned number) {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, leaf, &a, &b, &c, &d) != 0 &&
           ((in_edx ? d : a) >> number & 1u) != 0;
  };
  static const bool avx512 = has(Isa::avx512) && bit(1, false, 5);
  static const bool amx = avx512 && bit(0, true, 24) && bit(0, true, 22) && may_use_tiles();
  if (unit == Bf16Unit::avx512) return avx512;
  if (unit == Bf16Unit::amx) return amx;
#endif
  return unit == Bf16Unit::none;
}

struct Named {
  const char* name;
  Isa isa;
  Bf16Unit unit;
};

constexpr Named kNames[] = {
    {"amx", Isa::avx512, Bf16Unit::amx},      {"avx512_bf16", Isa::avx512, Bf16Unit::avx512},
    {"avx512", Isa::avx512, Bf16Unit::none},  {"avx2", Isa::avx2, Bf16Unit::none},
    {"portable", Isa::portable, Bf16Unit::none},
};

// The best that pays on this CPU, or what PNFS_ISA names. Units for bfloat16 count only with
// `for_bfloat16`: a process that multiplies none does not ask the kernel for tiles.
const Named& chosen(bool for_bfloat16) {
  const char* wanted = std::getenv("PNFS_ISA");
  const bool any = wanted == nullptr || *wanted == '\0';
  for (const Named& named : kNames) {
    if (any ? !for_bfloat16 && named.unit != Bf16Unit::none : named.name != std::string(wanted)) {
      continue;
    }
    if (has(named.isa) && has(named.unit) && (!any || pays(named.unit))) return named;
    if (!any) {
      throw std::runtime_error(std::string("this CPU has no ") + wanted + " (PNFS_ISA)");
    }
  }
  throw std::runtime_error(std::string("PNFS_ISA is '") + wanted +
                           "'; use amx, avx512_bf16, avx512, avx2 or portable");
}

}  // namespace

Isa chosen_isa() { return chosen(false).isa; }

Bf16Unit chosen_bf16_unit() { return chosen(true).unit; }

bool multiplies_bfloat16() { return chosen_bf16_unit() != Bf16Unit::none; }

std::vector<std::string> instruction_sets() {
  std::vector<std::string> found;
  for (const Named& named : kNames) {
    if (has(named.isa) && has(named.unit)) found.push_back(named.name);
  }
  return found;
}

}  // namespace pnfs
