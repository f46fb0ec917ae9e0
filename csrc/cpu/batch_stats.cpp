// Driver of batch_stats: pnfs/kernels/batch_stats.py has the definition, mix_kernels.h the
// arithmetic. One read; sums are taken about a value near the mean, and merged in float64.

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "cpu/mix_driver.h"
#include "cpu/ops.h"

namespace pnfs {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr std::int64_t kFirstPixels = 64;  // give the value that the first sums are taken about
// Pixels of one stream: few enough for sums in float32, and far enough apart for prefetchers.
constexpr std::int64_t kStreamPixels = 128;

using Size = std::array<std::int64_t, 3>;  // P, pixels of a part, C

// Of the pixels [at, end) of a part.
struct UnitSpread {
  const MixKernels& kernels;
  const void* map;  // the part's
  std::int64_t channels;
  int dtype;

  void operator()(std::int64_t at, std::int64_t end, float* about, Spread spread) const {
    float* first = about + padded(channels);
    float* second = first + padded(channels);
    const auto take = [&](std::int64_t streams, std::int64_t count) {
      std::fill_n(first, 2 * padded(channels), 0.0f);
      kernels.add_moments(dtype, {element(map, at * channels, dtype), streams, count, count,
                                  channels, about, first, second});
    };
    const std::int64_t known = std::min(kFirstPixels, end - at);
    std::fill_n(about, padded(channels), 0.0f);
    take(1, known);
    for (std::int64_t c = 0; c < channels; ++c) about[c] = first[c] / static_cast<float>(known);
    double before = 0;
    while (at < end) {
      const bool side_by_side = end - at >= Moments::kStreams * kStreamPixels;
      const std::int64_t streams = side_by_side ? Moments::kStreams : 1;
      const std::int64_t count = std::min(kStreamPixels, end - at);
      take(streams, count);
      const double pixels = static_cast<double>(streams * count);
      for (std::int64_t c = 0; c < channels; ++c) {
        const double mean = first[c] / pixels;
        spread.merge(before, c, pixels, about[c] + mean, second[c] - first[c] * mean);
      }
      std::copy_n(spread.mean, channels, about);
      before += pixels;
      at += streams * count;
    }
  }
};

void column_stats(Address x, std::int64_t part_stride, float* mean, float* variance,
                  const Size& size, int dtype) {
  const std::int64_t parts = size[0], channels = size[2];
  const Cut cut(size[1], channels);
  const std::int64_t units = size[1] == 0 ? 0 : parts * cut.units_per_part;
  const MixKernels& kernels = mix_kernels();
  std::vector<double> values(std::max<std::int64_t>(1, parts * cut.units_per_part) * 2 * channels);
  const auto spread = [&](std::int64_t unit) {
    double* means = values.data() + unit * 2 * channels;
    return Spread{means, means + channels};
  };
#pragma omp parallel if (units > 1)
  {
    static thread_local Workspace memory;
    float* scratch = memory.floats(3 * padded(channels));
#pragma omp for schedule(static)
    for (std::int64_t unit = 0; unit < units; ++unit) {
      const std::int64_t p = unit / cut.units_per_part, u = unit % cut.units_per_part;
      const void* map = element(reinterpret_cast<const void*>(x), p * part_stride, dtype);
      UnitSpread{kernels, map, channels, dtype}(cut.begin(u), cut.end(u), scratch, spread(unit));
    }
  }
  const double pixels = static_cast<double>(size[1]);
  for (std::int64_t p = 0; p < parts; ++p) {
    Spread total = spread(p * cut.units_per_part);
    for (std::int64_t u = 1; u < cut.units_per_part; ++u) {
      const Spread more = spread(p * cut.units_per_part + u);
      const double before = static_cast<double>(cut.begin(u));
      const double count = static_cast<double>(cut.end(u)) - before;
      for (std::int64_t c = 0; c < channels; ++c) {
        total.merge(before, c, count, more.mean[c], more.squares[c]);
      }
    }
    for (std::int64_t c = 0; c < channels; ++c) {
      const std::int64_t at = p * channels + c;
      mean[at] = static_cast<float>(size[1] == 0 ? kNan : total.mean[c]);
      variance[at] = static_cast<float>(size[1] == 0 ? kNan : total.squares[c] / pixels);
    }
  }
}

}  // namespace

// A channel count that is no multiple of a vector's fills rows of several pixels: each channel then
// stands in several columns of as many pixels, whose statistics are merged.
void batch_stats(Address x, std::int64_t part_stride, Address mean, Address variance,
                 const Size& size, int dtype) {
  const std::int64_t parts = size[0], channels = size[2];
  const std::int64_t pixels_per_row = kGroup / std::gcd(channels, kGroup);
  const std::int64_t width = channels * pixels_per_row;
  float* const to_mean = reinterpret_cast<float*>(mean);
  float* const to_variance = reinterpret_cast<float*>(variance);
  if (pixels_per_row == 1 || size[1] == 0 || size[1] % pixels_per_row != 0) {
    return column_stats(x, part_stride, to_mean, to_variance, size, dtype);
  }
  std::vector<float> columns(2 * parts * width);
  const float *means = columns.data(), *variances = means + parts * width;
  column_stats(x, part_stride, columns.data(), columns.data() + parts * width,
               {parts, size[1] / pixels_per_row, width}, dtype);
  const double share = 1.0 / static_cast<double>(pixels_per_row);
  for (std::int64_t p = 0; p < parts; ++p, means += width, variances += width) {
    for (std::int64_t c = 0; c < channels; ++c) {
      double mean_of = 0, variance_of = 0;
      for (std::int64_t i = c; i < width; i += channels) mean_of += share * means[i];
      for (std::int64_t i = c; i < width; i += channels) {
        const double apart = means[i] - mean_of;
        variance_of += share * (variances[i] + apart * apart);
      }
      to_mean[p * channels + c] = static_cast<float>(mean_of);
      to_variance[p * channels + c] = static_cast<float>(variance_of);
    }
  }
}

// gx = g_mean / M + 2 g_variance (x - mean) / M
void batch_stats_backward(Address x, std::int64_t part_stride, Address mean, Address g_mean,
                          Address g_variance, Address gx, const Size& size, int dtype) {
  const std::int64_t parts = size[0], channels = size[2];
  const Cut cut(size[1], channels);
  const std::int64_t units = parts * cut.units_per_part;
  const MixKernels& kernels = mix_kernels();
  const auto of = [](Address tensor) { return reinterpret_cast<const float*>(tensor); };
  const double inverse = 1.0 / static_cast<double>(std::max<std::int64_t>(1, size[1]));
  const void* from = reinterpret_cast<const void*>(x);
  void* to = reinterpret_cast<void*>(gx);
  const bool streams = worth_streaming(to, parts * size[1] * channels, channels, dtype);
#pragma omp parallel if (units > 1)
  {
    static thread_local Workspace memory;
    float* values = memory.floats(kCoefficients * padded(channels));
#pragma omp for schedule(static)
    for (std::int64_t unit = 0; unit < units; ++unit) {
      const std::int64_t p = unit / cut.units_per_part, u = unit % cut.units_per_part;
      for (std::int64_t c = 0; c < channels; ++c) {
        const std::int64_t at = p * channels + c;
        values[interleaved(c, 0, kCoefficients)] = of(mean)[at];
        values[interleaved(c, 1, kCoefficients)] =
            static_cast<float>(2.0 * inverse * of(g_variance)[at]);
        values[interleaved(c, 2, kCoefficients)] = static_cast<float>(inverse * of(g_mean)[at]);
      }
      const std::int64_t at = p * part_stride + cut.begin(u) * channels;
      const TermOfMap term{{values, 1.0f, kNoFloor, false}, element(from, at, dtype)};
      AddTerms run{};
      run.terms = &term;
      run.how_many = 1;
      run.count = cut.end(u) - cut.begin(u);
      run.channels = channels;
      run.out = element(to, (p * cut.pixels + cut.begin(u)) * channels, dtype);
      run.streams = streams;
      run.floor = kNoFloor;
      kernels.add_terms(dtype, run);
    }
  }
}

}  // namespace pnfs
