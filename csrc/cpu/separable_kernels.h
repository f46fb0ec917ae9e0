// The kernels of separable_conv for one instruction set: a band of rows of one image, a few rows at
// a time in cache. separable_conv.h has the interface and the letters.
#pragma once

#include "cpu/gemm.h"
#include "cpu/rows.h"
#include "cpu/separable_conv.h"

namespace pnfs {
namespace {

// A block of rows has about this many pixels: enough that the tiles of a product hide their stores,
// few enough that it stays in the first two caches.
constexpr std::int64_t kBlockPixels = 48;

struct Sizes {
  std::int64_t c, o;        // channels, padded
  std::int64_t c_step;      // floats from pixel to pixel with C channels
  std::int64_t o_step;      // and with O channels
  std::int64_t rows;        // of a block
  std::int64_t pixels;      // of a block
  std::int64_t ring_rows;   // that a block and its neighbours take
  std::int64_t row_floats;  // of a padded row with C channels
  RowLayout row;

  explicit Sizes(const SeparableShape& shape) {
    c = round_up(shape.c, kChannelStep);
    o = round_up(shape.o, kChannelStep);
    c_step = c + kChannelStep;
    o_step = o + kChannelStep;
    rows = larger(1, smaller(kBlockPixels / shape.w, shape.h));
    pixels = rows * shape.w;
    ring_rows = rows + 2 * shape.dilation;
    row_floats = (shape.w + 2 * shape.dilation) * c_step;
    row = {shape.w, c, c_step, shape.dilation, shape.dilation};
  }
};

// z of `pixels` adjacent pixels.
template <class T>
void load_pixels(const SeparableShape& shape, const Sizes& sizes, const SeparablePart& part,
                 const T* x, std::int64_t pixels, float* z) {
  for (std::int64_t i = 0; i < pixels; ++i) {
    for (std::int64_t channel = 0; channel < sizes.c; channel += kWidth) {
      store(z + channel, load_z(part.on_load, x, channel, shape.c));
    }
    x += shape.c;
    z += sizes.c_step;
  }
}

// y without bias at one pixel: what the sums for the statistics are taken relative to, lest they
// cancel where the mean is far larger than the standard deviation.
template <class T>
void pixel_without_bias(const SeparableShape& shape, const Sizes& sizes, const SeparablePart& part,
                        const T* x, std::int64_t row, std::int64_t column, float* t,
                        const float* zeros, float* out) {
  const std::int64_t d = shape.dilation;
  for (std::int64_t channel = 0; channel < sizes.c; channel += kWidth) {
    Vec sum = {};
    for (int tap = 0; tap < (d == 0 ? 1 : 9); ++tap) {
      const std::int64_t i = row + (tap / 3 - 1) * d, j = column + (tap % 3 - 1) * d;
      if (i < 0 || i >= shape.h || j < 0 || j >= shape.w) continue;
      const Vec z = load_z(part.on_load, x + (i * shape.w + j) * shape.c, channel, shape.c);
      sum += d == 0 ? z : load(part.taps + tap * sizes.c + channel) * z;
    }
    store(t + channel, sum);
  }
  multiply({t, 0, 1}, {part.pointwise, shape.c, 0}, {out, 0, zeros, 0}, 1, sizes.o,
           shape.c, {reinterpret_cast<const char*>(t), 0});
}

template <class T>
void forward_band(const SeparableShape& shape, const SeparablePart& part, const ForwardBand& band,
                  float* memory) {
  const Sizes sizes(shape);
  const T* x = static_cast<const T*>(band.x);
  T* y = static_cast<T*>(band.y);
  const std::int64_t d = shape.dilation, x_row = shape.w * shape.c;
  Scratch scratch{memory};
  float* t = scratch.take(sizes.pixels * sizes.c_step);
  float* block = scratch.take(sizes.pixels * sizes.o_step);
  const float* zeros = scratch.zeros(sizes.o);
  const Ring z = d > 0 ? scratch.ring(sizes.ring_rows, sizes.row_floats, shape.h) : Ring{};
  if (shape.stats) {
    const std::int64_t middle = (band.first + band.last) / 2;
    pixel_without_bias(shape, sizes, part, x, middle, shape.w / 2, t, zeros, band.shift);
    std::memset(band.sum, 0, static_cast<std::size_t>(sizes.o) * sizeof(float));
    std::memset(band.square, 0, static_cast<std::size_t>(sizes.o) * sizeof(float));
  }
  const RowResult result{shape.o,   sizes.o_step, shape.stats, shape.streams,
                         part.bias, band.shift,   band.sum,    band.square};
  std::int64_t loaded = larger(0, band.first - d);  // the next row to load
  for (std::int64_t row = band.first; row < band.last; row += sizes.rows) {
    const std::int64_t end = smaller(row + sizes.rows, band.last);
    const std::int64_t pixels = (end - row) * shape.w;
    if (d == 0) {
      load_pixels(shape, sizes, part, x + row * x_row, pixels, t);
      loaded = end;
    }
    for (; loaded < smaller(end + d, shape.h); ++loaded) {
      load_pixels(shape, sizes, part, x + loaded * x_row, shape.w,
             z.padded(loaded) + d * sizes.c_step);
    }
    for (std::int64_t r = row; d > 0 && r < end; ++r) {
      depthwise_row(sizes.row, 1, part.taps, z, r, t + (r - row) * shape.w * sizes.c_step);
    }
    const auto next = prefetch_during(x + loaded * x_row, sizes.rows * x_row * sizeof(T), pixels,
                                      sizes.o, shape.c);
    multiply({t, sizes.c_step, 1}, {part.pointwise, shape.c, 0},
             {block, sizes.o_step, zeros, 0}, pixels, sizes.o, shape.c, next);
    store_result(result, block, pixels, y + row * shape.w * shape.o);
  }
  if (shape.streams) finish_streams();
}

// The gradient of the whole y for `pixels` adjacent pixels.
template <class T>
void load_gradient(const SeparableShape& shape, const Sizes& sizes, const SeparablePart& part,
                   const T* y, const T* gy, std::int64_t pixels, float* g) {
  for (std::int64_t i = 0; i < pixels; ++i) {
    for (std::int64_t channel = 0; channel < sizes.o; channel += kWidth) {
      const Vec v =
          whole_gradient(shape.stats, part.add, part.times, y, gy, channel, shape.o);
      store(g + channel, v);
    }
    gy += shape.o;
    y += shape.stats ? shape.o : 0;
    g += sizes.o_step;
  }
}

void add_columns(const Sizes& sizes, const float* g, std::int64_t pixels, float* sum) {
  for (std::int64_t channel = 0; channel < sizes.o; channel += kWidth) {
    Vec total = load(sum + channel);
    for (std::int64_t i = 0; i < pixels; ++i) total += load(g + i * sizes.o_step + channel);
    store(sum + channel, total);
  }
}

// Takes z's gradient of one vector of channels, pixel after pixel, to x's and stores that, on top of
// `more` if it is given. Fetches a vector from `next` on for every pixel.
template <class T>
struct StoreGradient {
  const T *x, *more, *next;
  T* to;
  std::int64_t step, row, count;
  bool streams;
  Unnormalise to_x;

  // x, gx and more point to the first pixel.
  PNFS_INLINE_MEMBER StoreGradient(const SeparableShape& shape, const SeparablePart& part,
                                   const BackwardBand& band, const T* x_, const T* more_, T* gx,
                                   const T* next_, std::int64_t channel)
      : x(x_ + channel),
        more(more_ == nullptr ? nullptr : more_ + channel),
        next(next_),
        to(gx + channel),
        step(shape.c),
        row(shape.w * shape.c),
        count(shape.c - channel),
        streams(shape.streams),
        to_x(part.on_load, band.z_sum, band.z_dot, channel) {}

  PNFS_INLINE_MEMBER void operator()(Vec gradient) {
    __builtin_prefetch(next, 0, 2);
    next += kWidth;
    Vec v = to_x(x, count, gradient);
    if (more != nullptr) {
      __builtin_prefetch(more + row, 0, 2);
      v += load_part(more, count);
      more += step;
    }
    streams ? stream(to, v) : store_part(to, v, count);
    x += step;
    to += step;
  }
};

// The same as a sink of depthwise_gradient_row.
template <class T>
struct GradientSink {
  const SeparableShape& shape;
  const SeparablePart& part;
  const BackwardBand& band;
  const T *x, *more;
  T* gx;
  StoreGradient<T> store_next;

  PNFS_INLINE_MEMBER GradientSink(const SeparableShape& shape_, const SeparablePart& part_,
                                  const BackwardBand& band_, const T* x_, const T* more_, T* gx_,
                                  const T* next)
      : shape(shape_),
        part(part_),
        band(band_),
        x(x_),
        more(more_),
        gx(gx_),
        store_next(shape_, part_, band_, x_, more_, gx_, next, 0) {}

  PNFS_INLINE_MEMBER void start(std::int64_t channel) {
    store_next = StoreGradient<T>(shape, part, band, x, more, gx, store_next.next, channel);
  }
  PNFS_INLINE_MEMBER void pixel(Vec, Vec gradient) { store_next(gradient); }
  PNFS_INLINE_MEMBER void finish() const { store_next.to_x.save(); }
};

// From z's gradient to x's for `pixels` pixels without depthwise convolution.
template <class T>
void plain_gradient(const SeparableShape& shape, const Sizes& sizes, const SeparablePart& part,
                    const BackwardBand& band, const float* gz, std::int64_t pixels, const T* x,
                    const T* more, T* gx, const T* next) {
  for (std::int64_t channel = 0; channel < shape.c; channel += kWidth) {
    StoreGradient<T> store_next(shape, part, band, x, more, gx, next, channel);
    for (std::int64_t i = 0; i < pixels; ++i) store_next(load(gz + i * sizes.c_step + channel));
    store_next.to_x.save();
    next = store_next.next;
  }
}

// Everything that a band's blocks share.
template <class T>
struct BackwardWork {
  const SeparableShape& shape;
  const SeparablePart& part;
  const BackwardBand& band;
  const Sizes sizes;
  const T *x, *y, *gy, *more;
  T* gx;
  float *g, *t, *gt_block, *zeros;
  Ring z, gt;
  bool fresh;

  BackwardWork(const SeparableShape& shape_, const SeparablePart& part_, const BackwardBand& band_,
               float* memory)
      : shape(shape_), part(part_), band(band_), sizes(shape_), fresh(band_.fresh) {
    x = static_cast<const T*>(band.x);
    y = static_cast<const T*>(band.y);
    gy = static_cast<const T*>(band.gy);
    more = static_cast<const T*>(band.more);
    gx = static_cast<T*>(band.gx);
    Scratch scratch{memory};
    g = scratch.take(sizes.pixels * sizes.o_step);
    t = scratch.take(sizes.pixels * sizes.c_step);
    gt_block = scratch.take(sizes.pixels * sizes.c_step);
    zeros = scratch.zeros(sizes.c);
    z = shape.dilation > 0 ? scratch.ring(sizes.ring_rows, sizes.row_floats, shape.h) : Ring{};
    gt = shape.dilation > 0 ? scratch.ring(sizes.ring_rows, sizes.row_floats, shape.h) : Ring{};
  }

  std::int64_t x_at(std::int64_t row) const { return row * shape.w * shape.c; }
  std::int64_t y_at(std::int64_t row) const { return row * shape.w * shape.o; }
  const T* more_at(std::int64_t row) const { return more == nullptr ? nullptr : more + x_at(row); }

  // t's gradient = g · pointwise for `pixels` pixels; meanwhile fetches the next block's gy.
  void pointwise_gradient(const float* from, std::int64_t pixels, float* to, Prefetch& next) {
    multiply({from, sizes.o_step, 1}, {part.pointwise, shape.o, 0},
             {to, sizes.c_step, zeros, 0}, pixels, sizes.c, shape.o, next);
    next.at += next.step * shape.o * (pixels / kTileRows) * (sizes.c / kPanel);
  }

  // The weights' gradient (O, C) += gᵀ · t; meanwhile fetches the next block's y.
  void weight_gradient(const float* from, std::int64_t pixels, std::int64_t next_row) {
    const std::int64_t bytes = shape.stats ? sizes.pixels * shape.o * sizeof(T) : 0;
    const T* next = shape.stats ? y + y_at(next_row) : y;
    multiply<2>({from, 1, sizes.o_step}, {t, 1, sizes.c_step},
                {band.pointwise, sizes.c, fresh ? zeros : band.pointwise, fresh ? 0 : sizes.c},
                shape.o, sizes.c, pixels,
                prefetch_during<2>(next, bytes, shape.o, sizes.c, pixels));
    fresh = false;
  }

  void run() {
    const std::int64_t d = shape.dilation, w = shape.w;
    // t's gradient is needed d rows beyond the band.
    const std::int64_t start = larger(0, band.first - d), stop = smaller(band.last + d, shape.h);
    std::int64_t loaded = start;      // the next row of x to load
    std::int64_t done = band.first;   // the next row of x's gradient
    for (std::int64_t row = start; row < stop; row += sizes.rows) {
      const std::int64_t end = smaller(row + sizes.rows, stop);
      // Rows of the block that are the band's own.
      const std::int64_t own = larger(row, band.first), own_end = smaller(end, band.last);
      const std::int64_t own_pixels = larger(0, own_end - own) * w;
      const float* own_g = g + (own - row) * w * sizes.o_step;
      const T* before = shape.stats ? y + y_at(row) : nullptr;
      load_gradient(shape, sizes, part, before, gy + y_at(row), (end - row) * w, g);
      if (band.bias != nullptr) add_columns(sizes, own_g, own_pixels, band.bias);
      Prefetch next = prefetch_during(gy + y_at(end), sizes.pixels * shape.o * sizeof(T),
                                      sizes.pixels, sizes.c, shape.o);
      if (d == 0) {
        pointwise_gradient(g, own_pixels, gt_block, next);
        load_pixels(shape, sizes, part, x + x_at(row), own_pixels, t);
        weight_gradient(g, own_pixels, end);
        plain_gradient(shape, sizes, part, band, gt_block, own_pixels, x + x_at(row), more_at(row),
                       gx + x_at(row), x + x_at(end));
        continue;
      }
      for (std::int64_t r = row; r < end; ++r) {
        pointwise_gradient(g + (r - row) * w * sizes.o_step, w, gt.padded(r) + d * sizes.c_step,
                           next);
      }
      for (; loaded < smaller(own_end + d, shape.h); ++loaded) {
        load_pixels(shape, sizes, part, x + x_at(loaded), w, z.padded(loaded) + d * sizes.c_step);
      }
      for (std::int64_t r = own; r < own_end; ++r) {
        depthwise_row(sizes.row, 1, part.taps, z, r, t + (r - own) * w * sizes.c_step);
      }
      weight_gradient(own_g, own_pixels, end);
      // Rows whose neighbours below are there, or lie outside the image.
      const std::int64_t ready = end == stop ? band.last : smaller(end - d, band.last);
      for (std::int64_t ahead = loaded; done < ready; ++done, ++ahead) {
        depthwise_gradient_row(sizes.row, shape.c, part.taps, band.taps, z, gt, done,
                               GradientSink<T>(shape, part, band, x + x_at(done), more_at(done),
                                               gx + x_at(done), x + x_at(ahead)));
      }
    }
    if (shape.streams) finish_streams();
  }
};

std::int64_t panels(std::int64_t columns) { return count_panels(columns, kChannelStep); }

void pack_forward(const SeparableShape& shape, const float* pointwise, std::int64_t panel,
                  float* packed) {
  pack_panel(pointwise, 1, shape.c, shape.c, shape.o, kChannelStep, panel, packed);
}

void pack_backward(const SeparableShape& shape, const float* pointwise, std::int64_t panel,
                   float* packed) {
  pack_panel(pointwise, shape.c, 1, shape.o, shape.c, kChannelStep, panel, packed);
}

std::int64_t ring_floats(const SeparableShape& shape, const Sizes& sizes) {
  return shape.dilation > 0 ? (sizes.ring_rows + 1) * sizes.row_floats : 0;
}

std::size_t forward_scratch(const SeparableShape& shape) {
  const Sizes sizes(shape);
  return static_cast<std::size_t>(sizes.pixels * (sizes.c_step + sizes.o_step) + sizes.o +
                                  ring_floats(shape, sizes));
}

std::size_t backward_scratch(const SeparableShape& shape) {
  const Sizes sizes(shape);
  return static_cast<std::size_t>(sizes.pixels * (2 * sizes.c_step + sizes.o_step) + sizes.c +
                                  2 * ring_floats(shape, sizes));
}

void forward(int dtype, const SeparableShape& shape, const SeparablePart& part,
             const ForwardBand& band, float* scratch) {
  dtype == 0 ? forward_band<float>(shape, part, band, scratch)
             : forward_band<BFloat16>(shape, part, band, scratch);
}

void backward(int dtype, const SeparableShape& shape, const SeparablePart& part,
              const BackwardBand& band, float* scratch) {
  dtype == 0 ? BackwardWork<float>(shape, part, band, scratch).run()
             : BackwardWork<BFloat16>(shape, part, band, scratch).run();
}

constexpr SeparableKernels kKernels = {panels,           pack_forward, pack_backward, forward_scratch,
                                       backward_scratch, forward,      backward};

}  // namespace
}  // namespace pnfs
