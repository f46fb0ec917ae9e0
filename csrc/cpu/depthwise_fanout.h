// What the driver of depthwise_fanout (depthwise_fanout.cpp: threads, memory, reductions) and its
// kernels (depthwise_fanout_kernels.h, once per instruction set) share.
// pnfs/kernels/depthwise_fanout.py has the definition. Plain data only, see cpu/simd.h.
//
// Letters: P parts, N images, C channels, H W rows and columns of x, S stencils. Arrays in memory
// are (P, N, H, W, C). Those of float32 here have their channels padded to a multiple of
// kChannelStep, pads are 0.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/bands.h"

namespace pnfs {

constexpr std::int64_t kMaxStencils = 8;
constexpr std::int64_t kAveragePool = 0, kMaxPool = -1;  // other stencils: a convolution's dilation

struct FanoutShape {
  std::int64_t c, h, w, stride;
  std::int64_t stencils;      // how many
  std::int64_t reach;         // rows that any of them reaches up and down
  bool max_pool;              // one of the stencils is
  bool stats;                 // statistics are wanted, and have gradients
  bool streams;               // results are stored past the caches
};

// One stencil in one part: its constants and, over a band, its result or the gradient of that.
struct FanoutStencil {
  std::int64_t kind;                    // a dilation, kAveragePool or kMaxPool
  const float* taps;                    // (9, C) of a convolution
  void* y;                              // the image; backward: read with stats only
  float *centre, *sum, *square;         // forward, with stats: sums of the distance from `centre`
  const void* gy;                       // backward: the image
  const float *add, *times;             // backward: the whole gradient is gy + add + times·y
  float* tap_gradients;                 // backward: (9, C), added to
};

// Rows [first, last) of one image: of the results forward, of x backward. x and gx point to the
// image.
struct FanoutBand {
  const void* x;
  std::int64_t first, last;
  const FanoutStencil* stencils;
  void* gx;
  float *z_sum, *z_dot;  // backward: (C), added to, see Unnormalise in cpu/rows.h
};

struct FanoutKernels {
  // Floats of scratch memory, aligned to 64 bytes, that a band needs.
  std::size_t (*forward_scratch)(const FanoutShape&);
  std::size_t (*backward_scratch)(const FanoutShape&);
  // dtype: see core/dtypes.h; 0 or 1.
  void (*forward)(int dtype, const FanoutShape&, const OnLoad&, const FanoutBand&, float* scratch);
  void (*backward)(int dtype, const FanoutShape&, const OnLoad&, const FanoutBand&, float* scratch);
};

extern const FanoutKernels kFanoutPortable;
#if defined(__x86_64__)
extern const FanoutKernels kFanoutAvx2, kFanoutAvx512;
#endif

}  // namespace pnfs
