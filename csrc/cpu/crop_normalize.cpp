// Affine crop, flip, channel order and normalisation of uint8 images: pnfs/kernels/crop_normalize.py
// has the definition.
//
// An output row is a straight line through the source, so the columns whose four taps are all inside
// are one interval. There a pixel is two loads of two neighbours and a dozen vector operations (without
// AVX2 four loads of one); the columns beside it take the careful path of core/bilinear.h.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__SSE4_1__)
#include <immintrin.h>
#endif

#include "core/bilinear.h"
#include "core/dtypes.h"
#include "cpu/ops.h"

namespace pnfs {
namespace {

typedef float Floats4 __attribute__((vector_size(16)));
typedef std::int32_t Ints4 __attribute__((vector_size(16)));
typedef std::uint16_t Shorts8 __attribute__((vector_size(16)));
typedef std::uint8_t Bytes16 __attribute__((vector_size(16)));

constexpr std::int64_t kMaxCropBytes = 0x7fffffff;  // so that 32 bits address a crop
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
  explicit Scratch(std::size_t width) : offset(width), fx(width), fy(width), row(3 * width) {}
  std::vector<std::int32_t> offset;  // bytes from the crop's start to the upper left tap
  std::vector<float> fx, fy, row;
};

#if defined(__AVX2__) && defined(__FMA__)
constexpr std::int64_t kOverrun = 2;  // bytes that a pixel's loads read past its right tap

// Two neighbours and two bytes after them.
inline __m256 load_pair(const std::uint8_t* address) {
  std::int64_t bytes;
  std::memcpy(&bytes, address, sizeof bytes);
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bytes)));
}

// Between the four taps of a pixel, the channels in their order or turned, and a lane of no meaning.
template <bool kTurned>
inline Floats4 between_taps(const std::uint8_t* address, std::int32_t stride, float fx, float fy) {
  const __m256 upper = load_pair(address), lower = load_pair(address + stride);
  const __m256 both = _mm256_fmadd_ps(_mm256_set1_ps(fy), _mm256_sub_ps(lower, upper), upper);
  const __m256i lanes = kTurned ? _mm256_setr_epi32(2, 1, 0, 0, 5, 4, 3, 3)
                                : _mm256_setr_epi32(0, 1, 2, 2, 3, 4, 5, 5);
  const __m256 parted = _mm256_permutevar8x32_ps(both, lanes);
  const __m128 left = _mm256_castps256_ps128(parted), right = _mm256_extractf128_ps(parted, 1);
  return _mm_fmadd_ps(_mm_set1_ps(fx), _mm_sub_ps(right, left), left);
}
#else
constexpr std::int64_t kOverrun = 1;

// A pixel and the byte after it as floats. Without the intrinsics the bytes are interleaved with
// zeros (little-endian), because compilers convert a vector of bytes one element at a time.
inline Floats4 load_tap(const std::uint8_t* address) {
#if defined(__SSE4_1__)
  std::int32_t bytes;
  std::memcpy(&bytes, address, sizeof bytes);
  return _mm_cvtepi32_ps(_mm_cvtepu8_epi32(_mm_cvtsi32_si128(bytes)));
#else
  std::int32_t word;
  std::memcpy(&word, address, sizeof word);
  const auto bytes = (Bytes16)Ints4{word, 0, 0, 0};
  const auto shorts = (Shorts8)__builtin_shufflevector(bytes, Bytes16{}, 0, 16, 1, 17, 2, 18, 3, 19,
                                                       4, 20, 5, 21, 6, 22, 7, 23);
  const auto ints = (Ints4)__builtin_shufflevector(shorts, Shorts8{}, 0, 8, 1, 9, 2, 10, 3, 11);
  return __builtin_convertvector(ints, Floats4);
#endif
}

// Between the four taps of a pixel, the channels in their order or turned, and a lane of no meaning.
template <bool kTurned>
inline Floats4 between_taps(const std::uint8_t* address, std::int32_t stride, float fx, float fy) {
  const Floats4 upper_left = load_tap(address), upper_right = load_tap(address + 3);
  const Floats4 lower_left = load_tap(address + stride);
  const Floats4 lower_right = load_tap(address + stride + 3);
  const Floats4 left = upper_left + fy * (lower_left - upper_left);
  const Floats4 right = upper_right + fy * (lower_right - upper_right);
  const Floats4 value = left + fx * (right - left);
  return kTurned ? __builtin_shufflevector(value, value, 2, 1, 0, 3) : value;
}
#endif

// A source coordinate along an output row.
struct Line {
  double slope, origin;
  double at(int x) const { return slope * x + origin; }
};

struct Interval {
  int begin, end;
};

// Columns in [0, limit) for which `inside` holds, given that it holds on one interval and that
// [low, high] is that interval up to rounding.
template <class Inside>
Interval exact_interval(double low, double high, int limit, Inside inside) {
  if (!(low <= high)) return {0, 0};
  int begin = static_cast<int>(std::clamp(std::floor(low) - 1.0, 0.0, double(limit)));
  int end = static_cast<int>(std::clamp(std::ceil(high) + 2.0, 0.0, double(limit)));
  while (begin < end && !inside(begin)) ++begin;
  while (begin < end && !inside(end - 1)) --end;
  return {begin, end};
}

// Narrows [low, high] to the x with begin <= line.at(x) < end.
void narrow(const Line& line, double begin, double end, double& low, double& high) {
  if (line.slope == 0.0 || !std::isfinite(line.slope) || !std::isfinite(line.origin)) {
    if (!(line.slope == 0.0 && line.origin >= begin && line.origin < end)) high = low - 1.0;
    return;
  }
  const double at_begin = (begin - line.origin) / line.slope;
  const double at_end = (end - line.origin) / line.slope;
  low = std::max(low, std::min(at_begin, at_end));
  high = std::min(high, std::max(at_begin, at_end));
}

constexpr double kOne = 4294967296.0;  // 2^32

// Fills scratch for `columns`, whose positions are all inside by `margin_of` or more. In fixed point
// with 32 fractional bits: twice as fast as double, and more exact than float weights can show.
void place_taps(const Line& x, const Line& y, std::int32_t stride, Interval columns,
                Scratch& scratch) {
  const int count = columns.end - columns.begin;
  if (count == 0) return;
  const auto start_x = static_cast<std::int64_t>(x.at(columns.begin) * kOne);
  const auto start_y = static_cast<std::int64_t>(y.at(columns.begin) * kOne);
  // A single column may lie on a line too steep for 64 bits.
  const auto step_x = static_cast<std::int64_t>(count > 1 ? x.slope * kOne : 0.0);
  const auto step_y = static_cast<std::int64_t>(count > 1 ? y.slope * kOne : 0.0);
  std::int32_t* __restrict offset = scratch.offset.data() + columns.begin;
  float* __restrict fx = scratch.fx.data() + columns.begin;
  float* __restrict fy = scratch.fy.data() + columns.begin;
  for (int i = 0; i < count; ++i) {
    const std::int64_t sx = start_x + step_x * i, sy = start_y + step_y * i;
    offset[i] = static_cast<std::int32_t>(sy >> 32) * stride + static_cast<std::int32_t>(sx >> 32) * 3;
    fx[i] = static_cast<float>(static_cast<std::uint32_t>(sx) >> 8) * 0x1p-24f;
    fy[i] = static_cast<float>(static_cast<std::uint32_t>(sy) >> 8) * 0x1p-24f;
  }
}

// How far from the border a position must be so that rounding does not carry it across: the steps'
// in place_taps, and that of a double of the size of an image.
double margin_of(int columns) { return columns / kOne + 1e-6; }

template <bool kRgb>
void inner_pixels(const std::uint8_t* image, std::int32_t stride, Interval columns,
                  const Scratch& scratch, const Job& job, float* row) {
  Floats4 scale, bias;
  std::memcpy(&scale, job.scale, sizeof scale);
  std::memcpy(&bias, job.bias, sizeof bias);
  const std::int32_t* offset = scratch.offset.data();
  const float *fx = scratch.fx.data(), *fy = scratch.fy.data();
  for (int x = columns.begin; x < columns.end; ++x) {
    const Floats4 grey = between_taps<kRgb>(image + offset[x], stride, fx[x], fy[x]);
    const Floats4 value = grey * scale + bias;
    std::memcpy(row + 3 * x, &value, sizeof value);  // the fourth lane: overwritten by the next
  }
}

void edge_pixels(ByteImage image, Interval columns, const Line& sx, const Line& sy, const Job& job,
                 float* row) {
  for (int x = columns.begin; x < columns.end; ++x) {
    float value[3];
    bilinear(image, sx.at(x), sy.at(x), value);
    for (int c = 0; c < 3; ++c) {
      row[3 * x + c] = value[job.rgb ? 2 - c : c] * job.scale[c] + job.bias[c];
    }
  }
}

// One output row in float32.
void warp_row(const Job& job, std::int64_t n, int y, Scratch& scratch, float* row) {
  const ByteImage image{job.pixels + job.offsets[n], job.sizes[2 * n], job.sizes[2 * n + 1]};
  const Affine map = load_affine(job.matrices + 6 * n, job.flips[n] != 0, job.width);
  const Line sx{map.a, map.b * y + map.c}, sy{map.d, map.e * y + map.f};
  const std::int32_t stride = image.width * 3;

  // Where the loads would leave the buffer, what touches the crop's last row takes the careful path.
  const bool at_end = job.offsets[n] + std::int64_t{stride} * image.height > job.bytes - kOverrun;
  const double margin = margin_of(job.width);
  const double end_x = image.width - 1 - margin, end_y = image.height - (at_end ? 2 : 1) - margin;
  double low = 0.0, high = job.width - 1.0;
  narrow(sx, margin, end_x, low, high);
  narrow(sy, margin, end_y, low, high);
  // Pixels are stored four floats at a time, which the row's last column has no room for.
  const Interval inner = exact_interval(low, high, job.width - 1, [&](int x) {
    const double at_x = sx.at(x), at_y = sy.at(x);
    return at_x >= margin && at_x < end_x && at_y >= margin && at_y < end_y;
  });
  place_taps(sx, sy, stride, inner, scratch);
  edge_pixels(image, {0, inner.begin}, sx, sy, job, row);
  if (job.rgb) {
    inner_pixels<true>(image.data, stride, inner, scratch, job, row);
  } else {
    inner_pixels<false>(image.data, stride, inner, scratch, job, row);
  }
  edge_pixels(image, {inner.end, job.width}, sx, sy, job, row);
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
      const std::int64_t n = r / job.height;
      const int y = static_cast<int>(r % job.height);
      T* target = out + r * row_values;
      if constexpr (std::is_same_v<T, float>) {
        warp_row(job, n, y, scratch, target);
      } else {
        const float* row = scratch.row.data();
        warp_row(job, n, y, scratch, scratch.row.data());
        for (std::int64_t i = 0; i < row_values; ++i) target[i] = from_float<T>(row[i]);
      }
    }
  }
}

void check_crops(const Job& job) {
  for (std::int64_t n = 0; n < job.count; ++n) {
    const std::int64_t height = job.sizes[2 * n], width = job.sizes[2 * n + 1];
    const std::int64_t start = job.offsets[n], length = height * width * 3;
    if (length > kMaxCropBytes) {
      throw std::out_of_range("crop " + std::to_string(n) + " has more than 2 GiB");
    }
    if (height < 1 || width < 1 || start < 0 || start > job.bytes - length) {
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
