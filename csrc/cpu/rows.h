// Rows of an image in scratch memory, for kernels that keep a few of them in cache: 3×3 depthwise
// stencils over them, and the way of a finished row to memory.
//
// Rows are float32 with columns of zeros on both sides. Their pixels are a line further apart than
// the channels need: with a power of two they would crowd into a few sets of the cache.
//
// Included by sources that are compiled once per instruction set, see cpu/simd.h.
#pragma once

#include "cpu/bands.h"
#include "cpu/simd.h"

namespace pnfs {
namespace {

// A row of pixels in scratch memory.
struct RowLayout {
  std::int64_t w;
  std::int64_t c;         // channels, padded
  std::int64_t c_step;    // floats from pixel to pixel
  std::int64_t dilation;  // of the stencil; the row has at least as many columns of zeros before it
  std::int64_t border;    // how many it has
};

// The latest rows of an image, each in its slot; rows outside the image are zeros, and so are those
// between the rows that a ring with a stride holds.
struct Ring {
  float* slots;
  float* zeros;
  std::int64_t count, row_floats, height;
  std::int64_t stride = 1;

  float* padded(std::int64_t y) const {
    if (y < 0 || y >= height || y % stride != 0) return zeros;
    return slots + y / stride % count * row_floats;
  }
};

// Cuts a band's scratch memory into pieces.
struct Scratch {
  float* memory;

  float* take(std::int64_t floats) {
    float* piece = memory;
    memory += round_up(floats, kChannelStep);
    return piece;
  }
  float* zeros(std::int64_t floats) {
    float* piece = take(floats);
    std::memset(piece, 0, static_cast<std::size_t>(floats) * sizeof(float));
    return piece;
  }
  Ring ring(std::int64_t rows, std::int64_t row_floats, std::int64_t height,
            std::int64_t stride = 1) {
    float* slots = zeros(rows * row_floats);
    return {slots, zeros(row_floats), rows, row_floats, height, stride};
  }
};

PNFS_INLINE Vec activated(std::int64_t activation, Vec v) {
  if (activation == 0) return v;
  v = relu(v);
  return activation == 2 ? (v > 6.0f ? fill(6.0f) : v) : v;
}

// z of one vector of channels of the pixel at x.
template <class T>
PNFS_INLINE Vec load_z(const OnLoad& how, const T* x, std::int64_t channel, std::int64_t channels) {
  Vec v = load_part(x + channel, channels - channel);
  if (how.normalised) {
    v = (v - load(how.mean + channel)) * load(how.scale + channel) + load(how.shift + channel);
  }
  return activated(how.activation, v);
}

// One vector of channels: from z's gradient to x's, with the sums Σg and Σg·(x - mean); g is the
// gradient of what the activation takes.
struct Unnormalise {
  bool plain;
  std::int64_t activation;
  float *sum_at, *dot_at;
  Vec mean, scale, shift, sum, dot;

  PNFS_INLINE_MEMBER Unnormalise(const OnLoad& how, float* sums, float* dots, std::int64_t channel)
      : plain(!how.normalised && how.activation == 0),
        activation(how.activation),
        sum_at(sums + channel),
        dot_at(dots + channel),
        mean(load(how.mean + channel)),
        scale(load(how.scale + channel)),
        shift(load(how.shift + channel)),
        sum(load(sum_at)),
        dot(load(dot_at)) {}

  // `x` has `count` channels from here on.
  template <class T>
  PNFS_INLINE_MEMBER Vec operator()(const T* x, std::int64_t count, Vec gradient) {
    if (plain) return gradient;
    const Vec distance = load_part(x, count) - mean;
    const Vec before = distance * scale + shift;
    if (activation != 0) gradient = before > 0.0f ? gradient : Vec{};
    if (activation == 2) gradient = before < 6.0f ? gradient : Vec{};
    sum += gradient;
    dot += gradient * distance;
    return gradient * scale;
  }

  PNFS_INLINE_MEMBER void save() const {
    store(sum_at, sum);
    store(dot_at, dot);
  }
};

// Depthwise 3×3 of z around row y, at every stride-th pixel.
PNFS_INLINE void depthwise_row(const RowLayout& row, std::int64_t stride, const float* taps,
                               const Ring& z, std::int64_t y, float* t) {
  const std::int64_t side = row.dilation * row.c_step, start = row.border * row.c_step - side;
  const float* above = z.padded(y - row.dilation) + start;
  const float* here = z.padded(y) + start;
  const float* below = z.padded(y + row.dilation) + start;
  for (std::int64_t channel = 0; channel < row.c; channel += kWidth) {
    Vec w[9];
#pragma GCC unroll 9
    for (int tap = 0; tap < 9; ++tap) w[tap] = load(taps + tap * row.c + channel);
    float* to = t + channel;
    for (std::int64_t at = channel; at < row.w * row.c_step; at += stride * row.c_step) {
      Vec sum = {};
#pragma GCC unroll 3
      for (int j = 0; j < 3; ++j) {
        sum += w[j] * load(above + at + j * side);
        sum += w[3 + j] * load(here + at + j * side);
        sum += w[6 + j] * load(below + at + j * side);
      }
      store(to, sum);
      to += row.c_step;
    }
  }
}

// From t's gradient to z's in row y, for the first `channels` channels, and the row's share of the
// taps' gradients. `sink` takes a vector of channels at a time: start(channel), pixel(z, gradient)
// from left to right, finish().
template <class Sink>
PNFS_INLINE void depthwise_gradient_row(const RowLayout& row, std::int64_t channels,
                                        const float* taps, float* tap_gradients, const Ring& z,
                                        const Ring& gt, std::int64_t y, Sink sink) {
  const std::int64_t step = row.c_step, side = row.dilation * step;
  const std::int64_t start = row.border * step - side;
  const float* above = gt.padded(y - row.dilation) + start;
  const float* here = gt.padded(y) + start;
  const float* below = gt.padded(y + row.dilation) + start;
  const float* z_row = z.padded(y) + row.border * step;
  for (std::int64_t channel = 0; channel < channels; channel += kWidth) {
    Vec w[9], gradient[9];
#pragma GCC unroll 9
    for (int tap = 0; tap < 9; ++tap) {
      w[tap] = load(taps + tap * row.c + channel);
      gradient[tap] = load(tap_gradients + tap * row.c + channel);
    }
    sink.start(channel);
    for (std::int64_t at = channel; at < row.w * step; at += step) {
      const Vec value = load(z_row + at);
      Vec sum = {};
      // t at (y - i·d, x - j·d) has read this pixel through tap (i, j), i and j of -1, 0, 1.
#pragma GCC unroll 3
      for (int j = 0; j < 3; ++j) {
        const Vec g_above = load(above + at + (2 - j) * side);
        const Vec g_here = load(here + at + (2 - j) * side);
        const Vec g_below = load(below + at + (2 - j) * side);
        sum += w[j] * g_below + w[3 + j] * g_here + w[6 + j] * g_above;
        gradient[j] += value * g_below;
        gradient[3 + j] += value * g_here;
        gradient[6 + j] += value * g_above;
      }
      sink.pixel(value, sum);
    }
#pragma GCC unroll 9
    for (int tap = 0; tap < 9; ++tap) {
      store(tap_gradients + tap * row.c + channel, gradient[tap]);
    }
    sink.finish();
  }
}

// Where finished pixels go: `channels` of them are adjacent in memory, in scratch memory pixels are
// `step` floats apart.
struct RowResult {
  std::int64_t channels, step;
  bool stats, streams;
  const float* bias;                   // or null
  float *shift, *sum, *square;         // with stats: sums of the distance from `shift`, without bias
};

// Adds the bias and stores `pixels` pixels, kVecs vectors of channels; adds to the sums.
template <int kVecs, class T>
PNFS_INLINE void store_result_channels(const RowResult& result, const float* block,
                                       std::int64_t pixels, std::int64_t channel, T* y) {
  Vec bias[kVecs], shift[kVecs], sum[kVecs], square[kVecs];
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) {
    const std::int64_t at = channel + v * kWidth;
    bias[v] = result.bias == nullptr ? Vec{} : load(result.bias + at);
    shift[v] = result.stats ? load(result.shift + at) : Vec{};
    sum[v] = square[v] = Vec{};
  }
  for (std::int64_t i = 0; i < pixels; ++i) {
    const float* from = block + i * result.step + channel;
    T* to = y + i * result.channels + channel;
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      const Vec value = load(from + v * kWidth);
      const Vec distance = value - shift[v];
      sum[v] += distance;
      square[v] += distance * distance;
      if (result.streams) {
        stream(to + v * kWidth, value + bias[v]);
      } else {
        store_part(to + v * kWidth, value + bias[v], result.channels - channel - v * kWidth);
      }
    }
  }
  if (!result.stats) return;
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) {
    const std::int64_t at = channel + v * kWidth;
    store(result.sum + at, load(result.sum + at) + sum[v]);
    store(result.square + at, load(result.square + at) + square[v]);
  }
}

template <class T>
void store_result(const RowResult& result, const float* block, std::int64_t pixels, T* y) {
  std::int64_t channel = 0;
  for (; channel + 4 * kWidth <= result.channels; channel += 4 * kWidth) {
    store_result_channels<4>(result, block, pixels, channel, y);
  }
  for (; channel < result.channels; channel += kWidth) {
    store_result_channels<1>(result, block, pixels, channel, y);
  }
}

// y's gradient from what came directly and what came through its statistics, gy + add + times·y.
template <class T>
PNFS_INLINE Vec whole_gradient(bool stats, const float* add, const float* times, const T* y,
                               const T* gy, std::int64_t channel, std::int64_t channels) {
  Vec v = load_part(gy + channel, channels - channel);
  if (stats) {
    v += load(add + channel) + load(times + channel) * load_part(y + channel, channels - channel);
  }
  return v;
}

}  // namespace
}  // namespace pnfs
