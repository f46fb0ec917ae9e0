// Driver of strided_conv: cuts the work into blocks of rows, hands them to threads, and adds up what
// they return. pnfs/kernels/strided_conv.py has the definition, strided_conv_kernels.h the arithmetic.
//
// How the work is cut depends on its sizes alone, and partial sums are added in a fixed order, so
// results do not depend on the number of threads.

#include "cpu/strided_conv.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <tuple>
#include <vector>

#include "cpu/mix_driver.h"

namespace pnfs {
namespace {

constexpr std::int64_t kForwardPixels = 128;   // of y in a block
constexpr std::int64_t kBackwardPixels = 208;  // more: its weight gradient is read and written once
constexpr std::int64_t kItems = 24;            // pieces of work that let threads balance
constexpr std::int64_t kPartialFloats = 1 << 22;  // of all pieces' weight gradients together

const StridedConvKernels& kernels() {
#if defined(__x86_64__)
  switch (chosen_isa()) {
    case Isa::avx512: return kStridedConvAvx512;
    case Isa::avx2: return kStridedConvAvx2;
    default: break;
  }
#endif
  return kStridedConvPortable;
}

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

struct Problem {
  std::int64_t p, n, c, o, h, w, x_step, out_h, out_w;
  int dtype;

  Problem(const std::array<std::int64_t, 7>& size, int storage) : dtype(storage) {
    std::tie(p, n, c, o, h, w, x_step) = std::tuple_cat(size);
    out_h = (h + 1) / 2;
    out_w = (w + 1) / 2;
  }

  std::int64_t y_pixels() const { return n * out_h * out_w; }  // of a part
  const void* x_image(Address x, std::int64_t i, std::int64_t j) const {
    return element(pointer<const void>(x), i * x_step + j * h * w * c, dtype);
  }
  // Image j of part i of a map like x, or like y, without gaps.
  void* like_x(Address map, std::int64_t i, std::int64_t j) const {
    return map == 0 ? nullptr : element(pointer<void>(map), (i * n + j) * h * w * c, dtype);
  }
  void* like_y(Address map, std::int64_t i, std::int64_t j) const {
    return map == 0 ? nullptr : element(pointer<void>(map), (i * n + j) * out_h * out_w * o, dtype);
  }
};

// Rows of y in `count` blocks of equal height, but for the last.
struct Blocks {
  std::int64_t rows, count, out_h;

  Blocks(const Problem& s, std::int64_t pixels) : out_h(s.out_h) {
    const std::int64_t wanted =
        std::max(ceil_div(s.out_h * s.out_w, pixels), ceil_div(kItems, s.p * s.n));
    rows = ceil_div(out_h, std::min(wanted, out_h));
    count = ceil_div(out_h, rows);
  }

  std::int64_t first(std::int64_t block) const { return block * rows; }
  std::int64_t last(std::int64_t block) const { return std::min(out_h, (block + 1) * rows); }
};

// The packed weights and other constants of all parts; `memory` keeps them.
struct Constants {
  std::int64_t packed_step, o;
  float *packed, *bias, *add, *times;

  Constants(const Problem& s, const StridedConvKernels& run, const StridedConvShape& shape,
            const float* weight, bool forward, Workspace& memory)
      : packed_step(kTaps * (forward ? s.c * padded(s.o) : s.o * padded(s.c))), o(padded(s.o)) {
    packed = memory.floats(s.p * (packed_step + 3 * o));
    bias = packed + s.p * packed_step;
    add = bias + s.p * o;
    times = add + s.p * o;
    std::fill_n(bias, 3 * s.p * o, 0.0f);
    const std::int64_t panels = run.panels(forward ? s.o : s.c);
    const auto pack = forward ? run.pack_forward : run.pack_backward;
#pragma omp parallel for schedule(static)
    for (std::int64_t i = 0; i < s.p * panels; ++i) {
      const std::int64_t p = i / panels;
      for (int tap = 0; tap < kTaps; ++tap) {
        pack(shape, weight + p * s.o * s.c * kTaps, tap, i % panels, packed + p * packed_step);
      }
    }
  }

  StridedConvPart part(std::int64_t p) const {
    return {packed + p * packed_step, bias + p * o, add + p * o, times + p * o};
  }
};

// Mean and biased variance of y from the blocks' sums: in float64, block after block.
void finish_stats(const Problem& s, const Blocks& blocks, const Constants& constants,
                  const float* sums, float* mean, float* var) {
  const std::int64_t o = constants.o, per_part = s.n * blocks.count;
#pragma omp parallel for schedule(static)
  for (std::int64_t p = 0; p < s.p; ++p) {
    std::vector<double> values(2 * s.o);
    Spread spread{values.data(), values.data() + s.o};
    double before = 0;
    for (std::int64_t j = 0; j < per_part; ++j) {
      const std::int64_t block = j % blocks.count;
      const double pixels =
          static_cast<double>((blocks.last(block) - blocks.first(block)) * s.out_w);
      const float* shift = sums + (p * per_part + j) * 3 * o;
      const float *sum = shift + o, *square = sum + o;
      for (std::int64_t c = 0; c < s.o; ++c) {
        const double offset = sum[c] / pixels;
        spread.merge(before, c, pixels, shift[c] + offset, square[c] - offset * sum[c]);
      }
      before += pixels;
    }
    for (std::int64_t c = 0; c < s.o; ++c) {
      mean[p * s.o + c] = static_cast<float>(spread.mean[c] + constants.bias[p * o + c]);
      var[p * s.o + c] = static_cast<float>(std::max(0.0, spread.squares[c] / before));
    }
  }
}

}  // namespace

void strided_conv(const std::array<Address, 6>& tensors, const std::array<std::int64_t, 7>& size,
                  int dtype) {
  const Address x = tensors[0], weight = tensors[1], bias = tensors[2];
  const Address y = tensors[3], mean = tensors[4], var = tensors[5];
  const Problem s(size, dtype);
  const StridedConvKernels& run = kernels();
  const Blocks blocks(s, kForwardPixels);
  const bool streams =
      worth_streaming(pointer<const void>(y), s.p * s.y_pixels() * s.o, s.o, dtype);
  const StridedConvShape shape{s.c,     s.o,         s.h,       s.w,    s.out_h,
                               s.out_w, blocks.rows, mean != 0, streams};
  static thread_local Workspace constants_memory, sums_memory;
  const Constants constants(s, run, shape, pointer<const float>(weight), true, constants_memory);
  for (std::int64_t p = 0; bias != 0 && p < s.p; ++p) {
    std::copy_n(pointer<const float>(bias) + p * s.o, s.o, constants.bias + p * constants.o);
  }
  const std::int64_t items = s.p * s.n * blocks.count, per_item = 3 * constants.o;
  float* sums = sums_memory.floats(shape.stats ? items * per_item : per_item);
  const std::size_t scratch = run.forward_scratch(shape);
#pragma omp parallel
  {
    static thread_local Workspace memory;
    float* own = memory.floats(scratch);
#pragma omp for schedule(dynamic)
    for (std::int64_t i = 0; i < items; ++i) {
      const std::int64_t p = i / (s.n * blocks.count), n = i / blocks.count % s.n;
      const std::int64_t block = i % blocks.count;
      float* of_item = sums + (shape.stats ? i * per_item : 0);
      run.forward(dtype, shape, constants.part(p),
                  {s.x_image(x, p, n), s.like_y(y, p, n), blocks.first(block), blocks.last(block),
                   of_item, of_item + constants.o, of_item + 2 * constants.o},
                  own);
    }
  }
  if (shape.stats) {
    finish_stats(s, blocks, constants, sums, pointer<float>(mean), pointer<float>(var));
  }
}

namespace {

// The gradient of the whole y is gy + add + times·y, from the gradients of its mean and variance.
void fill_gradient_constants(const Problem& s, const float* mean, const float* g_mean,
                             const float* g_var, const Constants& to) {
  const double pixels = static_cast<double>(s.y_pixels());
  for (std::int64_t i = 0; i < s.p * s.o; ++i) {
    const std::int64_t at = i / s.o * to.o + i % s.o;
    const double slope = 2.0 * g_var[i] / pixels;
    to.times[at] = static_cast<float>(slope);
    to.add[at] = static_cast<float>(g_mean[i] / pixels - slope * mean[i]);
  }
}

// Adds up the pieces of every part, (9, O, padded C) and (padded O) each, piece after piece, and
// writes weight gradients (O, C, 3, 3) and bias gradients (O).
void write_gradients(const Problem& s, std::int64_t pieces, std::int64_t piece_floats,
                     const float* all, float* weight, float* bias) {
  const std::int64_t c_padded = padded(s.c);
#pragma omp parallel
  {
    std::vector<float> row(kTaps * s.c);
#pragma omp for schedule(static)
    for (std::int64_t i = 0; i < s.p * s.o; ++i) {
      const std::int64_t p = i / s.o, o = i % s.o;
      const float* first = all + p * pieces * piece_floats;
      std::fill(row.begin(), row.end(), 0.0f);
      float of_bias = 0;
      for (std::int64_t piece = 0; piece < pieces; ++piece) {
        const float* from = first + piece * piece_floats;
        of_bias += from[kTaps * s.o * c_padded + o];
        for (int tap = 0; tap < kTaps; ++tap) {
          const float* of_tap = from + (tap * s.o + o) * c_padded;
          float* to = row.data() + tap * s.c;
          for (std::int64_t c = 0; c < s.c; ++c) to[c] += of_tap[c];
        }
      }
      for (std::int64_t c = 0; c < s.c; ++c) {
        for (int tap = 0; tap < kTaps; ++tap) {
          weight[(i * s.c + c) * kTaps + tap] = row[tap * s.c + c];
        }
      }
      if (bias != nullptr) bias[i] = of_bias;
    }
  }
}

}  // namespace

void strided_conv_backward(const std::array<Address, 11>& tensors,
                           const std::array<std::int64_t, 7>& size, int dtype) {
  const Address x = tensors[0], weight = tensors[1], y = tensors[2], mean = tensors[3];
  const Address gy = tensors[4], g_mean = tensors[5], g_var = tensors[6], more = tensors[7];
  const Address gx = tensors[8], g_weight = tensors[9], g_bias = tensors[10];
  const Problem s(size, dtype);
  const StridedConvKernels& run = kernels();
  const Blocks blocks(s, kBackwardPixels);
  const bool streams =
      worth_streaming(pointer<const void>(gx), s.p * s.n * s.h * s.w * s.c, s.c, dtype);
  const StridedConvShape shape{s.c,     s.o,         s.h,         s.w,    s.out_h,
                               s.out_w, blocks.rows, g_mean != 0, streams};
  static thread_local Workspace constants_memory, sums_memory;
  const Constants constants(s, run, shape, pointer<const float>(weight), false, constants_memory);
  if (shape.stats) {
    fill_gradient_constants(s, pointer<const float>(mean), pointer<const float>(g_mean),
                            pointer<const float>(g_var), constants);
  }
  // Pieces of work are consecutive blocks of a part, with a weight gradient of their own.
  const std::int64_t weight_floats = kTaps * s.o * padded(s.c);
  const std::int64_t piece_floats = weight_floats + constants.o, per_part = s.n * blocks.count;
  const std::int64_t fitting = std::max<std::int64_t>(kPartialFloats / (s.p * piece_floats), 1);
  const std::int64_t pieces = std::min({per_part, ceil_div(kItems, s.p), fitting});
  float* sums = sums_memory.floats(s.p * pieces * piece_floats);
  const std::size_t scratch = run.backward_scratch(shape);
#pragma omp parallel
  {
    static thread_local Workspace memory;
    float* own = memory.floats(scratch);
#pragma omp for schedule(dynamic)
    for (std::int64_t i = 0; i < s.p * pieces; ++i) {
      const std::int64_t p = i / pieces, start = i % pieces * per_part / pieces;
      float* piece = sums + i * piece_floats;
      float* of_bias = piece + weight_floats;
      std::fill_n(of_bias, constants.o, 0.0f);
      for (std::int64_t j = start; j < (i % pieces + 1) * per_part / pieces; ++j) {
        const std::int64_t n = j / blocks.count, block = j % blocks.count;
        run.backward(dtype, shape, constants.part(p),
                     {s.x_image(x, p, n), s.like_y(y, p, n), s.like_y(gy, p, n),
                      s.like_x(more, p, n), s.like_x(gx, p, n), blocks.first(block),
                      blocks.last(block), j == start, piece, of_bias},
                     own);
      }
    }
  }
  write_gradients(s, pieces, piece_floats, sums, pointer<float>(g_weight), pointer<float>(g_bias));
}

}  // namespace pnfs
