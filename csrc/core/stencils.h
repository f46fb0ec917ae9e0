// What the stencils of depthwise_fanout share: pnfs/kernels/depthwise_fanout.py has the definition.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace pnfs {

// 1 / (pixels of the 3×3 window at (y, x) that lie in the image). static: sources for different
// instruction sets must not share a copy.
PNFS_HOST_DEVICE static inline float average_weight(std::int64_t height, std::int64_t width,
                                                    std::int64_t y, std::int64_t x) {
  const std::int64_t rows = 3 - (y == 0) - (y == height - 1);
  const std::int64_t columns = 3 - (x == 0) - (x == width - 1);
  return 1.0f / static_cast<float>(rows * columns);
}

}  // namespace pnfs
