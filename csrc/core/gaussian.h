// Gaussian targets: pnfs/kernels/vector_heatmap_loss.py has the definition.
#pragma once

#include <cmath>

#include "core/macros.h"

namespace pnfs {

// The cell of a coordinate in input pixels, on an axis of `size` cells: an integer of at most
// size - 1, possibly negative or infinite; NaN stays NaN.
PNFS_HOST_DEVICE inline float target_cell(float coordinate, float stride, long long size) {
  const float cell = truncf(coordinate / stride + 0.5f);
  const float last = static_cast<float>(size - 1);
  return cell > last ? last : cell;
}

// exp(-r² / 2σ²) for a distance in cells; scale = -1 / 2σ².
PNFS_HOST_DEVICE inline float gaussian(float distance, float scale) {
  return expf(scale * distance * distance);
}

}  // namespace pnfs
