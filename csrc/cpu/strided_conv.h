// What the driver of strided_conv (strided_conv.cpp: threads, memory, reductions) and its kernels
// (strided_conv_kernels.h, once per instruction set) share. pnfs/kernels/strided_conv.py has the
// definition. Plain data only, see cpu/simd.h.
//
// Letters: C channels of x, O channels of y, H W rows and columns of x. Arrays in memory are
// (H, W, channels). Taps are numbered 3·i + j, rows before columns.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/bands.h"

namespace pnfs {

constexpr int kTaps = 9;

struct StridedConvShape {
  std::int64_t c, o, h, w;
  std::int64_t out_h, out_w;  // rows and columns of y
  std::int64_t rows;          // of y, that a block has at most
  bool stats;                 // y's statistics are wanted, and have gradients
  bool streams;               // the result is stored past the caches; its pixels are aligned to lines
};

// One part's constants, float32. Channels are padded with zeros to a multiple of kGroup (mix.h).
struct StridedConvPart {
  const float* weight;  // packed: see StridedConvKernels::pack_*
  const float* bias;    // (O), forward
  const float* add;     // (O), backward: the gradient of the whole y is
  const float* times;   // (O)   gy + add + times·y
};

// Backward: takes the gradient of rows [first, last) of y for the weights, and writes that of the
// rows [2·first, 2·last) of x. Sums are added to.
struct StridedConvBackward {
  const void* x;
  const void* y;  // read with stats only
  const void* gy;
  const void* more;  // as gx: added to it; null for none
  void* gx;
  std::int64_t first, last;
  bool fresh;     // `weight` is written, not added to
  float* weight;  // (9, O, C) gradient, C padded
  float* bias;    // (O) gradient, padded
};

struct StridedConvKernels {
  // One of `panels` panels of a tap of the packed weights. The right matrix is (C, O) forward, (O, C)
  // backward; it takes depth · padded columns floats, and the taps lie back to back.
  std::int64_t (*panels)(std::int64_t columns);
  void (*pack_forward)(const StridedConvShape&, const float* weight, int tap, std::int64_t panel,
                       float* packed);
  void (*pack_backward)(const StridedConvShape&, const float* weight, int tap, std::int64_t panel,
                        float* packed);
  // Floats of scratch memory, aligned to 64 bytes, that a block needs.
  std::size_t (*forward_scratch)(const StridedConvShape&);
  std::size_t (*backward_scratch)(const StridedConvShape&);
  // dtype: see core/dtypes.h; 0 or 1.
  void (*forward)(int dtype, const StridedConvShape&, const StridedConvPart&,
                  const ForwardBand&, float* scratch);
  void (*backward)(int dtype, const StridedConvShape&, const StridedConvPart&,
                   const StridedConvBackward&, float* scratch);
};

extern const StridedConvKernels kStridedConvPortable;
#if defined(__x86_64__)
extern const StridedConvKernels kStridedConvAvx2, kStridedConvAvx512;
#endif

}  // namespace pnfs
