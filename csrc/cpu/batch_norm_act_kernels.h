// The kernels of batch_norm_act for one instruction set; batch_norm_act.h has the interface. All walk
// their maps from front to back, which is what memory serves fastest; everything here has internal
// linkage, see simd.h.
#pragma once

#include "cpu/batch_norm_act.h"
#include "cpu/channel_lanes.h"

namespace pnfs {
namespace {

constexpr int kRowsAtOnce = 4;  // whose sums are loaded and stored once

struct Limits {
  float floor, ceiling;

  // NaN passes, as in torch.
  PNFS_INLINE_MEMBER Vec cut(Vec v) const {
    v = floor > v ? fill(floor) : v;
    return ceiling < v ? fill(ceiling) : v;
  }
  PNFS_INLINE_MEMBER Vec pass(Vec v, Vec gradient) const {
    gradient = v <= floor ? Vec{} : gradient;
    return v >= ceiling ? Vec{} : gradient;
  }
};

// A copy of the arguments, which no store through a pointer can change.
template <class T, bool kResidual>
struct Rows {
  const T *x, *residual;
  std::int64_t rows, channels;
  const float *mean, *scale, *shift;
  Limits limits;

  PNFS_INLINE_MEMBER explicit Rows(const NormalisedRows& run)
      : x(static_cast<const T*>(run.x)), residual(static_cast<const T*>(run.residual)),
        rows(run.rows), channels(run.channels), mean(run.mean), scale(run.scale),
        shift(run.shift), limits{run.floor, run.ceiling} {}

  // v before its limits, from x less its mean.
  template <class Lanes>
  PNFS_INLINE_MEMBER Vec normalise(Vec centred, std::int64_t at, std::int64_t c,
                                   Lanes lanes) const {
    Vec v = centred * load(scale + c) + load(shift + c);
    if constexpr (kResidual) v += lanes.get(residual + at);
    return v;
  }
};

template <bool kStream, class T, bool kResidual>
PNFS_INLINE void forward_rows(const NormalisedRows& run, T* y) {
  const Rows<T, kResidual> from(run);
  for (std::int64_t row = 0; row < from.rows; ++row) {
    const std::int64_t begin = row * from.channels;
    for_lanes(from.channels, [&](std::int64_t c, std::int64_t, std::int64_t, auto lanes) {
      const Vec centred = lanes.get(from.x + begin + c) - load(from.mean + c);
      lanes.template put_out<kStream>(
          y + begin + c, from.limits.cut(from.normalise(centred, begin + c, c, lanes)));
    });
  }
}

template <class T>
void forward_of(const NormalisedRows& run, T* y, bool streams) {
  const auto go = [&](auto with_residual) {
    constexpr bool kResidual = decltype(with_residual)::value;
    streams ? forward_rows<true, T, kResidual>(run, y) : forward_rows<false, T, kResidual>(run, y);
  };
  run.residual == nullptr ? go(Flag<false>{}) : go(Flag<true>{});
}

void forward(int dtype, const NormalisedRows& run, void* y, bool streams) {
  dtype == 0 ? forward_of(run, static_cast<float*>(y), streams)
             : forward_of(run, static_cast<BFloat16*>(y), streams);
  if (streams) finish_streams();
}

template <int kRows, class T, bool kResidual>
PNFS_INLINE void sums_of_rows(const Rows<T, kResidual>& from, std::int64_t row, const T* gy, T* gv,
                              float* first, float* second) {
  const std::int64_t begin = row * from.channels;
  for_lanes(from.channels, [&](std::int64_t c, std::int64_t, std::int64_t, auto lanes) {
    Vec sum = load(first + c), product = load(second + c);
    const Vec mean = load(from.mean + c);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const std::int64_t at = begin + r * from.channels + c;
      const Vec centred = lanes.get(from.x + at) - mean;
      const Vec v = from.normalise(centred, at, c, lanes);
      const Vec gradient = from.limits.pass(v, lanes.get(gy + at));
      sum += gradient;
      product += gradient * centred;
      if constexpr (kResidual) lanes.put(gv + at, gradient);
    }
    store(first + c, sum);
    store(second + c, product);
  });
}

template <class T, bool kResidual>
void sums_of(const NormalisedRows& run, const T* gy, T* gv, float* first, float* second) {
  const Rows<T, kResidual> from(run);
  std::int64_t row = 0;
  for (; row + kRowsAtOnce <= from.rows; row += kRowsAtOnce) {
    sums_of_rows<kRowsAtOnce>(from, row, gy, gv, first, second);
  }
  for (; row < from.rows; ++row) sums_of_rows<1>(from, row, gy, gv, first, second);
}

template <class T>
void sums_of_type(const NormalisedRows& run, const void* gy, void* gv, float* first,
                  float* second) {
  const T* from = static_cast<const T*>(gy);
  T* to = static_cast<T*>(gv);
  gv == nullptr ? sums_of<T, false>(run, from, to, first, second)
                : sums_of<T, true>(run, from, to, first, second);
}

void sums(int dtype, const NormalisedRows& run, const void* gy, void* gv, float* first,
          float* second) {
  dtype == 0 ? sums_of_type<float>(run, gy, gv, first, second)
             : sums_of_type<BFloat16>(run, gy, gv, first, second);
}

template <bool kStream, class T>
PNFS_INLINE void gradient_rows(const NormalisedRows& run, const T* gy, const float* slope,
                               const float* offset, T* gx) {
  const Rows<T, false> from(run);
  for (std::int64_t row = 0; row < from.rows; ++row) {
    const std::int64_t begin = row * from.channels;
    for_lanes(from.channels, [&](std::int64_t c, std::int64_t, std::int64_t, auto lanes) {
      const std::int64_t at = begin + c;
      const Vec centred = lanes.get(from.x + at) - load(from.mean + c);
      const Vec v = from.normalise(centred, at, c, lanes);
      const Vec gradient = from.limits.pass(v, lanes.get(gy + at));
      lanes.template put_out<kStream>(
          gx + at,
          load(from.scale + c) * (gradient + load(offset + c) + load(slope + c) * centred));
    });
  }
}

template <class T>
void gradient_of(const NormalisedRows& run, const T* gy, const float* slope, const float* offset,
                 T* gx, bool streams) {
  streams ? gradient_rows<true>(run, gy, slope, offset, gx)
          : gradient_rows<false>(run, gy, slope, offset, gx);
}

void gradient(int dtype, const NormalisedRows& run, const void* gy, const float* slope,
              const float* offset, void* gx, bool streams) {
  if (dtype == 0) {
    gradient_of(run, static_cast<const float*>(gy), slope, offset, static_cast<float*>(gx),
                streams);
  } else {
    gradient_of(run, static_cast<const BFloat16*>(gy), slope, offset, static_cast<BFloat16*>(gx),
                streams);
  }
  if (streams) finish_streams();
}

constexpr BatchNormActKernels kKernels{forward, sums, gradient};

}  // namespace
}  // namespace pnfs
