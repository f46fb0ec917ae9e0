// What the driver of batch_norm_act (batch_norm_act.cpp: coefficients, threads, reductions) and its
// kernels (batch_norm_act_kernels.h, once per instruction set) share.
// pnfs/kernels/batch_norm_act.py has the definition. Plain data only, see cpu/simd.h.
//
// Maps are rows of `channels` adjacent elements. A row need not be one pixel: where a pixel does not
// fill whole vectors the driver makes rows of several, with their coefficients repeated.
#pragma once

#include <cstdint>

namespace pnfs {

// v = (x - mean)·scale + shift + residual, y = v cut off below `floor` and above `ceiling`; NaN cuts
// off nothing.
struct NormalisedRows {
  const void* x;
  const void* residual;  // null: none
  std::int64_t rows, channels;
  const float *mean, *scale, *shift;  // (channels)
  float floor, ceiling;
};

struct BatchNormActKernels {
  // Writes y, past the caches if `streams`. dtype: see core/dtypes.h; 0 or 1.
  void (*forward)(int dtype, const NormalisedRows&, void* y, bool streams);
  // v's gradient gv is gy where v lies between the limits, else 0. Adds Σ gv and Σ gv·(x - mean) to
  // `first` and `second` (channels); writes gv unless it is null.
  void (*sums)(int dtype, const NormalisedRows&, const void* gy, void* gv, float* first,
               float* second);
  // gx = scale·(gv + offset + slope·(x - mean)), with slope and offset (channels).
  void (*gradient)(int dtype, const NormalisedRows&, const void* gy, const float* slope,
                   const float* offset, void* gx, bool streams);
};

extern const BatchNormActKernels kBatchNormActPortable;
#if defined(__x86_64__)
extern const BatchNormActKernels kBatchNormActAvx2, kBatchNormActAvx512;
#endif

}  // namespace pnfs
