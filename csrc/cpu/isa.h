// Which of an op's variants runs: they are compiled for different instruction sets.
#pragma once

#include <string>
#include <vector>

namespace pnfs {

enum class Isa { portable, avx2, avx512 };

// The best that this CPU has, or the one that the environment variable PNFS_ISA names: "avx512",
// "avx2" or "portable"; "amx" and "avx512_bf16" are avx512. Read at every call, so that a test can try them all in one process.
// Throws std::runtime_error for another name or a set that this CPU lacks.
Isa chosen_isa();

// What multiplies matrices of bfloat16: AMX, the instruction of AVX-512, or nothing.
enum class Bf16Unit { none, avx512, amx };

// The best that pays on this CPU, or what PNFS_ISA names: "amx", "avx512_bf16", else none.
Bf16Unit chosen_bf16_unit();
bool multiplies_bfloat16();  // whether there is one

// Values of PNFS_ISA that this CPU can run, best first.
std::vector<std::string> instruction_sets();

}  // namespace pnfs
