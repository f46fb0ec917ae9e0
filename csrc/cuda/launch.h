// What every launch needs: the number of blocks, and the one macro that launches. By nvcc a launch
// goes to the GPU; by a C++20 compiler the same sources run on the host (host_emulation.h).
#pragma once

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#else
#include "cuda/host_emulation.h"
#endif

#include <cstdint>
#include <stdexcept>
#include <string>

namespace pnfs {

// Blocks of `threads` that cover `items`.
inline unsigned blocks_for(std::int64_t items, int threads) {
  const std::int64_t blocks = (items + threads - 1) / threads;
  if (blocks > 0x7fffffff) throw std::runtime_error("too many blocks for one launch");
  return static_cast<unsigned>(blocks);
}

#if defined(__CUDACC__)
inline cudaStream_t as_stream(std::uintptr_t handle) {
  return reinterpret_cast<cudaStream_t>(handle);
}

// Turns the error of the launch before it into an exception.
inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(kernel) + ": launch failed: " + cudaGetErrorString(error));
  }
}
#endif

}  // namespace pnfs

// PNFS_LAUNCH(kernel, blocks, threads, bytes of dynamic shared memory, stream's handle, arguments…)
// launches and checks. A kernel with several template arguments stands in parentheses.
// PNFS_DYNAMIC_SHARED(name) declares that memory in a kernel, as float4* name.
#if defined(__CUDACC__)
#define PNFS_LAUNCH(kernel, blocks, threads, shared_bytes, stream, ...)                       \
  do {                                                                                        \
    kernel<<<(blocks), (threads), (shared_bytes), ::pnfs::as_stream(stream)>>>(__VA_ARGS__);  \
    ::pnfs::check_launch(#kernel);                                                            \
  } while (false)
#define PNFS_DYNAMIC_SHARED(name) extern __shared__ float4 name[]
#else
#define PNFS_LAUNCH(kernel, blocks, threads, shared_bytes, stream, ...)                       \
  (static_cast<void>(stream), ::pnfs::emulation::launch(#kernel, (blocks), (threads),         \
                                                        (shared_bytes),                       \
                                                        [&] { kernel(__VA_ARGS__); }))
#define PNFS_DYNAMIC_SHARED(name) float4* const name = ::pnfs::emulation::dynamic_shared()
#endif
