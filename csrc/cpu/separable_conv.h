// What the driver of separable_conv (separable_conv.cpp: threads, memory, reductions) and its kernels
// (separable_kernels.h, once per instruction set) share. pnfs/kernels/separable_conv.py has the
// definition. Plain data only, see cpu/simd.h.
//
// Letters: P parts, N images, C channels of x, O channels of y, H W rows and columns. Arrays in
// memory are (P, N, H, W, channels). All arrays of float32 here have their channels padded to a
// multiple of kChannelStep.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/bands.h"

namespace pnfs {

struct SeparableShape {
  std::int64_t c, o, h, w;
  std::int64_t dilation;  // 0: no depthwise convolution
  bool stats;             // y's statistics are wanted, and have gradients
  bool streams;           // the result is stored past the caches; its pixels are aligned to lines
};

// One part's constants, (padded C) or (padded O) float32. Pads are 0.
struct SeparablePart {
  const float* pointwise;  // packed: see SeparableKernels::pack_*
  const float* taps;       // (9, C) depthwise weights
  OnLoad on_load;          // from x to z
  const float* bias;       // (O), forward
  const float* add;        // (O), backward: the gradient of the whole y is
  const float* times;      // (O)   gy + add + times·y
};

// Rows [first, last) of one image, backward. Sums are added to.
struct BackwardBand {
  const void* x;
  const void* y;  // read with stats only
  const void* gy;
  const void* more;  // as gx: added to it; null for none
  void* gx;
  std::int64_t first, last;
  bool fresh;        // `pointwise` is written, not added to
  float* pointwise;  // (O, C) gradient
  float* taps;       // (9, C) gradient
  float* bias;       // (O) gradient
  float *z_sum, *z_dot;  // (C), see Unnormalise in cpu/rows.h
};

struct SeparableKernels {
  // One of `panels` panels of the packed pointwise weights (O, C). The right matrix is their
  // transpose forward, themselves backward; it takes depth · padded columns floats.
  std::int64_t (*panels)(std::int64_t columns);
  void (*pack_forward)(const SeparableShape&, const float* pointwise, std::int64_t panel,
                       float* packed);
  void (*pack_backward)(const SeparableShape&, const float* pointwise, std::int64_t panel,
                        float* packed);
  // Floats of scratch memory, aligned to 64 bytes, that a band needs.
  std::size_t (*forward_scratch)(const SeparableShape&);
  std::size_t (*backward_scratch)(const SeparableShape&);
  // dtype: see core/dtypes.h; 0 or 1.
  void (*forward)(int dtype, const SeparableShape&, const SeparablePart&, const ForwardBand&,
                  float* scratch);
  void (*backward)(int dtype, const SeparableShape&, const SeparablePart&, const BackwardBand&,
                   float* scratch);
};

extern const SeparableKernels kSeparablePortable;
#if defined(__x86_64__)
extern const SeparableKernels kSeparableAvx2, kSeparableAvx512;
#endif

}  // namespace pnfs
