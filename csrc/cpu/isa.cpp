#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

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

Isa named(const std::string& name) {
  if (name == "avx512") return Isa::avx512;
  if (name == "avx2") return Isa::avx2;
  if (name == "portable") return Isa::portable;
  throw std::runtime_error("PNFS_ISA is '" + name + "'; use avx512, avx2 or portable");
}

}  // namespace

Isa chosen_isa() {
  const char* wanted = std::getenv("PNFS_ISA");
  if (wanted == nullptr || *wanted == '\0') {
    return has(Isa::avx512) ? Isa::avx512 : has(Isa::avx2) ? Isa::avx2 : Isa::portable;
  }
  const Isa isa = named(wanted);
  if (!has(isa)) throw std::runtime_error(std::string("this CPU has no ") + wanted + " (PNFS_ISA)");
  return isa;
}

}  // namespace pnfs
