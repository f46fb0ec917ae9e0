// The kernels of strided_conv for one instruction set: a block of rows of one image at a time, in
// cache. strided_conv.h has the interface and the letters.
//
// A stride of 2 never mixes even and odd rows or columns within a tap: x is split into four planes by
// their parity. In these every tap is a shift, so that a tap of a whole block is one matrix product.
// Rows of a plane are a pixel longer than those of y. The odd columns begin with column -1, which is
// zero; where a row of y has no pixel its gradient is zero.
#pragma once

#include "cpu/gemm.h"
#include "cpu/mix.h"  // kGroup
#include "cpu/strided_conv.h"

namespace pnfs {
namespace {

struct Sizes {
  std::int64_t c, o;            // channels, padded
  std::int64_t c_step, o_step;  // floats from pixel to pixel: not a power of two, see below
  std::int64_t width;           // of a row of a plane, in pixels
  std::int64_t pixels;          // of a block and of a plane, at most
  std::int64_t plane_pixels;

  explicit Sizes(const StridedConvShape& shape) {
    c = round_up(shape.c, kGroup);
    o = round_up(shape.o, kGroup);
    c_step = c + kGroup;  // pixels a power of two apart would crowd into a few sets of the cache
    o_step = o + kGroup;
    width = shape.out_w + 1;
    pixels = shape.rows * width;
    plane_pixels = pixels + width + 1;  // a row before, or after, and the pixel after that
  }
};

PNFS_INLINE void clear_pixel(float* to, std::int64_t channels) {
  for (std::int64_t channel = 0; channel < channels; channel += kWidth) store(to + channel, Vec{});
}

// The four planes of x that rows [first, first + rows) of y read.
struct Planes {
  float* memory;
  std::int64_t floats, width, step;

  float* plane(bool odd_row, bool odd_column) const {
    return memory + (2 * odd_row + odd_column) * floats;
  }
  // Where the tap (i, j) of the block's first pixel lies.
  const float* tap(int i, int j) const {
    return plane(i != 1, j != 1) + ((i == 2) * width + (j == 2)) * step;
  }
};

template <class T>
void load_planes(const StridedConvShape& shape, const Sizes& sizes, const T* x, std::int64_t first,
                 std::int64_t rows, const Planes& planes) {
  const auto copy = [&](const T* row, std::int64_t column, float* to) {
    if (row == nullptr || column < 0 || column >= shape.w) return clear_pixel(to, sizes.c);
    const T* from = row + column * shape.c;
    for (std::int64_t channel = 0; channel < sizes.c; channel += kWidth) {
      store(to + channel, load_part(from + channel, shape.c - channel));
    }
  };
  for (int odd = 0; odd < 2; ++odd) {
    float* even_column = planes.plane(odd, false);
    float* odd_column = planes.plane(odd, true);
    for (std::int64_t r = 0; r < rows + odd; ++r) {
      const std::int64_t row = 2 * (first + r) - odd;
      const T* from = row < 0 || row >= shape.h ? nullptr : x + row * shape.w * shape.c;
      for (std::int64_t at = 0; at < sizes.width; ++at) {
        copy(from, 2 * at - 1, odd_column);
        copy(at < shape.out_w ? from : nullptr, 2 * at, even_column);
        odd_column += sizes.c_step;
        even_column += sizes.c_step;
      }
    }
    clear_pixel(even_column, sizes.c);  // what the last, missing pixel of y reads
    clear_pixel(odd_column, sizes.c);
  }
}

// Products one after the other that fetch memory for what follows.
struct Fetch {
  Prefetch next;

  void multiply_all(LeftMatrix left, RightMatrix right, ResultMatrix result, std::int64_t rows,
                    std::int64_t columns, std::int64_t depth) {
    multiply(left, right, result, rows, columns, depth, next);
    next.at += next.step * (rows / kTileRows) * (columns / kPanel) * depth;
  }
};

// Stores y of a block, kVecs vectors of channels, and takes its sums.
template <int kVecs, class T>
PNFS_INLINE void store_channels(const StridedConvShape& shape, const Sizes& sizes,
                                const StridedConvPart& part, const ForwardBand& block,
                                const float* from, std::int64_t channel, T* y) {
  Vec bias[kVecs], shift[kVecs], sum[kVecs], square[kVecs];
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) {
    bias[v] = load(part.bias + channel + v * kWidth);
    shift[v] = load(from + channel + v * kWidth);
    sum[v] = square[v] = Vec{};
  }
  for (std::int64_t r = 0; r < block.last - block.first; ++r) {
    const float* source = from + r * sizes.width * sizes.o_step + channel;
    T* to = y + r * shape.out_w * shape.o + channel;
    for (std::int64_t i = 0; i < shape.out_w; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        const Vec value = load(source + v * kWidth);
        const Vec distance = value - shift[v];
        sum[v] += distance;
        square[v] += distance * distance;
        if (shape.streams) {
          stream(to + v * kWidth, value + bias[v]);
        } else {
          store_part(to + v * kWidth, value + bias[v], shape.o - channel - v * kWidth);
        }
      }
      source += sizes.o_step;
      to += shape.o;
    }
  }
  if (!shape.stats) return;
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) {
    const std::int64_t at = channel + v * kWidth;
    store(block.shift + at, shift[v]);
    store(block.sum + at, sum[v]);
    store(block.square + at, square[v]);
  }
}

template <class T>
void forward_block(const StridedConvShape& shape, const StridedConvPart& part,
                   const ForwardBand& block, float* memory) {
  const Sizes sizes(shape);
  const T* x = static_cast<const T*>(block.x);
  T* y = static_cast<T*>(block.y) + block.first * shape.out_w * shape.o;
  const std::int64_t rows = block.last - block.first, pixels = rows * sizes.width;
  const Planes planes{memory, sizes.plane_pixels * sizes.c_step, sizes.width, sizes.c_step};
  float* result = memory + 4 * planes.floats;
  float* zeros = result + sizes.pixels * sizes.o_step;
  clear_pixel(zeros, sizes.o);
  load_planes(shape, sizes, x, block.first, rows, planes);
  const std::int64_t ahead = 2 * block.last * shape.w * shape.c;  // in x, the next block's
  Fetch fetch{prefetch_during(x + ahead, 2 * rows * shape.w * shape.c * sizeof(T), pixels, sizes.o,
                              kTaps * shape.c)};
  for (int tap = 0; tap < kTaps; ++tap) {
    fetch.multiply_all({planes.tap(tap / 3, tap % 3), sizes.c_step, 1},
                       {part.weight + tap * shape.c * sizes.o, shape.c, 0},
                       {result, sizes.o_step, tap == 0 ? zeros : result, tap == 0 ? 0 : sizes.o_step},
                       pixels, sizes.o, shape.c);
  }
  std::int64_t channel = 0;
  for (; channel + 4 * kWidth <= shape.o; channel += 4 * kWidth) {
    store_channels<4>(shape, sizes, part, block, result, channel, y);
  }
  for (; channel < shape.o; channel += kWidth) {
    store_channels<1>(shape, sizes, part, block, result, channel, y);
  }
  if (shape.streams) finish_streams();
}

// The gradient of the whole y in rows [first, end), zero outside the map; then a pixel of zeros.
template <class T>
void load_gradient(const StridedConvShape& shape, const Sizes& sizes, const StridedConvPart& part,
                   const StridedConvBackward& block, std::int64_t end, float* g) {
  const T* gy = static_cast<const T*>(block.gy);
  const T* y = shape.stats ? static_cast<const T*>(block.y) : nullptr;
  for (std::int64_t row = block.first; row < end; ++row) {
    const bool inside = row < shape.out_h;
    for (std::int64_t i = 0; i < shape.out_w; ++i, g += sizes.o_step) {
      const std::int64_t at = (row * shape.out_w + i) * shape.o;
      for (std::int64_t channel = 0; channel < sizes.o; channel += kWidth) {
        Vec v = {};
        if (inside) {
          v = load_part(gy + at + channel, shape.o - channel);
          if (shape.stats) {
            const Vec value = load_part(y + at + channel, shape.o - channel);
            v += load(part.add + channel) + load(part.times + channel) * value;
          }
        }
        store(g + channel, v);
      }
    }
    clear_pixel(g, sizes.o);
    g += sizes.o_step;
  }
  clear_pixel(g, sizes.o);
}

// Stores one plane of x's gradient on top of `more`.
template <class T>
void store_plane(const StridedConvShape& shape, const Sizes& sizes,
                 const StridedConvBackward& block, const float* from, bool odd_row,
                 bool odd_column) {
  const T* more = static_cast<const T*>(block.more);
  T* gx = static_cast<T*>(block.gx);
  for (std::int64_t r = 0; r < block.last - block.first; ++r) {
    const std::int64_t row = 2 * (block.first + r) + odd_row;
    if (row >= shape.h) return;
    for (std::int64_t column = odd_column, i = r * sizes.width; column < shape.w;
         column += 2, ++i) {
      const std::int64_t at = (row * shape.w + column) * shape.c;
      for (std::int64_t channel = 0; channel < shape.c; channel += kWidth) {
        const std::int64_t count = shape.c - channel;
        Vec v = load(from + i * sizes.c_step + channel);
        if (more != nullptr) v += load_part(more + at + channel, count);
        shape.streams ? stream(gx + at + channel, v) : store_part(gx + at + channel, v, count);
      }
    }
  }
}

template <class T>
void backward_block(const StridedConvShape& shape, const StridedConvPart& part,
                    const StridedConvBackward& block, float* memory) {
  const Sizes sizes(shape);
  const T* x = static_cast<const T*>(block.x);
  const std::int64_t rows = block.last - block.first, pixels = rows * sizes.width;
  const Planes planes{memory, sizes.plane_pixels * sizes.c_step, sizes.width, sizes.c_step};
  float* g = memory + 4 * planes.floats;
  float* result = g + sizes.plane_pixels * sizes.o_step;
  float* zeros = result + sizes.pixels * sizes.c_step;
  clear_pixel(zeros, sizes.c);
  load_gradient<T>(shape, sizes, part, block, block.last + 1, g);
  load_planes(shape, sizes, x, block.first, rows, planes);
  if (block.bias != nullptr) {
    for (std::int64_t channel = 0; channel < sizes.o; channel += kWidth) {
      Vec sum = {};  // of this block alone: long sums lose digits
      for (std::int64_t i = 0; i < pixels; ++i) sum += load(g + i * sizes.o_step + channel);
      store(block.bias + channel, load(block.bias + channel) + sum);
    }
  }
  Fetch next_x{prefetch_during(x + 2 * block.last * shape.w * shape.c,
                               2 * rows * shape.w * shape.c * sizeof(T), shape.o, sizes.c,
                               kTaps * pixels)};
  for (int tap = 0; tap < kTaps; ++tap) {
    float* weight = block.weight + tap * shape.o * sizes.c;
    next_x.multiply_all({g, 1, sizes.o_step}, {planes.tap(tap / 3, tap % 3), 1, sizes.c_step},
                        {weight, sizes.c, block.fresh ? zeros : weight, block.fresh ? 0 : sizes.c},
                        shape.o, sizes.c, pixels);
  }
  const std::int64_t y_row = shape.out_w * shape.o;
  Fetch next_gy{prefetch_during(static_cast<const T*>(block.gy) + block.last * y_row,
                                rows * y_row * sizeof(T), pixels, sizes.c, kTaps * shape.o)};
  // x at (2·q + odd) was read by tap 1 of y at q where it is even, else by tap 2 at q and 0 at q + 1.
  for (int plane = 0; plane < 4; ++plane) {
    const bool odd_row = plane / 2, odd_column = plane % 2;
    bool first = true;
    for (int i = odd_row ? 2 : 1; i >= 0; i -= 2) {
      for (int j = odd_column ? 2 : 1; j >= 0; j -= 2) {
        const std::int64_t at = (i == 0) * sizes.width + (j == 0);
        next_gy.multiply_all({g + at * sizes.o_step, sizes.o_step, 1},
                             {part.weight + (3 * i + j) * shape.o * sizes.c, shape.o, 0},
                             {result, sizes.c_step, first ? zeros : result, first ? 0 : sizes.c_step},
                             pixels, sizes.c, shape.o);
        first = false;
      }
    }
    store_plane<T>(shape, sizes, block, result, odd_row, odd_column);
  }
  if (shape.streams) finish_streams();
}

std::int64_t panels(std::int64_t columns) { return count_panels(columns, kGroup); }

// weight is (O, C, 3, 3).
void pack_forward(const StridedConvShape& shape, const float* weight, int tap, std::int64_t panel,
                  float* packed) {
  pack_panel(weight + tap, kTaps, kTaps * shape.c, shape.c, shape.o, kGroup, panel,
             packed + tap * shape.c * round_up(shape.o, kGroup));
}

void pack_backward(const StridedConvShape& shape, const float* weight, int tap, std::int64_t panel,
                   float* packed) {
  pack_panel(weight + tap, kTaps * shape.c, kTaps, shape.o, shape.c, kGroup, panel,
             packed + tap * shape.o * round_up(shape.c, kGroup));
}

std::size_t forward_scratch(const StridedConvShape& shape) {
  const Sizes sizes(shape);
  return static_cast<std::size_t>(4 * sizes.plane_pixels * sizes.c_step +
                                  sizes.pixels * sizes.o_step + sizes.o);
}

std::size_t backward_scratch(const StridedConvShape& shape) {
  const Sizes sizes(shape);
  return static_cast<std::size_t>((4 * sizes.plane_pixels + sizes.pixels) * sizes.c_step +
                                  sizes.plane_pixels * sizes.o_step + sizes.c);
}

void forward(int dtype, const StridedConvShape& shape, const StridedConvPart& part,
             const ForwardBand& block, float* scratch) {
  dtype == 0 ? forward_block<float>(shape, part, block, scratch)
             : forward_block<BFloat16>(shape, part, block, scratch);
}

void backward(int dtype, const StridedConvShape& shape, const StridedConvPart& part,
              const StridedConvBackward& block, float* scratch) {
  dtype == 0 ? backward_block<float>(shape, part, block, scratch)
             : backward_block<BFloat16>(shape, part, block, scratch);
}

constexpr StridedConvKernels kKernels = {panels,           pack_forward, pack_backward,
                                         forward_scratch,  backward_scratch,
                                         forward,          backward};

}  // namespace
}  // namespace pnfs
