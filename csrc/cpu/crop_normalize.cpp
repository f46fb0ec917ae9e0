// Affine crop, flip, channel order and normalisation of uint8 images: pnfs/kernels/crop_normalize.py
// has the definition.
//
// An output row is a straight line through the source, so the columns whose four taps are all inside
// are one interval. There a pixel is two 8-byte loads (both taps of a source row at once) and a few
// 8-wide operations; the columns beside it take the careful path of core/bilinear.h.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/bilinear.h"
#include "core/dtypes.h"
#include "cpu/ops.h"

namespace pnfs {
namespace {

typedef float Floats8 __attribute__((vector_size(32)));
typedef float Floats4 __attribute__((vector_size(16)));
typedef std::uint8_t Bytes8 __attribute__((vector_size(8)));

constexpr std::int64_t kSerialPixels = 4096;  // below this, starting threads costs more than work

struct Job {
  const std::uint8_t* pixels;
  const std::int64_t* offsets;
  const std::int32_t* sizes;
  const float* matrices;
  const std::uint8_t* flips;
  float scale[4], bias[4];  // value = grey·scale + bias, by output channel
  std::int64_t bytes, count;
  int height, width;
  bool rgb;
};

// What one thread needs for a row.
struct Scratch {
  explicit Scratch(int width)
      : offset(width), fx(width), fy(width), row(3 * static_cast<std::size_t>(width) + 1) {}
  std::vector<std::int64_t> offset;  // bytes from the crop's start to the upper left tap
  std::vector<float> fx, fy, row;    // row has one float to spare: pixels are stored four at a time
};

Floats8 load_taps(const std::uint8_t* address) {
  Bytes8 bytes;
  std::memcpy(&bytes, address, sizeof bytes);
  return __builtin_convertvector(bytes, Floats8);
}

struct Interval {
  int begin, end;
};

// Columns in [0, width) for which `inside` holds, given that it holds on one interval and that
// [low, high] is that interval up to rounding.
template <class Inside>
Interval exact_interval(double low, double high, int width, Inside inside) {
  if (!(low <= high)) return {0, 0};
  int begin = static_cast<int>(std::clamp(std::floor(low) - 1.0, 0.0, double(width)));
  int end = static_cast<int>(std::clamp(std::ceil(high) + 2.0, 0.0, double(width)));
  while (begin < end && !inside(begin)) ++begin;
  while (begin < end && !inside(end - 1)) --end;
  return {begin, end};
}

// Solves 0 <= slope·x + origin < limit for x, and narrows [low, high] to it.
void narrow(double slope, double origin, double limit, double& low, double& high) {
  if (slope == 0.0 || !std::isfinite(slope) || !std::isfinite(origin)) {
    if (!(slope == 0.0 && origin >= 0.0 && origin < limit)) high = low - 1.0;
    return;
  }
  const double at_zero = -origin / slope;
  const double at_limit = (limit - origin) / slope;
  low = std::max(low, std::min(at_zero, at_limit));
  high = std::min(high, std::max(at_zero, at_limit));
}

template <bool kRgb>
void inner_pixels(const std::uint8_t* image, std::int64_t stride, Interval columns,
                  const Scratch& scratch, const Job& job, float* row) {
  Floats4 scale, bias;
  std::memcpy(&scale, job.scale, sizeof scale);
  std::memcpy(&bias, job.bias, sizeof bias);
  for (int x = columns.begin; x < columns.end; ++x) {
    const std::uint8_t* address = image + scratch.offset[x];
    const Floats8 upper = load_taps(address);
    const Floats8 lower = load_taps(address + stride);
    const Floats8 column = upper + scratch.fy[x] * (lower - upper);
    // Lanes 0..2 are the left tap (BGR), 3..5 the right one.
    Floats4 left, right;
    if constexpr (kRgb) {
      left = __builtin_shufflevector(column, column, 2, 1, 0, 0);
      right = __builtin_shufflevector(column, column, 5, 4, 3, 3);
    } else {
      left = __builtin_shufflevector(column, column, 0, 1, 2, 2);
      right = __builtin_shufflevector(column, column, 3, 4, 5, 5);
    }
    const Floats4 value = (left + scratch.fx[x] * (right - left)) * scale + bias;
    std::memcpy(row + 3 * x, &value, sizeof value);  // the fourth lane: overwritten by the next
  }
}

void edge_pixels(ByteImage image, Interval columns, double slope_x, double slope_y, double origin_x,
                 double origin_y, const Job& job, float* row) {
  for (int x = columns.begin; x < columns.end; ++x) {
    float value[3];
    bilinear(image, slope_x * x + origin_x, slope_y * x + origin_y, value);
    for (int c = 0; c < 3; ++c) {
      row[3 * x + c] = value[job.rgb ? 2 - c : c] * job.scale[c] + job.bias[c];
    }
  }
}

// One output row in float32, into scratch.row.
void warp_row(const Job& job, std::int64_t n, int y, Scratch& scratch) {
  const ByteImage image{job.pixels + job.offsets[n], job.sizes[2 * n], job.sizes[2 * n + 1]};
  const Affine map = load_affine(job.matrices + 6 * n, job.flips[n] != 0, job.width);
  const double origin_x = map.b * y + map.c, origin_y = map.e * y + map.f;
  const std::int64_t stride = std::int64_t{image.width} * 3;

  // The 8-byte loads end two bytes past the right tap. Where that would leave the buffer, what
  // touches the crop's last row takes the careful path.
  const bool at_end = job.offsets[n] + stride * image.height + 2 > job.bytes;
  const int last_left = image.width - 2, last_top = image.height - (at_end ? 3 : 2);
  const double limit_x = last_left + 1.0, limit_y = last_top + 1.0;
  double low = 0.0, high = job.width - 1.0;
  narrow(map.a, origin_x, limit_x, low, high);
  narrow(map.d, origin_y, limit_y, low, high);
  const Interval inner = exact_interval(low, high, job.width, [&](int x) {
    const double sx = map.a * x + origin_x, sy = map.d * x + origin_y;
    return sx >= 0.0 && sx < limit_x && sy >= 0.0 && sy < limit_y;
  });
  for (int x = inner.begin; x < inner.end; ++x) {
    const double sx = map.a * x + origin_x, sy = map.d * x + origin_y;
    // The minimum matters only if this sum is rounded otherwise than the one in `inside`.
    const int left = std::min(static_cast<int>(sx), last_left);
    const int top = std::min(static_cast<int>(sy), last_top);
    scratch.offset[x] = top * stride + left * 3;
    scratch.fx[x] = static_cast<float>(sx - left);
    scratch.fy[x] = static_cast<float>(sy - top);
  }
  float* row = scratch.row.data();
  edge_pixels(image, {0, inner.begin}, map.a, map.d, origin_x, origin_y, job, row);
  if (job.rgb) {
    inner_pixels<true>(image.data, stride, inner, scratch, job, row);
  } else {
    inner_pixels<false>(image.data, stride, inner, scratch, job, row);
  }
  edge_pixels(image, {inner.end, job.width}, map.a, map.d, origin_x, origin_y, job, row);
}

template <class T>
void warp_all(const Job& job, T* out) {
  const std::int64_t rows = job.count * job.height;
  const std::int64_t row_values = std::int64_t{job.width} * 3;
#pragma omp parallel if (rows * job.width > kSerialPixels)
  {
    Scratch scratch(job.width);
#pragma omp for schedule(static)
    for (std::int64_t r = 0; r < rows; ++r) {
      warp_row(job, r / job.height, static_cast<int>(r % job.height), scratch);
      T* target = out + r * row_values;
      for (std::int64_t i = 0; i < row_values; ++i) target[i] = from_float<T>(scratch.row[i]);
    }
  }
}

void check_crops(const Job& job) {
  for (std::int64_t n = 0; n < job.count; ++n) {
    const std::int64_t height = job.sizes[2 * n], width = job.sizes[2 * n + 1];
    const std::int64_t start = job.offsets[n];
    if (height < 1 || width < 1 || start < 0 || start + height * width * 3 > job.bytes) {
      throw std::out_of_range("crop " + std::to_string(n) + " (" + std::to_string(height) + "x" +
                              std::to_string(width) + " at byte " + std::to_string(start) +
                              ") does not lie in the " + std::to_string(job.bytes) +
                              " bytes of pixels");
    }
  }
}

}  // namespace

void crop_normalize(Address pixels, std::int64_t bytes, Address offsets, Address sizes,
                    Address matrices, Address flips, std::int64_t count, int height, int width,
                    std::array<float, 3> scale, std::array<float, 3> bias, bool rgb, int dtype,
                    Address out) {
  const Job job{reinterpret_cast<const std::uint8_t*>(pixels),
                reinterpret_cast<const std::int64_t*>(offsets),
                reinterpret_cast<const std::int32_t*>(sizes),
                reinterpret_cast<const float*>(matrices),
                reinterpret_cast<const std::uint8_t*>(flips),
                {scale[0], scale[1], scale[2], 0.0f},
                {bias[0], bias[1], bias[2], 0.0f},
                bytes,
                count,
                height,
                width,
                rgb};
  check_crops(job);
  dispatch_dtype(dtype, [&](auto element) {
    warp_all(job, reinterpret_cast<decltype(element)*>(out));
  });
}

}  // namespace pnfs
