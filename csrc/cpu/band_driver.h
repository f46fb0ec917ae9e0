// What the drivers of ops that work on bands of rows share, see cpu/bands.h: how images are cut, the
// memory for it, and the sums that the bands return.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "cpu/bands.h"
#include "cpu/ops.h"
#include "cpu/workspace.h"

namespace pnfs {
namespace {

constexpr std::int64_t kForwardPixels = 1024;  // of a band: few enough for sums in float32
constexpr std::int64_t kItems = 24;            // pieces of work that let threads balance
constexpr std::int64_t kFewItems = 8;
constexpr std::int64_t kStreamBytes = 1 << 20;  // results from this size on bypass the caches
constexpr Address kLine = 64;

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
inline std::int64_t padded(std::int64_t channels) {
  return ceil_div(channels, kChannelStep) * kChannelStep;
}

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// Whether a result of this many pixels is stored past the caches; a pixel has `bytes` bytes.
inline bool worth_streaming(Address result, std::int64_t pixels, std::int64_t channels,
                            std::int64_t bytes) {
  return pixels * bytes >= kStreamBytes && result % kLine == 0 && channels % kChannelStep == 0 &&
         bytes % static_cast<std::int64_t>(kLine) == 0;
}

// Rows of an image in `count` bands of equal height, but for the last.
struct Bands {
  std::int64_t rows, count;

  Bands(std::int64_t height, std::int64_t wanted)
      : rows(std::max<std::int64_t>(1, ceil_div(height, std::max<std::int64_t>(1, wanted)))),
        count(ceil_div(height, rows)) {}
};

// Cuts a caller's memory into arrays, each on a cache line.
struct Cutter {
  float* memory;
  std::size_t used = 0;

  float* take(std::size_t floats) {
    float* piece = memory == nullptr ? nullptr : memory + used;
    used += (floats + kChannelStep - 1) / kChannelStep * kChannelStep;
    return piece;
  }
};

// `rows` rows of `from` to padded rows; null is `missing` throughout.
inline void copy_padded(const float* from, std::int64_t rows, std::int64_t length,
                        std::int64_t step, float* to, float missing = 0.0f) {
  std::fill_n(to, rows * step, from == nullptr ? missing : 0.0f);
  if (from == nullptr) return;
  for (std::int64_t row = 0; row < rows; ++row) {
    std::copy_n(from + row * length, length, to + row * step);
  }
}

// Depthwise weights (P, C, 9) to (P, 9, padded C).
inline void copy_taps(const float* from, std::int64_t parts, std::int64_t channels, float* to) {
  const std::int64_t step = padded(channels);
  std::fill_n(to, parts * 9 * step, 0.0f);
  for (std::int64_t p = 0; p < parts; ++p) {
    for (std::int64_t c = 0; c < channels; ++c) {
      for (std::int64_t tap = 0; tap < 9; ++tap) {
        to[(p * 9 + tap) * step + c] = from[(p * channels + c) * 9 + tap];
      }
    }
  }
}

// The way back, for one part.
inline void copy_tap_gradients(const float* from, std::int64_t channels, float* to) {
  for (std::int64_t c = 0; c < channels; ++c) {
    for (std::int64_t tap = 0; tap < 9; ++tap) to[c * 9 + tap] = from[tap * padded(channels) + c];
  }
}

// Addresses of mean, var, gamma and beta, (P, C) float32 each, or of their gradients; 0 is none.
using Norm = std::array<Address, 4>;

// The constants of OnLoad for all parts, (P, padded C) each.
struct NormConstants {
  std::int64_t parts, channels;
  float *mean, *rstd, *scale, *shift;  // scale = rstd·gamma

  NormConstants(Cutter& cutter, std::int64_t parts_, std::int64_t channels_)
      : parts(parts_), channels(channels_) {
    for (float** array : {&mean, &rstd, &scale, &shift}) *array = cutter.take(parts * step());
  }

  std::int64_t step() const { return padded(channels); }

  void fill(const Norm& norm, double eps) const {
    const std::int64_t count = parts * step();
    copy(norm[0], mean, 0.0f);
    copy(norm[1], rstd, 1.0f);
    for (std::int64_t i = 0; norm[1] != 0 && i < count; ++i) {
      rstd[i] = static_cast<float>(1.0 / std::sqrt(static_cast<double>(rstd[i]) + eps));
    }
    copy(norm[2], scale, 1.0f);
    for (std::int64_t i = 0; i < count; ++i) scale[i] *= rstd[i];
    copy(norm[3], shift, 0.0f);
  }

  OnLoad part(std::int64_t p, const Norm& norm, std::int64_t activation) const {
    const std::int64_t at = p * step();
    return {mean + at, scale + at, shift + at, norm[0] != 0, activation};
  }

  // From Σg and Σg·(x - mean) of one part, (padded C); g is the gradient of what the activation takes.
  void write_gradients(std::int64_t p, const float* sum, const float* dot, const Norm& to) const {
    const auto put = [&](Address array, std::int64_t c, float value) {
      if (array != 0) pointer<float>(array)[p * channels + c] = value;
    };
    for (std::int64_t c = 0; c < channels; ++c) {
      const float r = rstd[p * step() + c], s = scale[p * step() + c];
      put(to[0], c, -s * sum[c]);
      put(to[1], c, -0.5f * r * r * s * dot[c]);
      put(to[2], c, r * dot[c]);
      put(to[3], c, sum[c]);
    }
  }

 private:
  void copy(Address from, float* to, float missing) const {
    copy_padded(pointer<const float>(from), parts, channels, step(), to, missing);
  }
};

// Results (P, N, C, H, W) in bands, every band with its sums: padded C values each.
struct ResultBands {
  std::int64_t p, n, c, h, w;
  Bands bands;

  std::int64_t items() const { return p * n * bands.count; }
};

// Mean and biased variance from the bands' sums: in float64, band after band. `bias`: (P, padded C)
// or null, not in the sums yet.
inline void finish_stats(const ResultBands& of, const float* bias, const float* shift,
                         const float* sum, const float* square, float* mean, float* var) {
  const std::int64_t step = padded(of.c), per_part = of.n * of.bands.count;
#pragma omp parallel for schedule(static)
  for (std::int64_t i = 0; i < of.p * of.c; ++i) {
    const std::int64_t p = i / of.c, channel = i % of.c;
    double count = 0, total_mean = 0, m2 = 0;
    for (std::int64_t j = 0; j < per_part; ++j) {
      const std::int64_t first = j % of.bands.count * of.bands.rows;
      const double pixels = static_cast<double>(std::min(of.bands.rows, of.h - first) * of.w);
      const std::int64_t at = (p * per_part + j) * step + channel;
      const double offset = sum[at] / pixels;
      const double distance = shift[at] + offset - total_mean;
      m2 += square[at] - offset * sum[at] + distance * distance * count * pixels / (count + pixels);
      total_mean += distance * pixels / (count + pixels);
      count += pixels;
    }
    mean[i] = static_cast<float>(total_mean + (bias == nullptr ? 0 : bias[p * step + channel]));
    var[i] = static_cast<float>(std::max(0.0, m2 / count));
  }
}

// What the gradients of mean and variance add to that of the map: add + times·y, (P, padded C) each.
inline void fill_gradient_constants(std::int64_t parts, std::int64_t channels, std::int64_t count,
                                    const float* mean, const float* g_mean, const float* g_var,
                                    float* add, float* times) {
  const double pixels = static_cast<double>(count);
  const std::int64_t step = padded(channels);
  for (std::int64_t i = 0; i < parts * step; ++i) {
    const std::int64_t c = i % step, at = i / step * channels + c;
    if (c >= channels) {
      times[i] = add[i] = 0;
      continue;
    }
    const double slope = 2.0 * g_var[at] / pixels;
    times[i] = static_cast<float>(slope);
    add[i] = static_cast<float>(g_mean[at] / pixels - slope * mean[at]);
  }
}

// Adds the pieces of each part, `floats` each, into the part's first one, piece after piece.
inline void reduce_pieces(std::int64_t floats, std::int64_t parts, std::int64_t pieces,
                          float* all) {
  constexpr std::int64_t kChunk = 1024;
  const std::int64_t chunks = ceil_div(floats, kChunk);
#pragma omp parallel for schedule(static)
  for (std::int64_t i = 0; i < parts * chunks; ++i) {
    float* part = all + i / chunks * pieces * floats;
    const std::int64_t first = i % chunks * kChunk;
    const std::int64_t last = std::min(first + kChunk, floats);
    for (std::int64_t piece = 1; piece < pieces; ++piece) {
      const float* from = part + piece * floats;
      for (std::int64_t j = first; j < last; ++j) part[j] += from[j];
    }
  }
}

}  // namespace
}  // namespace pnfs
