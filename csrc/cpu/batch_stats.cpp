// Mean and variance per part and channel: pnfs/kernels/batch_stats.py has the definition. One read;
// a tile's sums are taken about the mean of the tiles before it, and merged in float64.

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "cpu/channels.h"
#include "cpu/ops.h"

namespace pnfs {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

using Size = std::array<std::int64_t, 3>;  // P, pixels of a part, C

// Count, mean and Σ (x - mean)² per channel of the pixels so far.
struct Moments {
  double* mean;
  double* squares;

  // Adds `count` pixels of mean `other` and spread `other_squares` to `before` pixels.
  void merge(double before, std::int64_t c, double count, double other, double other_squares) {
    const double share = count / (before + count), difference = other - mean[c];
    mean[c] += share * difference;
    squares[c] += other_squares + difference * difference * before * share;
  }
};

// first[c] = Σ (x - about) and second[c] = Σ (x - about)² of a tile.
template <class T>
void tile_sums(const T* x, std::int64_t count, std::int64_t channels, const float* about,
               float* first, float* second) {
  for_channel_groups(channels, [&](const auto& group) {
    constexpr int kVectors = std::decay_t<decltype(group)>::kVectors;
    FloatLanes shift[kVectors], sum[kVectors] = {}, squares[kVectors] = {};
    for (int v = 0; v < kVectors; ++v) shift[v] = group.load(about, v);
    for (std::int64_t i = 0; i < count; ++i) {
      for (int v = 0; v < kVectors; ++v) {
        const FloatLanes d = group.load(x + i * channels, v) - shift[v];
        sum[v] += d;
        squares[v] += d * d;
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      group.store(first, v, sum[v]);
      group.store(second, v, squares[v]);
    }
  });
}

template <class T>
void unit_moments(const T* x, const Cut& cut, std::int64_t u, std::int64_t channels,
                  Scratch& scratch, Moments moments) {
  float* about = scratch.data();
  float* first = about + channels;
  float* second = first + channels;
  double before = 0;
  cut.for_tiles(u, [&](std::int64_t at, std::int64_t count) {
    const T* tile = x + at * channels;
    if (before == 0) {  // nothing is known yet: the tile's own mean, from sums about its first pixel
      for (std::int64_t c = 0; c < channels; ++c) about[c] = load(tile + c);
      tile_sums(tile, count, channels, about, first, second);
      for (std::int64_t c = 0; c < channels; ++c) {
        about[c] += first[c] / static_cast<float>(count);
      }
    } else {
      std::copy_n(moments.mean, channels, about);
    }
    tile_sums(tile, count, channels, about, first, second);
    for (std::int64_t c = 0; c < channels; ++c) {
      const double mean = first[c] / static_cast<double>(count);
      moments.merge(before, c, static_cast<double>(count), about[c] + mean,
                    second[c] - first[c] * mean);
    }
    before += static_cast<double>(count);
  });
}

template <class T>
void forward(const T* x, std::int64_t part_stride, const Size& size, float* mean, float* variance) {
  const std::int64_t channels = size[2];
  const Cut cut(size[1], channels);
  const std::int64_t units = size[0] * cut.units_per_part;
  std::vector<double> values(units * 2 * channels);  // per unit: means, then Σ (x - mean)²
  const auto moments = [&](std::int64_t unit) {
    double* means = values.data() + unit * 2 * channels;
    return Moments{means, means + channels};
  };
#pragma omp parallel if (units > 1)
  {
    Scratch scratch(3 * channels);
#pragma omp for schedule(static)
    for (std::int64_t unit = 0; unit < units; ++unit) {
      unit_moments(x + unit / cut.units_per_part * part_stride, cut, unit % cut.units_per_part,
                   channels, scratch, moments(unit));
    }
  }
  const double pixels = static_cast<double>(size[1]);
  for (std::int64_t p = 0; p < size[0]; ++p) {
    Moments total = moments(p * cut.units_per_part);
    for (std::int64_t u = 1; u < cut.units_per_part; ++u) {
      const Moments more = moments(p * cut.units_per_part + u);
      const double before = static_cast<double>(u * cut.unit);
      const double count = std::min(static_cast<double>(cut.unit), pixels - before);
      for (std::int64_t c = 0; c < channels; ++c) {
        total.merge(before, c, count, more.mean[c], more.squares[c]);
      }
    }
    for (std::int64_t c = 0; c < channels; ++c) {
      mean[p * channels + c] = static_cast<float>(size[1] == 0 ? kNan : total.mean[c]);
      variance[p * channels + c] = static_cast<float>(total.squares[c] / pixels);
    }
  }
}

// gx = g_mean / M + 2 g_variance (x - mean) / M
template <class T>
void backward(const T* x, std::int64_t part_stride, const float* mean, const float* g_mean,
              const float* g_variance, const Size& size, T* gx) {
  const std::int64_t channels = size[2];
  const Cut cut(size[1], channels);
  const std::int64_t units = size[0] * cut.units_per_part;
  const float inverse = 1.0f / static_cast<float>(std::max<std::int64_t>(1, size[1]));
#pragma omp parallel for schedule(static) if (units > 1)
  for (std::int64_t unit = 0; unit < units; ++unit) {
    const std::int64_t p = unit / cut.units_per_part;
    cut.for_tiles(unit % cut.units_per_part, [&](std::int64_t at, std::int64_t count) {
      for_channel_groups(channels, [&](const auto& group) {
        constexpr int kVectors = std::decay_t<decltype(group)>::kVectors;
        FloatLanes centre[kVectors], slope[kVectors], shift[kVectors];
        for (int v = 0; v < kVectors; ++v) {
          centre[v] = group.load(mean + p * channels, v);
          slope[v] = group.load(g_variance + p * channels, v) * (2.0f * inverse);
          shift[v] = group.load(g_mean + p * channels, v) * inverse;
        }
        const T* from = x + p * part_stride + at * channels;
        T* to = gx + (p * cut.pixels + at) * channels;
        for (std::int64_t i = 0; i < count * channels; i += channels) {
          for (int v = 0; v < kVectors; ++v) {
            group.store(to + i, v, (group.load(from + i, v) - centre[v]) * slope[v] + shift[v]);
          }
        }
      });
    });
  }
}

}  // namespace

void batch_stats(Address x, std::int64_t part_stride, Address mean, Address variance,
                 const Size& size, int dtype) {
  dispatch_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    forward(reinterpret_cast<const T*>(x), part_stride, size, reinterpret_cast<float*>(mean),
            reinterpret_cast<float*>(variance));
  });
}

void batch_stats_backward(Address x, std::int64_t part_stride, Address mean, Address g_mean,
                          Address g_variance, Address gx, const Size& size, int dtype) {
  dispatch_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    backward(reinterpret_cast<const T*>(x), part_stride, reinterpret_cast<const float*>(mean),
             reinterpret_cast<const float*>(g_mean), reinterpret_cast<const float*>(g_variance),
             size, reinterpret_cast<T*>(gx));
  });
}

}  // namespace pnfs
