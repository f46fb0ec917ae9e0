// Object keypoint similarity of two poses, for the CPU and the GPU. pnfs/kernels/oks_nms.py has the
// definition.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/macros.h"

namespace pnfs {

constexpr double kOksEps = 2.220446049250313e-16;  // np.spacing(1), added to the area

// Whether the OKS of two poses exceeds `threshold`. `a` and `b` are K pairs (x, y); `area` is the
// mean of the two areas. Stops as soon as the keypoints that are left cannot reach the threshold:
// for two different people that is after one or two. False where a coordinate is NaN.
PNFS_HOST_DEVICE inline bool oks_exceeds(const double* a, const double* b, double area,
                                         const double* sigmas, int64_t k, double threshold) {
  const double needed = threshold * k - 1e-9 * k;  // the margin keeps rounding out of the early exit
  double sum = 0;
  for (int64_t i = 0; i < k; ++i) {
    const double dx = a[2 * i] - b[2 * i], dy = a[2 * i + 1] - b[2 * i + 1];
    const double width = 2 * sigmas[i];
    const double exponent = (dx * dx + dy * dy) / (width * width * (2 * (area + kOksEps)));
    if (!(exponent > 746)) sum += exp(-exponent);  // exp(-746) is 0 in float64
    if (sum + static_cast<double>(k - 1 - i) < needed) return false;
  }
  return sum / static_cast<double>(k) > threshold;
}

}  // namespace pnfs
