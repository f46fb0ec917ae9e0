// Images cut into bands of rows, for ops that keep a few rows in cache (cpu/rows.h): how they are
// cut, and what their drivers do with the sums that the bands return.
//
// How the work is cut depends on its sizes alone, and partial sums are added in a fixed order, so
// results do not depend on the number of threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pnfs {

// Arrays of float32 per channel are padded to a multiple of this, which holds a vector of every
// instruction set.
constexpr std::int64_t kChannelStep = 16;

// How one part's map is read: z = activation((x - mean)·scale + shift), or activation(x) if it is not
// normalised. Arrays are (padded C).
struct OnLoad {
  const float *mean, *scale, *shift;
  bool normalised;
  std::int64_t activation;  // 0 none, 1 ReLU, 2 ReLU6
};

// Rows [first, last) of y, one image of a convolution that takes statistics of its result, forward. x
// and y point to the image.
struct ForwardBand {
  const void* x;
  void* y;
  std::int64_t first, last;
  // (O) each, with stats: y without bias is near `shift`; Σ and Σ² of its distance, over the band.
  float *shift, *sum, *square;
};

}  // namespace pnfs
