// Runs the CUDA sources on the CPU, for tests: a C++20 compiler takes this header in place of nvcc's.
//
// A block's threads are fibres of the thread that launches (fibres.h). __syncthreads() is a barrier of
// theirs, __shared__ is static, exchanges within a warp go through a buffer. The blocks of a grid run
// one after the other, so one static copy of the shared memory serves them all; dynamic shared memory
// starts every block as NaN. A race between the threads of a block is one between fibres:
// ThreadSanitizer reports it. One between blocks shows as a result that depends on their order.
//
// Environment, read at every launch:
//   PNFS_EMULATED_ORDER=reversed     the last block runs first
//   PNFS_EMULATED_SKIP=file.cu:line  leaves out the __syncthreads() there, to show that it is needed
#pragma once

#if __cplusplus < 202002L
#error "host_emulation.h needs C++20; or compile the CUDA sources with nvcc"
#endif

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "cuda/fibres.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __syncthreads() ::pnfs::emulation::sync_threads(__FILE__, __LINE__)

struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using std::min;

#define threadIdx (::pnfs::emulation::thread_index())
#define blockIdx (::pnfs::emulation::block_index())
#define blockDim (::pnfs::emulation::grid->threads)

namespace pnfs::emulation {

constexpr int kWarp = 32;
constexpr int kMostThreads = 1024;
constexpr std::size_t kMostShared = 48 * 1024;  // what a kernel may use without asking

struct Warp {
  Barrier barrier;
  std::atomic<std::uint32_t> live;  // lanes that have not returned
  std::array<std::uint64_t, kWarp> values{};

  explicit Warp(int lanes)
      : barrier(lanes), live(lanes == kWarp ? ~0u : (1u << lanes) - 1u) {}
};

struct Block {
  uint3 index;
  Barrier barrier;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<float4> shared;

  Block(std::int64_t index, int threads, std::size_t shared_bytes)
      : index{static_cast<unsigned>(index), 0, 0},
        barrier(threads),
        shared((shared_bytes + sizeof(float4) - 1) / sizeof(float4)) {
    for (int first = 0; first < threads; first += kWarp) {
      warps.push_back(std::make_unique<Warp>(std::min(kWarp, threads - first)));
    }
    std::memset(static_cast<void*>(shared.data()), 0xff, shared.size() * sizeof(float4));
  }
};

// What the threads of the running grid share.
struct Grid {
  uint3 threads;  // of a block
  std::string skip;
  std::optional<Block> block;
};

inline thread_local Grid* grid = nullptr;

inline uint3 thread_index() { return {static_cast<unsigned>(Fibres::index()), 0, 0}; }
inline uint3 block_index() { return grid->block->index; }
inline Warp& warp() { return *grid->block->warps[threadIdx.x / kWarp]; }
inline unsigned lane() { return threadIdx.x % kWarp; }
inline float4* dynamic_shared() { return grid->block->shared.data(); }

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "CUDA emulation: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}

inline void sync_threads(std::string_view file, int line) {
  if (!grid->skip.empty()) {
    const std::string here = std::string(file.substr(file.rfind('/') + 1)) + ":" +
                             std::to_string(line);
    if (here == grid->skip) return;
  }
  grid->block->barrier.arrive_and_wait();
}

// Every lane gives `value`; `read` sees what all gave. All lanes of the warp must be there.
template <class T, class Read>
auto exchange(std::uint32_t mask, T value, Read read) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t));
  Warp& here = warp();
  if (mask != here.live.load(std::memory_order_relaxed)) fail("the mask of a warp's exchange is not the set of its live lanes");
  std::memcpy(&here.values[lane()], &value, sizeof value);
  here.barrier.arrive_and_wait();
  const auto result = read(here.values);
  here.barrier.arrive_and_wait();
  return result;
}

template <class T>
T shuffle(std::uint32_t mask, T value, unsigned source) {
  return exchange(mask, value, [&](const std::array<std::uint64_t, kWarp>& values) {
    T result;
    std::memcpy(&result, &values[source], sizeof result);
    return result;
  });
}

// Calls `kernel` once for every thread of every block.
template <class Kernel>
void launch(const char* name, std::int64_t blocks, int threads, std::size_t shared_bytes,
            const Kernel& kernel) {
  if (blocks < 1 || threads < 1 || threads > kMostThreads || shared_bytes > kMostShared) {
    throw std::runtime_error(std::string(name) + ": launch failed: invalid configuration argument");
  }
  const auto setting = [](const char* variable) {
    const char* value = std::getenv(variable);
    return std::string(value == nullptr ? "" : value);
  };
  const bool reversed = setting("PNFS_EMULATED_ORDER") == "reversed";
  Grid state{{static_cast<unsigned>(threads), 1, 1}, setting("PNFS_EMULATED_SKIP"), std::nullopt};
  std::int64_t begun = 0;
  // Opens once every thread has left the block before; then makes the next block's state.
  Barrier next_block(threads, [&] {
    state.block.emplace(reversed ? blocks - 1 - begun : begun, threads, shared_bytes);
    ++begun;
  });
  grid = &state;
  Fibres::run(threads, [&] {
    for (std::int64_t i = 0; i < blocks; ++i) {
      next_block.arrive_and_wait();
      kernel();
      // A thread that has returned counts as arrived from then on.
      warp().live.fetch_and(~(1u << lane()), std::memory_order_relaxed);
      warp().barrier.arrive_and_drop();
      state.block->barrier.arrive_and_drop();
    }
  });
  grid = nullptr;
}

}  // namespace pnfs::emulation

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return ::pnfs::emulation::shuffle(mask, value, ::pnfs::emulation::lane() ^ lanes);
}

inline unsigned __ballot_sync(unsigned mask, bool vote) {
  return ::pnfs::emulation::exchange(mask, std::uint64_t{vote}, [](const auto& values) {
    unsigned ballot = 0;
    for (unsigned i = 0; i < values.size(); ++i) ballot |= static_cast<unsigned>(values[i]) << i;
    return ballot;
  });
}
