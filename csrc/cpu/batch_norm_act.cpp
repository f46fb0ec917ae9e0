// Driver of batch_norm_act: pnfs/kernels/batch_norm_act.py has the definition,
// batch_norm_act_kernels.h the arithmetic. Sums are taken per unit of work in float64 and added up in
// order, whatever the number of threads.

#include "cpu/batch_norm_act.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "cpu/mix_driver.h"
#include "cpu/ops.h"

namespace pnfs {
namespace {

constexpr float kNoLimit = std::numeric_limits<float>::quiet_NaN();

const BatchNormActKernels& chosen_kernels() {
#if defined(__x86_64__)
  switch (chosen_isa()) {
    case Isa::avx512: return kBatchNormActAvx512;
    case Isa::avx2: return kBatchNormActAvx2;
    default: break;
  }
#endif
  return kBatchNormActPortable;
}

// The map as rows of whole vectors: each of `pixels_per_row` pixels. What remains at the end has rows
// of one pixel.
struct RowCut {
  std::int64_t channels, pixels_per_row, width, full_rows, single_rows;
  Cut cut;  // of the full rows

  RowCut(std::int64_t pixels, std::int64_t channels_)
      : channels(channels_),
        pixels_per_row(kGroup / std::gcd(channels_, kGroup)),
        width(channels_ * pixels_per_row),
        full_rows(pixels / pixels_per_row),
        single_rows(pixels % pixels_per_row),
        cut(full_rows, width) {}

  std::int64_t elements() const { return full_rows * width + single_rows * channels; }

  // Calls visit(first element, rows, channels of a row) for the u-th unit; single rows go last.
  template <class Visit>
  void for_rows(std::int64_t u, std::int64_t most, Visit visit) const {
    for (std::int64_t at = cut.begin(u); at < cut.end(u); at += most) {
      visit(at * width, std::min(most, cut.end(u) - at), width);
    }
    if (u + 1 == cut.units_per_part && single_rows > 0) {
      visit(full_rows * width, single_rows, channels);
    }
  }

  // Calls set(c, i) for every position i in a row and its channel c.
  template <class Set>
  void for_row(Set set) const {
    for (std::int64_t i = 0; i < width; ++i) set(i % channels, i);
  }
};

enum Slot { kMean, kScale, kShift, kSlope, kOffset, kSlots };  // of the coefficients of a row

const float* floats(Address tensor) { return reinterpret_cast<const float*>(tensor); }

// What the forward and the backward pass have in common.
struct Normalisation {
  const BatchNormActKernels& kernels = chosen_kernels();
  RowCut rows;
  int dtype, activation;
  float* coefficients;

  Normalisation(const std::array<Address, 4>& norm, const std::array<std::int64_t, 2>& size,
                double eps, int activation_, int dtype_)
      : rows(size[0], size[1]), dtype(dtype_), activation(activation_) {
    static thread_local Workspace memory;
    coefficients = memory.floats(kSlots * rows.width);
    const float *mean = floats(norm[0]), *var = floats(norm[1]);
    const float *weight = floats(norm[2]), *bias = floats(norm[3]);
    std::vector<float> scale(rows.channels);
    for (std::int64_t c = 0; c < rows.channels; ++c) {
      scale[c] = static_cast<float>(weight[c] / std::sqrt(var[c] + eps));
    }
    rows.for_row([&](std::int64_t c, std::int64_t i) {
      slot(kMean)[i] = mean[c];
      slot(kScale)[i] = scale[c];
      slot(kShift)[i] = bias[c];
    });
  }

  float* slot(Slot which) const { return coefficients + which * rows.width; }

  NormalisedRows run(Address x, Address residual, bool limited, std::int64_t at,
                     std::int64_t count, std::int64_t channels) const {
    return {from(x, at), from(residual, at), count, channels, slot(kMean), slot(kScale),
            slot(kShift), limited && activation > 0 ? 0.0f : kNoLimit,
            limited && activation > 1 ? 6.0f : kNoLimit};
  }

  void* from(Address map, std::int64_t at) const {
    return map == 0 ? nullptr : element(reinterpret_cast<void*>(map), at, dtype);
  }

  bool streams(Address map) const {
    return worth_streaming(reinterpret_cast<const void*>(map), rows.elements(), rows.width, dtype);
  }

  // Calls work(unit) for all units, on all threads.
  template <class Work>
  void for_units(Work work) const {
    const std::int64_t units = rows.elements() == 0 ? 0 : rows.cut.units_per_part;
#pragma omp parallel for schedule(static) if (units > 1)
    for (std::int64_t unit = 0; unit < units; ++unit) work(unit);
  }
};

// Σ gv and Σ gv·(x - mean), (C) each in float64; writes gv unless it is 0.
std::array<std::vector<double>, 2> gradient_sums(const Normalisation& norm, Address gy, Address x,
                                                 Address residual, Address gv) {
  const RowCut& rows = norm.rows;
  std::vector<double> values(2 * rows.width * rows.cut.units_per_part);
  norm.for_units([&](std::int64_t unit) {
    static thread_local Workspace memory;
    float* first = memory.floats(2 * rows.width);
    double* total = values.data() + unit * 2 * rows.width;
    rows.for_rows(unit, kFloatPixels,
                  [&](std::int64_t at, std::int64_t count, std::int64_t channels) {
                    std::fill_n(first, 2 * rows.width, 0.0f);
                    norm.kernels.sums(norm.dtype, norm.run(x, residual, true, at, count, channels),
                                      norm.from(gy, at), norm.from(gv, at), first,
                                      first + rows.width);
                    for (std::int64_t i = 0; i < 2 * rows.width; ++i) total[i] += first[i];
                  });
  });
  std::array<std::vector<double>, 2> sums{std::vector<double>(rows.channels),
                                          std::vector<double>(rows.channels)};
  for (std::int64_t unit = 0; unit < rows.cut.units_per_part; ++unit) {
    const double* total = values.data() + unit * 2 * rows.width;
    rows.for_row([&](std::int64_t c, std::int64_t i) {
      sums[0][c] += total[i];
      sums[1][c] += total[rows.width + i];
    });
  }
  return sums;
}

}  // namespace

void batch_norm_act(Address x, Address residual, const std::array<Address, 4>& norm, Address y,
                    const std::array<std::int64_t, 2>& size, bool batch, double eps,
                    int activation, int dtype) {
  if (batch) batch_stats(x, 0, norm[0], norm[1], {1, size[0], size[1]}, dtype);
  const Normalisation normalisation(norm, size, eps, activation, dtype);
  const bool streams = normalisation.streams(y);
  normalisation.for_units([&](std::int64_t unit) {
    normalisation.rows.for_rows(
        unit, normalisation.rows.cut.unit,
        [&](std::int64_t at, std::int64_t count, std::int64_t channels) {
          normalisation.kernels.forward(
              dtype, normalisation.run(x, residual, true, at, count, channels),
              normalisation.from(y, at), streams && channels == normalisation.rows.width);
        });
  });
}

void batch_norm_act_backward(Address gy, Address x, Address residual,
                             const std::array<Address, 4>& norm, Address gx, Address gv,
                             const std::array<Address, 4>& gradients,
                             const std::array<std::int64_t, 2>& size, bool batch, double eps,
                             int activation, int dtype) {
  const Normalisation normalisation(norm, size, eps, activation, dtype);
  const RowCut& rows = normalisation.rows;
  const auto sums = gradient_sums(normalisation, gy, x, residual, gv);
  const auto out = [&](int which) { return reinterpret_cast<float*>(gradients[which]); };
  const double inverse = batch ? 1.0 / static_cast<double>(std::max<std::int64_t>(1, size[0])) : 0;
  std::vector<float> slope(rows.channels), offset(rows.channels);
  for (std::int64_t c = 0; c < rows.channels; ++c) {
    // an empty batch has no statistics, and no gradients
    const double rstd = size[0] == 0 ? 0.0 : 1.0 / std::sqrt(floats(norm[1])[c] + eps);
    const double scale = floats(norm[2])[c] * rstd;
    slope[c] = static_cast<float>(-rstd * rstd * sums[1][c] * inverse);
    offset[c] = static_cast<float>(-sums[0][c] * inverse);
    out(0)[c] = static_cast<float>(sums[1][c] * rstd);
    out(1)[c] = static_cast<float>(sums[0][c]);
    if (batch) continue;
    out(2)[c] = static_cast<float>(-scale * sums[0][c]);
    out(3)[c] = static_cast<float>(-0.5 * scale * rstd * rstd * sums[1][c]);
  }
  rows.for_row([&](std::int64_t c, std::int64_t i) {
    normalisation.slot(kSlope)[i] = slope[c];
    normalisation.slot(kOffset)[i] = offset[c];
  });
  const Address incoming = gv == 0 ? gy : gv;
  const bool streams = normalisation.streams(gx);
  normalisation.for_units([&](std::int64_t unit) {
    rows.for_rows(unit, rows.cut.unit,
                  [&](std::int64_t at, std::int64_t count, std::int64_t channels) {
                    normalisation.kernels.gradient(
                        dtype, normalisation.run(x, 0, gv == 0, at, count, channels),
                        normalisation.from(incoming, at), normalisation.slot(kSlope),
                        normalisation.slot(kOffset), normalisation.from(gx, at),
                        streams && channels == rows.width);
                  });
  });
}

}  // namespace pnfs
