// What every launch needs: the stream, the number of blocks, the error check.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace pnfs {

inline cudaStream_t as_stream(std::uintptr_t handle) {
  return reinterpret_cast<cudaStream_t>(handle);
}

// Blocks of `threads` that cover `items`.
inline unsigned blocks_for(std::int64_t items, int threads) {
  const std::int64_t blocks = (items + threads - 1) / threads;
  if (blocks > 0x7fffffff) throw std::runtime_error("too many blocks for one launch");
  return static_cast<unsigned>(blocks);
}

// Call right after a launch: turns its error into an exception.
inline void check_launch() {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA launch failed: ") + cudaGetErrorString(error));
  }
}

}  // namespace pnfs
