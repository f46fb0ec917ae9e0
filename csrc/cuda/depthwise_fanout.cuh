// What depthwise_fanout's forward and backward kernels share: how the work is cut, where a block
// works, tiles in shared memory, 16-byte loads. Letters as in csrc/cpu/depthwise_fanout.h.
//
// A block has up to kMostGroups groups of four channels and a tile of pixels. A thread has one group
// and one column of the tile, so that what it loads for one row serves the rows above and below.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "core/dtypes.h"
#include "core/stencils.h"
#include "cuda/launch.h"
#include "cuda/ops.h"

namespace pnfs {
namespace {

constexpr int kThreads = 128;
constexpr int kMostGroups = 8;
constexpr int kMostStencils = 8;
constexpr int kTileRows = 8;                // of x
constexpr std::int64_t kMostBlocks = 2048;  // backward: each has a row of sums
constexpr int kSumChannels = 32, kSumSlices = 8;  // of the blocks that add up sums
constexpr int kAveragePool = 0, kMaxPool = -1;  // other stencils: a convolution's dilation, 1 or 2

struct Stencil {
  int kind;
  const float* taps;  // (P, C, 9)
  void* y;            // (P, N, h, w, C)
  const void* gy;
  const float *mean, *g_mean, *g_var;  // (P, C)
  float *to_mean, *to_var, *g_taps;
};

struct Fanout {
  std::int64_t p, n, c, x_step, scratch_step;
  int h, w, out_h, out_w, stride, activation, count, convolutions, reach;
  int groups, chunks, columns, tiles_h, tiles_w;
  std::int64_t tiles, per_block, blocks;  // of a part: tiles; of a chunk: tiles to a block, blocks
  bool stats, max_pool;
  float eps;
  const void* x;
  void* gx;
  const float *mean, *var, *gamma, *beta;
  float *g_mean, *g_var, *g_gamma, *g_beta;
  float* scratch;
  Stencil stencils[kMostStencils];
};

// Channels in 16 bytes, and the groups that they make.
template <class T>
constexpr int kPacket = 16 / static_cast<int>(sizeof(T));
template <class T>
constexpr int kQuads = kPacket<T> / 4;

// `count` adjacent elements; `left`: how many of them exist, the others are 0.
template <int count, bool kVector, class T>
__device__ __forceinline__ void load_channels(const T* from, std::int64_t left, float* v) {
  T values[count];
  if constexpr (kVector && count * sizeof(T) == 16) {
    const uint4 raw = *reinterpret_cast<const uint4*>(from);
    memcpy(values, &raw, sizeof raw);
  } else if constexpr (kVector && count * sizeof(T) == 8) {
    const uint2 raw = *reinterpret_cast<const uint2*>(from);
    memcpy(values, &raw, sizeof raw);
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i) values[i] = i < left ? from[i] : T{};
  }
#pragma unroll
  for (int i = 0; i < count; ++i) v[i] = to_float(values[i]);
}

template <bool kVector, class T>
__device__ __forceinline__ void store_quad(T* to, std::int64_t left, const float* v) {
  T values[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) values[i] = from_float<T>(v[i]);
  if constexpr (kVector && sizeof values == 16) {
    uint4 raw;
    memcpy(&raw, values, sizeof raw);
    *reinterpret_cast<uint4*>(to) = raw;
  } else if constexpr (kVector) {
    uint2 raw;
    memcpy(&raw, values, sizeof raw);
    *reinterpret_cast<uint2*>(to) = raw;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < left) to[i] = values[i];
    }
  }
}

__device__ __forceinline__ float activated(int activation, float v) {
  if (activation != 0) v = v < 0.0f ? 0.0f : v;
  if (activation == 2) v = v > 6.0f ? 6.0f : v;
  return v;
}

// Writes a tile, pixel by pixel: value(row, column, first channel, v) gives a packet of channels.
template <class T, class Value>
__device__ __forceinline__ void fill_tile(float4* tile, int rows, int columns, int groups,
                                          const Value& value) {
  const int packets = groups / kQuads<T>;
  for (int i = threadIdx.x; i < rows * columns * packets; i += blockDim.x) {
    const int pixel = i / packets, packet = i - pixel * packets;
    const int row = pixel / columns;
    float v[kPacket<T>];
    value(row, pixel - row * columns, packet * kPacket<T>, v);
#pragma unroll
    for (int q = 0; q < kQuads<T>; ++q) {
      tile[pixel * groups + packet * kQuads<T> + q] =
          make_float4(v[4 * q], v[4 * q + 1], v[4 * q + 2], v[4 * q + 3]);
    }
  }
}

// The channels of one block, with what normalises them: mean, scale, shift in shared memory.
struct Channels {
  std::int64_t first, left, at;  // the first; how many; where they stand in a (P, C) tensor
  float* constants;              // (3, 4 groups)
  int width;                     // 4 groups

  __device__ Channels(const Fanout& f, std::int64_t p, int chunk, float4* memory)
      : first(std::int64_t{chunk} * f.groups * 4), left(f.c - first), at(p * f.c + first),
        constants(reinterpret_cast<float*>(memory)), width(f.groups * 4) {
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
      const bool there = i < left && f.mean != nullptr;
      constants[i] = there ? f.mean[at + i] : 0.0f;
      float scale = there ? 1.0f / sqrtf(f.var[at + i] + f.eps) : 1.0f;
      if (there && f.gamma != nullptr) scale *= f.gamma[at + i];
      constants[width + i] = scale;
      constants[2 * width + i] = there && f.beta != nullptr ? f.beta[at + i] : 0.0f;
    }
  }
  // What the activation takes.
  __device__ float before(int channel, float v) const {
    return (v - constants[channel]) * constants[width + channel] + constants[2 * width + channel];
  }
};

// A packet of z at (y, x) of an image; zero outside it.
template <class T, bool kVector>
__device__ __forceinline__ void load_z(const Fanout& f, const Channels& channels, const T* image,
                                       int y, int x, int channel, float* v) {
  if (y < 0 || y >= f.h || x < 0 || x >= f.w || channel >= channels.left) {
#pragma unroll
    for (int i = 0; i < kPacket<T>; ++i) v[i] = 0.0f;
    return;
  }
  const std::int64_t at = (std::int64_t{y} * f.w + x) * f.c + channels.first + channel;
  load_channels<kPacket<T>, kVector>(image + at, channels.left - channel, v);
#pragma unroll
  for (int i = 0; i < kPacket<T>; ++i) {
    const float z = f.mean == nullptr ? v[i] : channels.before(channel + i, v[i]);
    v[i] = channel + i < channels.left ? activated(f.activation, z) : 0.0f;
  }
}

// Taps as (9, groups); ones for an average pool.
__device__ __forceinline__ void load_taps(const Fanout& f, const Stencil& stencil,
                                          const Channels& channels, float4* memory) {
  float* taps = reinterpret_cast<float*>(memory);
  for (int i = threadIdx.x; i < 9 * f.groups * 4; i += blockDim.x) {
    const int tap = i / (f.groups * 4), channel = i - tap * f.groups * 4;
    const bool there = stencil.kind > 0 && channel < channels.left;
    taps[i] = stencil.kind <= 0 ? 1.0f
              : there           ? stencil.taps[(channels.at + channel) * 9 + tap]
                                : 0.0f;
  }
}

__device__ __forceinline__ bool max_wins(float value, float best) {
  return value > best || value != value;  // a NaN wins, and of several the last, as in torch
}

__device__ __forceinline__ void unpack(float4 from, float* to) {
  to[0] = from.x, to[1] = from.y, to[2] = from.z, to[3] = from.w;
}

using Size = std::array<std::int64_t, 8>;  // as csrc/cpu/ops.h

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// How the work is cut; `results`: tiles cover the results, else x.
inline Fanout plan(const Size& size, const Integers& stencils, double eps, int dtype, bool results) {
  Fanout f{};
  f.p = size[0], f.n = size[1], f.c = size[2], f.x_step = size[5];
  f.h = static_cast<int>(size[3]), f.w = static_cast<int>(size[4]);
  f.stride = static_cast<int>(size[6]), f.activation = static_cast<int>(size[7]);
  f.out_h = (f.h - 1) / f.stride + 1, f.out_w = (f.w - 1) / f.stride + 1;
  f.eps = static_cast<float>(eps);
  f.reach = 1;
  for (const std::int64_t kind : stencils) {
    f.stencils[f.count++].kind = static_cast<int>(kind);
    f.convolutions += kind > 0;
    f.max_pool |= kind == kMaxPool;
    f.reach = std::max(f.reach, static_cast<int>(kind));
  }
  // Whole packets of 16 bytes, in chunks of equal size.
  const std::int64_t quads = dtype == 0 ? 1 : 2, packets = ceil_div(f.c, 4 * quads);
  f.chunks = static_cast<int>(ceil_div(packets * quads, kMostGroups));
  f.groups = static_cast<int>(ceil_div(packets, f.chunks) * quads);
  const int height = results ? f.out_h : f.h, width = results ? f.out_w : f.w;
  const int rows = results ? kTileRows / f.stride : kTileRows;
  f.tiles_w = static_cast<int>(ceil_div(width, results && f.stride == 2 ? 12 : 16));
  f.columns = static_cast<int>(ceil_div(width, f.tiles_w));
  f.tiles_h = static_cast<int>(ceil_div(height, rows));
  f.tiles = f.n * f.tiles_h * f.tiles_w;
  f.per_block = ceil_div(f.tiles, std::max<std::int64_t>(1, kMostBlocks / (f.p * f.chunks)));
  f.blocks = ceil_div(f.tiles, f.per_block);
  return f;
}

inline int threads_of(const Fanout& f) {
  return static_cast<int>(ceil_div(f.columns * f.groups, 32)) * 32;
}

// Whether 16-byte accesses fall on their boundaries.
inline bool aligned(const Fanout& f, int dtype) {
  const std::int64_t packet = dtype == 0 ? 4 : 8;
  auto all = reinterpret_cast<Address>(f.x) | reinterpret_cast<Address>(f.gx);
  for (int s = 0; s < f.count; ++s) {
    all |= reinterpret_cast<Address>(f.stencils[s].y) | reinterpret_cast<Address>(f.stencils[s].gy);
  }
  return all % 16 == 0 && f.c % packet == 0 && f.x_step % packet == 0;
}

inline void set_inputs(Fanout& f, Address x, const Addresses& weights,
                       const std::array<Address, 4>& norm, Address scratch) {
  f.x = reinterpret_cast<const void*>(x);
  const float** to[] = {&f.mean, &f.var, &f.gamma, &f.beta};
  for (int i = 0; i < 4; ++i) *to[i] = reinterpret_cast<const float*>(norm[i]);
  std::size_t weight = 0;
  for (int s = 0; s < f.count; ++s) {
    if (f.stencils[s].kind > 0) {
      f.stencils[s].taps = reinterpret_cast<const float*>(weights[weight++]);
    }
  }
  f.scratch = reinterpret_cast<float*>(scratch);
}

}  // namespace
}  // namespace pnfs
