// Driver of depthwise_fanout: cuts the work into bands of rows, hands them to threads, and adds up
// what the bands return. pnfs/kernels/depthwise_fanout.py has the definition,
// depthwise_fanout_kernels.h the arithmetic.

#include "cpu/depthwise_fanout.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <tuple>
#include <vector>

#include "cpu/band_driver.h"
#include "cpu/isa.h"

namespace pnfs {
namespace {

struct FanoutProblem {
  std::int64_t p, n, c, h, w, x_step, stride, activation;
  std::int64_t out_h, out_w;
  double eps;
  int dtype;

  FanoutProblem(const std::array<std::int64_t, 8>& size, double epsilon, int storage)
      : eps(epsilon), dtype(storage) {
    std::tie(p, n, c, h, w, x_step, stride, activation) = std::tuple_cat(size);
    out_h = (h - 1) / stride + 1;
    out_w = (w - 1) / stride + 1;
  }

  std::int64_t element() const { return dtype == 0 ? 4 : 2; }  // bytes
  // Image j of part i.
  const char* x_image(Address x, std::int64_t i, std::int64_t j) const {
    return reinterpret_cast<const char*>(x) + (i * x_step + j * h * w * c) * element();
  }
  char* image(Address tensor, std::int64_t i, std::int64_t j, std::int64_t pixels) const {
    return reinterpret_cast<char*>(tensor) + (i * n + j) * pixels * c * element();
  }
};

const FanoutKernels& kernels() {
#if defined(__x86_64__)
  switch (chosen_isa()) {
    case Isa::avx512: return kFanoutAvx512;
    case Isa::avx2: return kFanoutAvx2;
    default: break;
  }
#endif
  return kFanoutPortable;
}

// Constants of all parts: taps (S, P, 9, C), add and times (S, P, C).
struct Constants {
  NormConstants norm;
  float *taps, *add, *times;

  Constants(Cutter& cutter, const FanoutProblem& s, std::size_t stencils, bool gradients)
      : norm(cutter, s.p, s.c) {
    const std::size_t count = s.p * padded(s.c), more = gradients ? stencils * count : 0;
    taps = cutter.take(stencils * 9 * count);
    add = cutter.take(more);
    times = cutter.take(more);
  }

  void fill(const FanoutProblem& s, const Integers& stencils, const Addresses& weights,
            const Norm& given) const {
    norm.fill(given, s.eps);
    std::size_t weight = 0;
    for (std::size_t i = 0; i < stencils.size(); ++i) {
      if (stencils[i] <= 0) continue;
      copy_taps(pointer<const float>(weights[weight++]), s.p, s.c,
                taps + i * 9 * s.p * padded(s.c));
    }
  }
};

FanoutShape shape_of(const FanoutProblem& s, const Integers& stencils, bool stats, bool streams) {
  FanoutShape shape{s.c, s.h, s.w, s.stride, static_cast<std::int64_t>(stencils.size()), 1,
                    false, stats, streams};
  for (const std::int64_t stencil : stencils) {
    shape.reach = std::max(shape.reach, stencil);
    shape.max_pool |= stencil == kMaxPool;
  }
  return shape;
}

}  // namespace

void depthwise_fanout(Address x, const Integers& stencils, const Addresses& weights,
                      const Norm& norm, const Addresses& ys, const Addresses& means,
                      const Addresses& variances, const std::array<std::int64_t, 8>& size,
                      double eps, int dtype) {
  const FanoutProblem s(size, eps, dtype);
  const FanoutKernels& run = kernels();
  bool streams = true;
  for (const Address y : ys) {
    streams &= worth_streaming(y, s.p * s.n * s.out_h * s.out_w, s.c, s.c * s.element());
  }
  const FanoutShape shape = shape_of(s, stencils, !means.empty(), streams);
  const Bands bands(s.out_h, std::max(ceil_div(s.out_h * s.out_w, kForwardPixels),
                                      ceil_div(kItems, s.p * s.n)));
  const ResultBands result{s.p, s.n, s.c, s.out_h, s.out_w, bands};
  const std::int64_t items = result.items(), c = padded(s.c);
  const std::size_t count = stencils.size(), sum_floats = shape.stats ? items * c : 0;

  static thread_local Workspace shared_memory;
  std::array<float*, 3> sums{};  // centre, sum, square: (S, items, C)
  const auto plan = [&](Cutter cutter) {
    const Constants constants(cutter, s, count, false);
    for (float*& sum : sums) sum = cutter.take(count * sum_floats);
    return std::pair(constants, cutter.used);
  };
  const Constants constants = plan({shared_memory.floats(plan({nullptr}).second)}).first;
  constants.fill(s, stencils, weights, norm);

  const std::size_t scratch = run.forward_scratch(shape);
#pragma omp parallel
  {
    static thread_local Workspace memory;
    float* own = memory.floats(scratch);
    std::array<FanoutStencil, kMaxStencils> here{};
#pragma omp for schedule(dynamic)
    for (std::int64_t i = 0; i < items; ++i) {
      const std::int64_t p = i / (s.n * bands.count), n = i / bands.count % s.n;
      const std::int64_t first = i % bands.count * bands.rows;
      for (std::size_t j = 0; j < count; ++j) {
        const std::size_t at = shape.stats ? j * sum_floats + i * c : 0;
        here[j] = {};
        here[j].kind = stencils[j];
        here[j].taps = constants.taps + (j * s.p + p) * 9 * c;
        here[j].y = s.image(ys[j], p, n, s.out_h * s.out_w);
        here[j].centre = sums[0] + at;
        here[j].sum = sums[1] + at;
        here[j].square = sums[2] + at;
      }
      const OnLoad on_load = constants.norm.part(p, norm, s.activation);
      const FanoutBand band{s.x_image(x, p, n), first,   std::min(first + bands.rows, s.out_h),
                            here.data(),        nullptr, nullptr, nullptr};
      run.forward(s.dtype, shape, on_load, band, own);
    }
  }
  for (std::size_t j = 0; shape.stats && j < count; ++j) {
    const std::size_t at = j * sum_floats;
    finish_stats(result, nullptr, sums[0] + at, sums[1] + at, sums[2] + at,
                 pointer<float>(means[j]), pointer<float>(variances[j]));
  }
}

void depthwise_fanout_backward(Address x, const Integers& stencils, const Addresses& weights,
                               const Norm& norm, const Addresses& gys, const Addresses& ys,
                               const Addresses& means, const Addresses& g_means,
                               const Addresses& g_variances, Address gx,
                               const Addresses& g_weights, const Norm& g_norm,
                               const std::array<std::int64_t, 8>& size, double eps, int dtype) {
  const FanoutProblem s(size, eps, dtype);
  const FanoutKernels& run = kernels();
  const bool streams = worth_streaming(gx, s.p * s.n * s.h * s.w, s.c, s.c * s.element());
  const FanoutShape shape = shape_of(s, stencils, !ys.empty(), streams);
  // Bands repeat the rows at their borders, so an image is cut only where there are few.
  const Bands bands(s.h, std::min(ceil_div(kFewItems, s.p * s.n), ceil_div(s.h, 8)));
  const std::int64_t c = padded(s.c), all = s.n * bands.count;
  const std::int64_t per_piece = ceil_div(all, ceil_div(kItems, s.p));
  const std::int64_t pieces = ceil_div(all, per_piece);
  const std::size_t count = stencils.size();
  // A piece returns Σg and Σg·(x - mean), then the taps' gradients of every stencil.
  const std::int64_t piece_floats = (2 + 9 * static_cast<std::int64_t>(count)) * c;

  static thread_local Workspace shared_memory;
  float* sums = nullptr;
  const auto plan = [&](Cutter cutter) {
    const Constants constants(cutter, s, count, true);
    sums = cutter.take(s.p * pieces * piece_floats);
    return std::pair(constants, cutter.used);
  };
  const Constants constants = plan({shared_memory.floats(plan({nullptr}).second)}).first;
  constants.fill(s, stencils, weights, norm);
  for (std::size_t j = 0; shape.stats && j < count; ++j) {
    fill_gradient_constants(s.p, s.c, s.n * s.out_h * s.out_w, pointer<const float>(means[j]),
                            pointer<const float>(g_means[j]), pointer<const float>(g_variances[j]),
                            constants.add + j * s.p * c, constants.times + j * s.p * c);
  }

  const std::size_t scratch = run.backward_scratch(shape);
#pragma omp parallel
  {
    static thread_local Workspace memory;
    float* own = memory.floats(scratch);
    std::array<FanoutStencil, kMaxStencils> here{};
#pragma omp for schedule(dynamic)
    for (std::int64_t i = 0; i < s.p * pieces; ++i) {
      const std::int64_t p = i / pieces, start = i % pieces * per_piece;
      float* piece = sums + i * piece_floats;
      std::fill_n(piece, piece_floats, 0.0f);
      const OnLoad on_load = constants.norm.part(p, norm, s.activation);
      for (std::int64_t k = start; k < std::min(start + per_piece, all); ++k) {
        const std::int64_t n = k / bands.count, first = k % bands.count * bands.rows;
        for (std::size_t j = 0; j < count; ++j) {
          here[j] = {};
          here[j].kind = stencils[j];
          here[j].taps = constants.taps + (j * s.p + p) * 9 * c;
          if (shape.stats) here[j].y = s.image(ys[j], p, n, s.out_h * s.out_w);
          here[j].gy = s.image(gys[j], p, n, s.out_h * s.out_w);
          here[j].add = constants.add + (j * s.p + p) * c;
          here[j].times = constants.times + (j * s.p + p) * c;
          here[j].tap_gradients = piece + (2 + 9 * j) * c;
        }
        const FanoutBand band{s.x_image(x, p, n),
                              first,
                              std::min(first + bands.rows, s.h),
                              here.data(),
                              s.image(gx, p, n, s.h * s.w),
                              piece,
                              piece + c};
        run.backward(s.dtype, shape, on_load, band, own);
      }
    }
  }
  reduce_pieces(piece_floats, s.p, pieces, sums);
  for (std::int64_t p = 0; p < s.p; ++p) {
    const float* piece = sums + p * pieces * piece_floats;
    std::size_t weight = 0;
    for (std::size_t j = 0; j < count; ++j) {
      if (stencils[j] <= 0) continue;
      copy_tap_gradients(piece + (2 + 9 * j) * c, s.c,
                         pointer<float>(g_weights[weight++]) + p * s.c * 9);
    }
    constants.norm.write_gradients(p, piece, piece + c, g_norm);
  }
}

}  // namespace pnfs
