// Driver of separable_conv: cuts the work into bands of rows, hands them to threads, and adds up what
// the bands return. pnfs/kernels/separable_conv.py has the definition, separable_kernels.h the
// arithmetic.
//
// How the work is cut depends on its sizes alone, and partial sums are added in a fixed order, so
// results do not depend on the number of threads.

#include "cpu/separable_conv.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <tuple>

#include "cpu/isa.h"
#include "cpu/ops.h"
#include "cpu/workspace.h"

namespace pnfs {
namespace {

constexpr std::int64_t kForwardPixels = 1024;  // of a band: few enough for sums in float32
constexpr std::int64_t kItems = 24;            // pieces of work that let threads balance
constexpr std::int64_t kFewItems = 8;
constexpr std::int64_t kPiecePixels = 384;  // of a piece: enough to make its weight gradient pay
constexpr std::int64_t kPartialFloats = 1 << 22;  // of all pieces' weight gradients together
constexpr std::int64_t kStreamBytes = 1 << 20;    // results from this size on bypass the caches
constexpr Address kLine = 64;

struct Problem {
  std::int64_t p, n, c, o, h, w, x_step, dilation;
  double eps;
  int dtype;

  Problem(const std::array<std::int64_t, 8>& size, double epsilon, int storage)
      : eps(epsilon), dtype(storage) {
    std::tie(p, n, c, o, h, w, x_step, dilation) = std::tuple_cat(size);
  }

  std::int64_t element() const { return dtype == 0 ? 4 : 2; }  // bytes
  // Image n of part p.
  const char* x_image(Address x, std::int64_t i, std::int64_t j) const {
    return reinterpret_cast<const char*>(x) + (i * x_step + j * h * w * c) * element();
  }
  char* image(Address tensor, std::int64_t i, std::int64_t j, std::int64_t channels) const {
    return reinterpret_cast<char*>(tensor) + (i * n + j) * h * w * channels * element();
  }
};

// Addresses of float32 arrays as Python has them; 0 is none.
struct Weights {
  Address pointwise, depthwise, bias, mean, var;
};
struct Gradients {
  Address x, pointwise, depthwise, bias, mean, var;
};

const SeparableKernels& kernels() {
#if defined(__x86_64__)
  switch (chosen_isa()) {
    case Isa::avx512: return kSeparableAvx512;
    case Isa::avx2: return kSeparableAvx2;
    default: break;
  }
#endif
  return kSeparablePortable;
}

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
std::int64_t padded(std::int64_t channels) {
  return ceil_div(channels, kChannelStep) * kChannelStep;
}

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
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

// The constants of every part, (P, padded C) and so on.
struct Constants {
  float *packed, *taps, *mean, *rstd, *bias, *add, *times;
  std::size_t packed_step;
  std::int64_t c, o;

  SeparablePart part(std::int64_t p) const {
    return {packed + p * packed_step, taps + p * 9 * c, mean + p * c,  rstd + p * c,
            bias + p * o,             add + p * o,      times + p * o};
  }
};

Constants take_constants(Cutter& cutter, const Problem& sizes, std::size_t packed_step) {
  const std::size_t p = static_cast<std::size_t>(sizes.p), c = padded(sizes.c), o = padded(sizes.o);
  return {cutter.take(p * packed_step),
          cutter.take(p * 9 * c),
          cutter.take(p * c),
          cutter.take(p * c),
          cutter.take(p * o),
          cutter.take(p * o),
          cutter.take(p * o),
          packed_step,
          static_cast<std::int64_t>(c),
          static_cast<std::int64_t>(o)};
}

// `rows` rows of `from` to padded rows; null is zeros.
void copy_padded(const float* from, std::int64_t rows, std::int64_t length, std::int64_t step,
                 float* to) {
  std::fill_n(to, rows * step, 0.0f);
  if (from == nullptr) return;
  for (std::int64_t row = 0; row < rows; ++row) {
    std::copy_n(from + row * length, length, to + row * step);
  }
}

void fill_constants(const Problem& s, const Weights& weights,
                    const Constants& to) {
  copy_padded(pointer<const float>(weights.bias), s.p, s.o, to.o, to.bias);
  copy_padded(pointer<const float>(weights.mean), s.p, s.c, to.c, to.mean);
  copy_padded(pointer<const float>(weights.var), s.p, s.c, to.c, to.rstd);
  for (std::int64_t i = 0; i < s.p * to.c; ++i) {
    to.rstd[i] = static_cast<float>(1.0 / std::sqrt(static_cast<double>(to.rstd[i]) + s.eps));
  }
  const float* depthwise = pointer<const float>(weights.depthwise);
  if (depthwise == nullptr) return;
  std::fill_n(to.taps, s.p * 9 * to.c, 0.0f);
  for (std::int64_t p = 0; p < s.p; ++p) {
    for (std::int64_t c = 0; c < s.c; ++c) {
      for (std::int64_t tap = 0; tap < 9; ++tap) {
        to.taps[(p * 9 + tap) * to.c + c] = depthwise[(p * s.c + c) * 9 + tap];
      }
    }
  }
}

// `result` has `channels` channels.
SeparableShape shape_of(const Problem& s, const Weights& weights, bool stats, Address result,
                        std::int64_t channels) {
  const std::int64_t pixel = channels * s.element();
  const bool streams = s.p * s.n * s.h * s.w * pixel >= kStreamBytes && result % kLine == 0 &&
                       channels % kChannelStep == 0 && pixel % kLine == 0;
  return {s.c,
          s.o,
          s.h,
          s.w,
          weights.depthwise == 0 ? 0 : s.dilation,
          weights.mean != 0,
          stats,
          streams};
}

void pack(const Problem& s, const SeparableKernels& run, const SeparableShape& shape,
          const Weights& weights, std::int64_t columns,
          decltype(SeparableKernels::pack_forward) pack_panel, const Constants& to) {
  const float* pointwise = pointer<const float>(weights.pointwise);
  const std::int64_t panels = run.panels(columns);
#pragma omp parallel for schedule(static)
  for (std::int64_t i = 0; i < s.p * panels; ++i) {
    const std::int64_t p = i / panels;
    pack_panel(shape, pointwise + p * s.o * s.c, i % panels, to.packed + p * to.packed_step);
  }
}

// Mean and biased variance of y from the bands' sums: in float64, band after band.
void finish_stats(const Problem& s, const Bands& bands, const Constants& constants,
                  const float* shift, const float* sum, const float* square, float* mean,
                  float* var) {
  const std::int64_t o = constants.o, per_part = s.n * bands.count;
#pragma omp parallel for schedule(static)
  for (std::int64_t i = 0; i < s.p * s.o; ++i) {
    const std::int64_t p = i / s.o, channel = i % s.o;
    double count = 0, total_mean = 0, m2 = 0;
    for (std::int64_t j = 0; j < per_part; ++j) {
      const std::int64_t first = j % bands.count * bands.rows;
      const double pixels =
          static_cast<double>(std::min(bands.rows, s.h - first) * s.w);
      const std::int64_t at = (p * per_part + j) * o + channel;
      const double offset = sum[at] / pixels;
      const double distance = shift[at] + offset - total_mean;
      m2 += square[at] - offset * sum[at] + distance * distance * count * pixels / (count + pixels);
      total_mean += distance * pixels / (count + pixels);
      count += pixels;
    }
    mean[i] = static_cast<float>(total_mean + constants.bias[p * o + channel]);
    var[i] = static_cast<float>(std::max(0.0, m2 / count));
  }
}

}  // namespace

void separable_conv(const std::array<Address, 9>& tensors, const std::array<std::int64_t, 8>& size,
                    double eps, int dtype) {
  const Address x = tensors[0], y = tensors[6], mean_y = tensors[7], var_y = tensors[8];
  const Weights weights{tensors[1], tensors[2], tensors[3], tensors[4], tensors[5]};
  const Problem s(size, eps, dtype);
  const SeparableKernels& run = kernels();
  const SeparableShape shape = shape_of(s, weights, mean_y != 0, y, s.o);
  const Bands bands(s.h, std::max(ceil_div(s.h * s.w, kForwardPixels), ceil_div(kItems, s.p * s.n)));
  const std::int64_t items = s.p * s.n * bands.count;

  static thread_local Workspace shared_memory;
  Constants constants{};
  float *shift = nullptr, *sum = nullptr, *square = nullptr;
  const auto plan = [&](Cutter cutter) {
    constants = take_constants(cutter, s, s.c * padded(s.o));
    const std::size_t floats = shape.stats ? items * constants.o : 0;
    shift = cutter.take(floats);
    sum = cutter.take(floats);
    square = cutter.take(floats);
    return cutter.used;
  };
  plan({shared_memory.floats(plan({nullptr}))});
  fill_constants(s, weights, constants);
  pack(s, run, shape, weights, s.o, run.pack_forward, constants);

  const std::size_t scratch = run.forward_scratch(shape);
#pragma omp parallel
  {
    static thread_local Workspace memory;
    float* own = memory.floats(scratch);
#pragma omp for schedule(dynamic)
    for (std::int64_t i = 0; i < items; ++i) {
      const std::int64_t p = i / (s.n * bands.count), n = i / bands.count % s.n;
      const std::int64_t first = i % bands.count * bands.rows;
      const std::int64_t sums = shape.stats ? i * constants.o : 0;
      const ForwardBand band{s.x_image(x, p, n), s.image(y, p, n, s.o),
                             first,              std::min(first + bands.rows, s.h),
                             shift + sums,       sum + sums,
                             square + sums};
      run.forward(s.dtype, shape, constants.part(p), band, own);
    }
  }
  if (shape.stats) {
    finish_stats(s, bands, constants, shift, sum, square, pointer<float>(mean_y),
                 pointer<float>(var_y));
  }
}

namespace {

// The sums that one piece of the backward pass returns.
struct Partial {
  std::int64_t c, o, channels, floats;

  explicit Partial(const Problem& s)
      : c(padded(s.c)), o(padded(s.o)), channels(s.o), floats(s.o * c + 11 * c + o) {}

  float* pointwise(float* piece) const { return piece; }
  float* taps(float* piece) const { return piece + channels * c; }  // and all that follows: zeros
  float* z_sum(float* piece) const { return taps(piece) + 9 * c; }
  float* z_dot(float* piece) const { return z_sum(piece) + c; }
  float* bias(float* piece) const { return z_dot(piece) + c; }
};

// The pieces of work of one part: `count` of up to `bands` consecutive bands.
struct Pieces {
  std::int64_t bands, count;

  Pieces(const Problem& s, const Bands& cut, const Partial& partial) {
    const std::int64_t all = s.n * cut.count;
    const std::int64_t fitting = std::max<std::int64_t>(kPartialFloats / (s.p * partial.floats), 1);
    const std::int64_t paying = ceil_div(kPiecePixels, cut.rows * s.w);
    bands = std::max(ceil_div(all, ceil_div(kItems, s.p)),
                     std::min(paying, ceil_div(s.p * all, kFewItems)));
    bands = std::max(bands, ceil_div(all, fitting));
    count = ceil_div(all, bands);
  }
};

// The gradient of the whole y is gy + add + times·y, from the gradients of its mean and variance.
void fill_gradient_constants(const Problem& s, const float* mean, const float* g_mean,
                             const float* g_var, const Constants& to) {
  const double pixels = static_cast<double>(s.n * s.h * s.w);
  for (std::int64_t i = 0; i < s.p * to.o; ++i) {
    const std::int64_t o = i % to.o, at = i / to.o * s.o + o;
    if (o >= s.o) {
      to.times[i] = to.add[i] = 0;
      continue;
    }
    const double slope = 2.0 * g_var[at] / pixels;
    to.times[i] = static_cast<float>(slope);
    to.add[i] = static_cast<float>(g_mean[at] / pixels - slope * mean[at]);
  }
}

// Adds the pieces of each part into the part's first one, piece after piece.
void reduce(const Partial& partial, std::int64_t parts, std::int64_t pieces, float* all) {
  constexpr std::int64_t kChunk = 1024;
  const std::int64_t chunks = ceil_div(partial.floats, kChunk);
#pragma omp parallel for schedule(static)
  for (std::int64_t i = 0; i < parts * chunks; ++i) {
    float* part = all + i / chunks * pieces * partial.floats;
    const std::int64_t first = i % chunks * kChunk;
    const std::int64_t last = std::min(first + kChunk, partial.floats);
    for (std::int64_t piece = 1; piece < pieces; ++piece) {
      const float* from = part + piece * partial.floats;
      for (std::int64_t j = first; j < last; ++j) part[j] += from[j];
    }
  }
}

void write_gradients(const Problem& s, const Partial& partial, const Constants& constants,
                     const Gradients& to, std::int64_t p, float* sums) {
  const float* pointwise = partial.pointwise(sums);
  for (std::int64_t o = 0; o < s.o; ++o) {
    std::copy_n(pointwise + o * partial.c, s.c,
                pointer<float>(to.pointwise) + (p * s.o + o) * s.c);
  }
  if (to.depthwise != 0) {
    const float* taps = partial.taps(sums);
    for (std::int64_t c = 0; c < s.c; ++c) {
      for (std::int64_t tap = 0; tap < 9; ++tap) {
        pointer<float>(to.depthwise)[(p * s.c + c) * 9 + tap] = taps[tap * partial.c + c];
      }
    }
  }
  if (to.bias != 0) std::copy_n(partial.bias(sums), s.o, pointer<float>(to.bias) + p * s.o);
  if (to.mean == 0) return;
  for (std::int64_t c = 0; c < s.c; ++c) {
    const float rstd = constants.rstd[p * constants.c + c];
    pointer<float>(to.mean)[p * s.c + c] = -rstd * partial.z_sum(sums)[c];
    pointer<float>(to.var)[p * s.c + c] = -0.5f * rstd * rstd * partial.z_dot(sums)[c];
  }
}

}  // namespace

void separable_conv_backward(const std::array<Address, 17>& tensors,
                             const std::array<std::int64_t, 8>& size, double eps, int dtype) {
  const Address x = tensors[0], y = tensors[5], gy = tensors[7];
  const Weights weights{tensors[1], tensors[2], 0, tensors[3], tensors[4]};
  const Address more = tensors[10];
  const Gradients gradients{tensors[11], tensors[12], tensors[13],
                            tensors[14], tensors[15], tensors[16]};
  const Problem s(size, eps, dtype);
  const SeparableKernels& run = kernels();
  const SeparableShape shape = shape_of(s, weights, tensors[8] != 0, gradients.x, s.c);
  // Bands repeat the rows at their borders, so an image is cut only where there are few.
  const Bands bands(s.h, std::min(ceil_div(kFewItems, s.p * s.n), ceil_div(s.h, 8)));
  const Partial partial(s);
  const Pieces pieces(s, bands, partial);

  static thread_local Workspace shared_memory;
  Constants constants{};
  float* sums = nullptr;
  const auto plan = [&](Cutter cutter) {
    constants = take_constants(cutter, s, s.o * padded(s.c));
    sums = cutter.take(s.p * pieces.count * partial.floats);
    return cutter.used;
  };
  plan({shared_memory.floats(plan({nullptr}))});
  fill_constants(s, weights, constants);
  if (shape.stats) {
    fill_gradient_constants(s, pointer<const float>(tensors[6]), pointer<const float>(tensors[8]),
                            pointer<const float>(tensors[9]), constants);
  }
  pack(s, run, shape, weights, s.c, run.pack_backward, constants);

  const std::size_t scratch = run.backward_scratch(shape);
#pragma omp parallel
  {
    static thread_local Workspace memory;
    float* own = memory.floats(scratch);
#pragma omp for schedule(dynamic)
    for (std::int64_t i = 0; i < s.p * pieces.count; ++i) {
      const std::int64_t p = i / pieces.count, start = i % pieces.count * pieces.bands;
      float* piece = sums + i * partial.floats;
      std::fill(partial.taps(piece), piece + partial.floats, 0.0f);
      for (std::int64_t j = start; j < std::min(start + pieces.bands, s.n * bands.count); ++j) {
        const std::int64_t n = j / bands.count, first = j % bands.count * bands.rows;
        const BackwardBand band{s.x_image(x, p, n),
                                s.image(y, p, n, s.o),
                                s.image(gy, p, n, s.o),
                                more == 0 ? nullptr : s.image(more, p, n, s.c),
                                s.image(gradients.x, p, n, s.c),
                                first,
                                std::min(first + bands.rows, s.h),
                                j == start,
                                partial.pointwise(piece),
                                partial.taps(piece),
                                gradients.bias == 0 ? nullptr : partial.bias(piece),
                                partial.z_sum(piece),
                                partial.z_dot(piece)};
        run.backward(s.dtype, shape, constants.part(p), band, own);
      }
    }
  }
  reduce(partial, s.p, pieces.count, sums);
#pragma omp parallel for schedule(static)
  for (std::int64_t p = 0; p < s.p; ++p) {
    write_gradients(s, partial, constants, gradients, p, sums + p * pieces.count * partial.floats);
  }
}

}  // namespace pnfs
