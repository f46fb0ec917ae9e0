// Which of an op's variants runs: they are compiled for different instruction sets.
#pragma once

namespace pnfs {

enum class Isa { portable, avx2, avx512 };

// The best that this CPU has, or the one that the environment variable PNFS_ISA names: "avx512",
// "avx2" or "portable". Read at every call, so that a test can try them all in one process.
// Throws std::runtime_error for another name or a set that this CPU lacks.
Isa chosen_isa();

}  // namespace pnfs
