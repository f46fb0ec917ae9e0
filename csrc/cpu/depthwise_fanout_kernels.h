// The kernels of depthwise_fanout for one instruction set: a band of rows of one image, the rows that
// the stencils reach in cache. depthwise_fanout.h has the interface and the letters, rows.h the layout
// of the rows.
//
// Backward, the gradients of the results stand where the windows' centres are, with zeros between
// them for a stride of 2; so a pixel of x gathers from its neighbours like a convolution's.
#pragma once

#include "core/stencils.h"
#include "cpu/depthwise_fanout.h"
#include "cpu/rows.h"

namespace pnfs {
namespace {

struct FanoutSizes {
  std::int64_t c, step;             // channels padded, floats from pixel to pixel
  std::int64_t out_h, out_w;        // of a result
  std::int64_t border, row_floats;  // columns of zeros on each side, floats of such a row
  std::int64_t z_rows, g_rows;      // that the rings hold

  explicit FanoutSizes(const FanoutShape& shape) {
    c = round_up(shape.c, kChannelStep);
    step = c + kChannelStep;
    out_h = (shape.h - 1) / shape.stride + 1;
    out_w = (shape.w - 1) / shape.stride + 1;
    border = shape.reach;
    row_floats = (shape.w + 2 * border) * step;
    z_rows = g_rows = 2 * shape.reach + 1;
  }

  RowLayout row(const FanoutShape& shape, std::int64_t dilation) const {
    return {shape.w, c, step, dilation, border};
  }
};

// Loads row y of x as z.
template <class T>
void load_z_row(const FanoutShape& shape, const FanoutSizes& sizes, const OnLoad& on_load,
                const T* x, std::int64_t y, const Ring& z) {
  float* to = z.padded(y) + sizes.border * sizes.step;
  x += y * shape.w * shape.c;
  for (std::int64_t i = 0; i < shape.w; ++i) {
    for (std::int64_t channel = 0; channel < sizes.c; channel += kWidth) {
      store(to + channel, load_z(on_load, x, channel, shape.c));
    }
    x += shape.c;
    to += sizes.step;
  }
}

// The three rows of windows whose centres are in one row of x, from the first pixel on.
struct WindowRows {
  const float* row[3];  // null: outside the image
  std::int64_t step, w;

  WindowRows(const FanoutSizes& sizes, const FanoutShape& shape, const Ring& z, std::int64_t y)
      : step(sizes.step), w(shape.w) {
    for (int i = 0; i < 3; ++i) {
      const std::int64_t at = y + i - 1;
      row[i] = at < 0 || at >= shape.h ? nullptr : z.padded(at) + sizes.border * step;
    }
  }
  bool has(int tap, std::int64_t x) const {
    const std::int64_t column = x + tap % 3 - 1;
    return row[tap / 3] != nullptr && column >= 0 && column < w;
  }
  PNFS_INLINE_MEMBER Vec at(int tap, std::int64_t x, std::int64_t channel) const {
    return load(row[tap / 3] + (x + tap % 3 - 1) * step + channel);
  }
};

// A NaN wins, and of several the last, as in torch.
PNFS_INLINE IntVec wins(Vec value, Vec best) { return (value > best) | (value != value); }

void average_row(const FanoutShape& shape, const FanoutSizes& sizes, const Ring& z, std::int64_t y,
                 float* t) {
  const float* row[3];
  for (int i = 0; i < 3; ++i) row[i] = z.padded(y + i - 1) + (sizes.border - 1) * sizes.step;
  for (std::int64_t x = 0; x < shape.w; x += shape.stride) {
    const Vec weight = fill(average_weight(shape.h, shape.w, y, x));
    for (std::int64_t channel = 0; channel < sizes.c; channel += kWidth) {
      Vec sum = {};
#pragma GCC unroll 3
      for (int j = 0; j < 3; ++j) {
        const std::int64_t at = (x + j) * sizes.step + channel;
        sum += load(row[0] + at) + load(row[1] + at) + load(row[2] + at);
      }
      store(t + channel, sum * weight);
    }
    t += sizes.step;
  }
}

// The largest value of every window and, where `which` is not null, the tap that has it, the first
// of equal ones, as a float; pixels of the results are `result_step` floats apart.
void max_row(const FanoutShape& shape, const FanoutSizes& sizes, const Ring& z, std::int64_t y,
             float* t, float* which, std::int64_t result_step) {
  const WindowRows rows(sizes, shape, z, y);
  for (std::int64_t x = 0; x < shape.w; x += shape.stride) {
    int taps[9], count = 0;
    for (int tap = 0; tap < 9; ++tap) {
      if (rows.has(tap, x)) taps[count++] = tap;
    }
    for (std::int64_t channel = 0; channel < sizes.c; channel += kWidth) {
      Vec best = rows.at(taps[0], x, channel), from = fill(static_cast<float>(taps[0]));
      for (int i = 1; i < count; ++i) {
        const Vec value = rows.at(taps[i], x, channel);
        const IntVec larger_value = wins(value, best);
        best = larger_value ? value : best;
        from = larger_value ? fill(static_cast<float>(taps[i])) : from;
      }
      if (t != nullptr) store(t + channel, best);
      if (which != nullptr) store(which + channel, from);
    }
    if (t != nullptr) t += result_step;
    if (which != nullptr) which += result_step;
  }
}

// Row `row` of a stencil's result.
void stencil_row(const FanoutShape& shape, const FanoutSizes& sizes, const FanoutStencil& stencil,
                 const Ring& z, std::int64_t row, float* t) {
  const std::int64_t y = row * shape.stride;
  if (stencil.kind == kAveragePool) return average_row(shape, sizes, z, y, t);
  if (stencil.kind == kMaxPool) return max_row(shape, sizes, z, y, t, nullptr, sizes.step);
  depthwise_row(sizes.row(shape, stencil.kind), shape.stride, stencil.taps, z, y, t);
}

template <class T>
void forward_band(const FanoutShape& shape, const OnLoad& on_load, const FanoutBand& band,
                  float* memory) {
  const FanoutSizes sizes(shape);
  const T* x = static_cast<const T*>(band.x);
  Scratch scratch{memory};
  float* t = scratch.take(sizes.out_w * sizes.step);
  const Ring z = scratch.ring(sizes.z_rows, sizes.row_floats, shape.h);
  const auto load_through = [&](std::int64_t from, std::int64_t row) {
    const std::int64_t last = smaller(row * shape.stride + shape.reach, shape.h - 1);
    for (; from <= last; ++from) load_z_row(shape, sizes, on_load, x, from, z);
    return from;
  };
  if (shape.stats) {
    // Sums for the statistics are taken relative to a pixel in the middle, lest they cancel where
    // the mean is far larger than the standard deviation.
    const std::int64_t middle = (band.first + band.last) / 2;
    load_through(larger(0, middle * shape.stride - shape.reach), middle);
    for (std::int64_t s = 0; s < shape.stencils; ++s) {
      const FanoutStencil& stencil = band.stencils[s];
      const std::size_t bytes = static_cast<std::size_t>(sizes.c) * sizeof(float);
      stencil_row(shape, sizes, stencil, z, middle, t);
      std::memcpy(stencil.centre, t + sizes.out_w / 2 * sizes.step, bytes);
      std::memset(stencil.sum, 0, bytes);
      std::memset(stencil.square, 0, bytes);
    }
  }
  std::int64_t loaded = larger(0, band.first * shape.stride - shape.reach);
  for (std::int64_t row = band.first; row < band.last; ++row) {
    loaded = load_through(loaded, row);
    for (std::int64_t s = 0; s < shape.stencils; ++s) {
      const FanoutStencil& stencil = band.stencils[s];
      stencil_row(shape, sizes, stencil, z, row, t);
      const RowResult result{shape.c, sizes.step,     shape.stats, shape.streams,
                             nullptr, stencil.centre, stencil.sum, stencil.square};
      store_result(result, t, sizes.out_w, static_cast<T*>(stencil.y) + row * sizes.out_w * shape.c);
    }
  }
  if (shape.streams) finish_streams();
}

// Loads row `row` of a result's gradient, for an average pool with the windows' weights.
template <class T>
void load_gradient_row(const FanoutShape& shape, const FanoutSizes& sizes,
                       const FanoutStencil& stencil, std::int64_t row, const Ring& g) {
  const std::int64_t y = row * shape.stride;
  float* to = g.padded(y) + sizes.border * sizes.step;
  const std::int64_t at = row * sizes.out_w * shape.c;
  const T* gy = static_cast<const T*>(stencil.gy) + at;
  const T* value = shape.stats ? static_cast<const T*>(stencil.y) + at : nullptr;
  for (std::int64_t x = 0; x < shape.w; x += shape.stride) {
    const Vec weight =
        fill(stencil.kind == kAveragePool ? average_weight(shape.h, shape.w, y, x) : 1.0f);
    for (std::int64_t channel = 0; channel < sizes.c; channel += kWidth) {
      const Vec v = whole_gradient(shape.stats, stencil.add, stencil.times, value, gy, channel,
                                   shape.c);
      store(to + channel, v * weight);
    }
    gy += shape.c;
    value += shape.stats ? shape.c : 0;
    to += shape.stride * sizes.step;
  }
}

// Stores z's gradient, or adds it to what is there.
struct AddSink {
  float* row;
  std::int64_t step;
  bool add;
  float* to = nullptr;

  PNFS_INLINE_MEMBER void start(std::int64_t channel) { to = row + channel; }
  PNFS_INLINE_MEMBER void pixel(Vec, Vec gradient) {
    store(to, add ? load(to) + gradient : gradient);
    to += step;
  }
  PNFS_INLINE_MEMBER void finish() const {}
};

// z's gradient in row y through a pool: `weight(i, j, at)` is what the window (1 - i, 1 - j) pixels
// away gives, at that offset of its row.
template <class Weight>
PNFS_INLINE void pool_gradient_row(const FanoutShape& shape, const FanoutSizes& sizes, AddSink sink,
                                   Weight weight) {
  for (std::int64_t x = 0; x < shape.w; ++x) {
    for (std::int64_t channel = 0; channel < sizes.c; channel += kWidth) {
      Vec sum = {};
      for (int i = 0; i < 3; ++i) {
        for (int j = 0; j < 3; ++j) {
          sum += weight(i, j, (x + sizes.border + 1 - j) * sizes.step + channel);
        }
      }
      sink.start(channel);
      sink.pixel(Vec{}, sum);
    }
    sink.row += sizes.step;
  }
}

// From z's gradient in one row to x's.
template <class T>
void store_gradient_row(const FanoutShape& shape, const FanoutSizes& sizes, const OnLoad& on_load,
                        const FanoutBand& band, const float* gz, const T* x, T* gx) {
  for (std::int64_t channel = 0; channel < shape.c; channel += kWidth) {
    Unnormalise to_x(on_load, band.z_sum, band.z_dot, channel);
    const std::int64_t count = shape.c - channel;
    for (std::int64_t i = 0; i < shape.w; ++i) {
      const std::int64_t at = i * shape.c + channel;
      const Vec v = to_x(x + at, count, load(gz + i * sizes.step + channel));
      shape.streams ? stream(gx + at, v) : store_part(gx + at, v, count);
    }
    to_x.save();
  }
}

template <class T>
void backward_band(const FanoutShape& shape, const OnLoad& on_load, const FanoutBand& band,
                   float* memory) {
  const FanoutSizes sizes(shape);
  const T* x = static_cast<const T*>(band.x);
  T* gx = static_cast<T*>(band.gx);
  Scratch scratch{memory};
  float* gz = scratch.take(shape.w * sizes.step);
  const Ring z = scratch.ring(sizes.z_rows, sizes.row_floats, shape.h);
  Ring g[kMaxStencils], which[kMaxStencils];  // the gradients; the taps that have the maximum
  for (std::int64_t s = 0; s < shape.stencils; ++s) {
    g[s] = scratch.ring(sizes.g_rows, sizes.row_floats, shape.h, shape.stride);
    if (band.stencils[s].kind == kMaxPool) {
      which[s] = scratch.ring(sizes.g_rows, sizes.row_floats, shape.h, shape.stride);
    }
  }
  std::int64_t row = larger(0, band.first - shape.reach);  // the next whose windows are wanted
  std::int64_t loaded = shape.max_pool ? larger(0, row - 1) : band.first;  // the next row of x
  const auto load_through = [&](std::int64_t last) {
    for (; loaded <= smaller(last, shape.h - 1); ++loaded) {
      load_z_row(shape, sizes, on_load, x, loaded, z);
    }
  };
  for (std::int64_t y = band.first; y < band.last; ++y) {
    for (; row <= smaller(y + shape.reach, shape.h - 1); ++row) {
      if (row % shape.stride != 0) continue;
      if (shape.max_pool) load_through(row + 1);
      for (std::int64_t s = 0; s < shape.stencils; ++s) {
        const FanoutStencil& stencil = band.stencils[s];
        load_gradient_row<T>(shape, sizes, stencil, row / shape.stride, g[s]);
        if (stencil.kind == kMaxPool) {
          max_row(shape, sizes, z, row, nullptr, which[s].padded(row) + sizes.border * sizes.step,
                  shape.stride * sizes.step);
        }
      }
    }
    load_through(y);
    for (std::int64_t s = 0; s < shape.stencils; ++s) {
      const FanoutStencil& stencil = band.stencils[s];
      const AddSink sink{gz, sizes.step, s > 0};
      if (stencil.kind != kAveragePool && stencil.kind != kMaxPool) {
        depthwise_gradient_row(sizes.row(shape, stencil.kind), sizes.c, stencil.taps,
                               stencil.tap_gradients, z, g[s], y, sink);
        continue;
      }
      const float *from[3], *winners[3];
      for (int i = 0; i < 3; ++i) {
        from[i] = g[s].padded(y + 1 - i);
        winners[i] = stencil.kind == kMaxPool ? which[s].padded(y + 1 - i) : nullptr;
      }
      if (stencil.kind == kAveragePool) {
        pool_gradient_row(shape, sizes, sink,
                          [&](int i, int, std::int64_t at) { return load(from[i] + at); });
      } else {
        pool_gradient_row(shape, sizes, sink, [&](int i, int j, std::int64_t at) {
          const Vec tap = fill(static_cast<float>(3 * i + j));
          return load(winners[i] + at) == tap ? load(from[i] + at) : Vec{};
        });
      }
    }
    const std::int64_t at = y * shape.w * shape.c;
    store_gradient_row(shape, sizes, on_load, band, gz, x + at, gx + at);
  }
  if (shape.streams) finish_streams();
}

std::int64_t ring_floats(const FanoutSizes& sizes, std::int64_t rows) {
  return (rows + 1) * sizes.row_floats;
}

std::size_t forward_scratch(const FanoutShape& shape) {
  const FanoutSizes sizes(shape);
  return static_cast<std::size_t>(sizes.out_w * sizes.step + ring_floats(sizes, sizes.z_rows));
}

std::size_t backward_scratch(const FanoutShape& shape) {
  const FanoutSizes sizes(shape);
  const std::int64_t rings = shape.stencils * (shape.max_pool ? 2 : 1);
  return static_cast<std::size_t>(shape.w * sizes.step + ring_floats(sizes, sizes.z_rows) +
                                  rings * ring_floats(sizes, sizes.g_rows));
}

void forward(int dtype, const FanoutShape& shape, const OnLoad& on_load, const FanoutBand& band,
             float* scratch) {
  dtype == 0 ? forward_band<float>(shape, on_load, band, scratch)
             : forward_band<BFloat16>(shape, on_load, band, scratch);
}

void backward(int dtype, const FanoutShape& shape, const OnLoad& on_load, const FanoutBand& band,
              float* scratch) {
  dtype == 0 ? backward_band<float>(shape, on_load, band, scratch)
             : backward_band<BFloat16>(shape, on_load, band, scratch);
}

constexpr FanoutKernels kKernels = {forward_scratch, backward_scratch, forward, backward};

}  // namespace
}  // namespace pnfs
