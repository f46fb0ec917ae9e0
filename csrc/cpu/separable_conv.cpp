// Driver of separable_conv: cuts the work into bands of rows, hands them to threads, and adds up what
// the bands return. pnfs/kernels/separable_conv.py has the definition, separable_kernels.h the
// arithmetic.

#include "cpu/separable_conv.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <tuple>
#include <utility>

#include "cpu/band_driver.h"
#include "cpu/isa.h"

namespace pnfs {
namespace {

constexpr std::int64_t kPiecePixels = 384;  // of a piece: enough to make its weight gradient pay
constexpr std::int64_t kPartialFloats = 1 << 22;  // of all pieces' weight gradients together

struct Problem {
  std::int64_t p, n, c, o, h, w, x_step, dilation, activation;
  double eps;
  int dtype;

  Problem(const std::array<std::int64_t, 9>& size, double epsilon, int storage)
      : eps(epsilon), dtype(storage) {
    std::tie(p, n, c, o, h, w, x_step, dilation, activation) = std::tuple_cat(size);
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
  Address pointwise, depthwise, bias;
  Norm norm;
};
struct Gradients {
  Address x, pointwise, depthwise, bias;
  Norm norm;
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

// The constants of every part, (P, padded C) and so on.
struct Constants {
  std::int64_t c, o;
  std::size_t packed_step;
  float *packed, *taps, *bias, *add, *times;
  NormConstants norm;

  Constants(Cutter& cutter, const Problem& s, std::size_t packed_floats)
      : c(padded(s.c)),
        o(padded(s.o)),
        packed_step(packed_floats),
        packed(cutter.take(s.p * packed_step)),
        taps(cutter.take(s.p * 9 * c)),
        bias(cutter.take(s.p * o)),
        add(cutter.take(s.p * o)),
        times(cutter.take(s.p * o)),
        norm(cutter, s.p, s.c) {}

  void fill(const Problem& s, const Weights& weights) const {
    copy_padded(pointer<const float>(weights.bias), s.p, s.o, o, bias);
    norm.fill(weights.norm, s.eps);
    if (weights.depthwise != 0) copy_taps(pointer<const float>(weights.depthwise), s.p, s.c, taps);
  }

  SeparablePart part(std::int64_t p, const Problem& s, const Weights& weights) const {
    const std::int64_t activation = weights.norm[0] == 0 ? 0 : s.activation;
    return {packed + p * packed_step, taps + p * 9 * c,
            norm.part(p, weights.norm, activation),
            bias + p * o,             add + p * o,      times + p * o};
  }
};

// `result` has `channels` channels.
SeparableShape shape_of(const Problem& s, const Weights& weights, bool stats, Address result,
                        std::int64_t channels) {
  const bool streams =
      worth_streaming(result, s.p * s.n * s.h * s.w, channels, channels * s.element());
  return {s.c,
          s.o,
          s.h,
          s.w,
          weights.depthwise == 0 ? 0 : s.dilation,
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

}  // namespace

void separable_conv(const std::array<Address, 11>& tensors, const std::array<std::int64_t, 9>& size,
                    double eps, int dtype) {
  const Address x = tensors[0], y = tensors[8], mean_y = tensors[9], var_y = tensors[10];
  const Weights weights{
      tensors[1], tensors[2], tensors[3], {tensors[4], tensors[5], tensors[6], tensors[7]}};
  const Problem s(size, eps, dtype);
  const SeparableKernels& run = kernels();
  const SeparableShape shape = shape_of(s, weights, mean_y != 0, y, s.o);
  const Bands bands(s.h, std::max(ceil_div(s.h * s.w, kForwardPixels), ceil_div(kItems, s.p * s.n)));
  const ResultBands result{s.p, s.n, s.o, s.h, s.w, bands};
  const std::int64_t items = result.items();

  static thread_local Workspace shared_memory;
  float *shift = nullptr, *sum = nullptr, *square = nullptr;
  const auto plan = [&](Cutter cutter) {
    const Constants constants(cutter, s, s.c * padded(s.o));
    const std::size_t floats = shape.stats ? items * padded(s.o) : 0;
    shift = cutter.take(floats);
    sum = cutter.take(floats);
    square = cutter.take(floats);
    return std::pair(constants, cutter.used);
  };
  const Constants constants = plan({shared_memory.floats(plan({nullptr}).second)}).first;
  constants.fill(s, weights);
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
      run.forward(s.dtype, shape, constants.part(p, s, weights), band, own);
    }
  }
  if (shape.stats) {
    finish_stats(result, constants.bias, shift, sum, square, pointer<float>(mean_y),
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

void write_gradients(const Problem& s, const Partial& partial, const Constants& constants,
                     const Gradients& to, std::int64_t p, float* sums) {
  const float* pointwise = partial.pointwise(sums);
  for (std::int64_t o = 0; o < s.o; ++o) {
    std::copy_n(pointwise + o * partial.c, s.c,
                pointer<float>(to.pointwise) + (p * s.o + o) * s.c);
  }
  if (to.depthwise != 0) {
    copy_tap_gradients(partial.taps(sums), s.c, pointer<float>(to.depthwise) + p * s.c * 9);
  }
  if (to.bias != 0) std::copy_n(partial.bias(sums), s.o, pointer<float>(to.bias) + p * s.o);
  constants.norm.write_gradients(p, partial.z_sum(sums), partial.z_dot(sums), to.norm);
}

}  // namespace

void separable_conv_backward(const std::array<Address, 21>& tensors,
                             const std::array<std::int64_t, 9>& size, double eps, int dtype) {
  const Address x = tensors[0];
  const Weights weights{tensors[1], tensors[2], 0, {tensors[3], tensors[4], tensors[5], tensors[6]}};
  const Address y = tensors[7], mean_y = tensors[8], gy = tensors[9];
  const Address g_mean_y = tensors[10], g_var_y = tensors[11], more = tensors[12];
  const Gradients gradients{tensors[13],
                            tensors[14],
                            tensors[15],
                            tensors[16],
                            {tensors[17], tensors[18], tensors[19], tensors[20]}};
  const Problem s(size, eps, dtype);
  const SeparableKernels& run = kernels();
  const SeparableShape shape = shape_of(s, weights, g_mean_y != 0, gradients.x, s.c);
  // Bands repeat the rows at their borders, so an image is cut only where there are few.
  const Bands bands(s.h, std::min(ceil_div(kFewItems, s.p * s.n), ceil_div(s.h, 8)));
  const Partial partial(s);
  const Pieces pieces(s, bands, partial);

  static thread_local Workspace shared_memory;
  float* sums = nullptr;
  const auto plan = [&](Cutter cutter) {
    const Constants constants(cutter, s, s.o * padded(s.c));
    sums = cutter.take(s.p * pieces.count * partial.floats);
    return std::pair(constants, cutter.used);
  };
  const Constants constants = plan({shared_memory.floats(plan({nullptr}).second)}).first;
  constants.fill(s, weights);
  if (shape.stats) {
    fill_gradient_constants(s.p, s.o, s.n * s.h * s.w, pointer<const float>(mean_y),
                            pointer<const float>(g_mean_y), pointer<const float>(g_var_y),
                            constants.add, constants.times);
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
        run.backward(s.dtype, shape, constants.part(p, s, weights), band, own);
      }
    }
  }
  reduce_pieces(partial.floats, s.p, pieces.count, sums);
#pragma omp parallel for schedule(static)
  for (std::int64_t p = 0; p < s.p; ++p) {
    write_gradients(s, partial, constants, gradients, p, sums + p * pieces.count * partial.floats);
  }
}

}  // namespace pnfs
