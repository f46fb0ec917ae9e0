// Bilinear reading of an interleaved uint8 image with three channels, zero outside.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/macros.h"

namespace pnfs {

struct ByteImage {
  const std::uint8_t* data;  // height × width × 3, without gaps
  int height, width;
};

// output pixel (x, y) -> source (sx, sy) = (a·x + b·y + c, d·x + e·y + f), in double because
// float32 would move samples by up to 5e-4 pixels in a large image.
struct Affine {
  double a, b, c, d, e, f;
};

// The matrix of the map after the output is mirrored: column x shows what width-1-x would.
PNFS_HOST_DEVICE inline Affine load_affine(const float* m, bool mirror, int width) {
  Affine t{m[0], m[1], m[2], m[3], m[4], m[5]};
  if (mirror) {
    t.c += t.a * (width - 1);
    t.f += t.d * (width - 1);
    t.a = -t.a;
    t.d = -t.d;
  }
  return t;
}

// value[c] = Σ over the four taps around (sx, sy) of weight·pixel, a tap outside counting 0.
// A coordinate that is infinite or NaN reads nothing.
PNFS_HOST_DEVICE inline void bilinear(ByteImage image, double sx, double sy, float value[3]) {
  value[0] = value[1] = value[2] = 0.0f;
  if (!(sx > -1.0 && sy > -1.0 && sx < image.width && sy < image.height)) return;
  const int x0 = static_cast<int>(floor(sx));
  const int y0 = static_cast<int>(floor(sy));
  const float fx = static_cast<float>(sx - x0);
  const float fy = static_cast<float>(sy - y0);
  for (int row = 0; row < 2; ++row) {
    const int y = y0 + row;
    if (y < 0 || y >= image.height) continue;
    for (int column = 0; column < 2; ++column) {
      const int x = x0 + column;
      if (x < 0 || x >= image.width) continue;
      const float weight = (row ? fy : 1.0f - fy) * (column ? fx : 1.0f - fx);
      const std::uint8_t* pixel = image.data + (std::int64_t{y} * image.width + x) * 3;
      for (int c = 0; c < 3; ++c) value[c] += weight * static_cast<float>(pixel[c]);
    }
  }
}

}  // namespace pnfs
