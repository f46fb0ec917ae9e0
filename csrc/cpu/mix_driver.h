// What the drivers of mixed_sum, scale_mix and batch_stats share: how work is cut, coefficients, sums
// and what becomes of them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/isa.h"
#include "cpu/mix.h"
#include "cpu/ops.h"
#include "cpu/workspace.h"

namespace pnfs {

constexpr float kNoFloor = -std::numeric_limits<float>::infinity();
constexpr std::int64_t kTile = 2048;          // elements that stay in the first-level cache
constexpr std::int64_t kUnit = 32 * kTile;    // elements of one map that a thread takes at a time
constexpr std::int64_t kFloatPixels = 128;    // that are summed up in float32
constexpr std::int64_t kStreamBytes = 4 << 20;  // maps from this size on bypass the caches

inline const MixKernels& mix_kernels() {
#if defined(__x86_64__)
  switch (chosen_isa()) {
    case Isa::avx512: return kMixAvx512;
    case Isa::avx2: return kMixAvx2;
    default: break;
  }
#endif
  return kMixPortable;
}

inline std::int64_t padded(std::int64_t channels) {
  return (channels + kGroup - 1) / kGroup * kGroup;
}

inline std::int64_t element_size(int dtype) { return dtype == 0 ? 4 : 2; }

// Element `at` of a map.
inline const char* element(const void* map, std::int64_t at, int dtype) {
  return static_cast<const char*>(map) + at * element_size(dtype);
}
inline char* element(void* map, std::int64_t at, int dtype) {
  return static_cast<char*>(map) + at * element_size(dtype);
}

// Whether to write a map of `count` elements past the caches: it is too large to stay there, and its
// vectors are aligned.
inline bool worth_streaming(const void* map, std::int64_t count, std::int64_t channels, int dtype) {
  return count * element_size(dtype) >= kStreamBytes && channels % kGroup == 0 &&
         reinterpret_cast<std::uintptr_t>(map) % 64 == 0;
}

// The pixels of a part, cut into units of work and those into tiles, by shapes alone: sums that are
// taken per unit and added up in order do not depend on threads.
struct Cut {
  std::int64_t pixels, unit, tile, units_per_part;

  Cut(std::int64_t pixels_of_part, std::int64_t channels)
      : pixels(pixels_of_part),
        unit(std::max<std::int64_t>(1, kUnit / std::max<std::int64_t>(1, channels))),
        tile(std::max<std::int64_t>(1, kTile / std::max<std::int64_t>(1, channels))),
        units_per_part(std::max<std::int64_t>(1, (pixels + unit - 1) / unit)) {}

  // The first pixel of unit u, and of what follows it.
  std::int64_t begin(std::int64_t u) const { return u * unit; }
  std::int64_t end(std::int64_t u) const { return std::min(pixels, (u + 1) * unit); }

  // Calls visit(first pixel, count) for the tiles of the u-th unit of a part.
  template <class Visit>
  void for_tiles(std::int64_t u, Visit visit) const {
    for (std::int64_t at = begin(u); at < end(u); at += tile) {
      visit(at, std::min(tile, end(u) - at));
    }
  }
};

// One summand, all parts. Maps are (P, pixels, C) with parts `part_stride` elements apart.
struct MixTerm {
  const void* map;
  std::int64_t part_stride;
  void* gradient;                // like the map, without gaps; null in the forward pass
  const float *mean, *variance;  // (P, C), null: not normalised
  const float *gamma, *beta;     // (P, C), null: 1 and 0
  bool relu;

  bool identity() const { return mean == nullptr; }
};

// The terms' per-channel coefficients, per part.
class Coefficients {
 public:
  Coefficients(const std::vector<MixTerm>& terms, const float* weights, std::int64_t parts,
               std::int64_t channels, double eps)
      : terms_(terms), weights_(weights), per_term_(kCoefficients * padded(channels)),
        values_(memory_.floats(parts * terms.size() * per_term_)) {
    for (std::int64_t p = 0; p < parts; ++p) {
      for (std::size_t s = 0; s < terms.size(); ++s) {
        const MixTerm& term = terms[s];
        float* values = values_ + offset(p, s);
        for (std::int64_t c = 0; c < channels; ++c) {
          const std::int64_t at = p * channels + c;
          const double gamma = term.gamma == nullptr ? 1.0 : term.gamma[at];
          const double rstd = term.identity() ? 1.0 : 1.0 / std::sqrt(term.variance[at] + eps);
          values[interleaved(c, 0, kCoefficients)] = term.identity() ? 0.0f : term.mean[at];
          values[interleaved(c, 1, kCoefficients)] = static_cast<float>(gamma * rstd);
          values[interleaved(c, 2, kCoefficients)] = term.beta == nullptr ? 0.0f : term.beta[at];
        }
      }
    }
  }

  Term term(std::int64_t part, std::size_t s) const {
    return {values_ + offset(part, s), weights_[part * terms_.size() + s],
            terms_[s].relu ? 0.0f : kNoFloor, terms_[s].identity()};
  }

 private:
  std::int64_t offset(std::int64_t part, std::size_t s) const {
    return (part * static_cast<std::int64_t>(terms_.size()) + s) * per_term_;
  }

  const std::vector<MixTerm>& terms_;
  const float* weights_;
  std::int64_t per_term_;
  Workspace memory_;  // aligned, so that no load touches two cache lines
  float* values_;
};

// out = max(start + Σ terms, floor), for any number of terms. `start` has all but the terms; `tile` is
// scratch for as many pixels.
inline void add_all_terms(const MixKernels& kernels, int dtype, AddTerms start,
                          const std::vector<TermOfMap>& terms, float* tile) {
  AddTerms run = start;
  std::size_t done = 0;
  for (; terms.size() - done > AddTerms::kMost; done += AddTerms::kMost) {
    run.terms = terms.data() + done;
    run.how_many = AddTerms::kMost;
    run.out = tile;
    run.to_float = true;
    run.floor = kNoFloor;
    kernels.add_terms(dtype, run);
    run.sum = tile;
    run.row = nullptr;
  }
  run.terms = terms.data() + done;
  run.how_many = static_cast<std::int64_t>(terms.size() - done);
  run.out = start.out;
  run.to_float = start.to_float;
  run.floor = start.floor;
  kernels.add_terms(dtype, run);
}

// What term_gradient sums up, per unit of work, in float64.
class TermSums {
 public:
  TermSums(std::int64_t units, std::size_t terms, std::int64_t channels)
      : per_term(kSums * padded(channels)),
        per_unit(static_cast<std::int64_t>(terms) * per_term),
        values_(units * per_unit) {}

  double* of(std::int64_t unit, std::size_t s = 0) {
    return values_.data() + unit * per_unit + static_cast<std::int64_t>(s) * per_term;
  }

  const std::int64_t per_term, per_unit;  // how many values

 private:
  std::vector<double> values_;
};

// The same in float32, for a few pixels at a time.
class FloatSums {
 public:
  explicit FloatSums(const TermSums& sums)
      : count_(sums.per_unit), per_term_(sums.per_term), values_(memory_.floats(count_)) {
    std::fill_n(values_, count_, 0.0f);
  }

  float* of(std::size_t s) { return values_ + static_cast<std::int64_t>(s) * per_term_; }

  // Notes that `pixels` more are in; moves the sums to `to` when there are many.
  void add_pixels(std::int64_t pixels, double* to) {
    pixels_ += pixels;
    if (pixels_ >= kFloatPixels) finish(to);
  }
  void finish(double* to) {
    for (std::int64_t i = 0; i < count_; ++i) to[i] += values_[i];
    std::fill_n(values_, count_, 0.0f);
    pixels_ = 0;
  }

 private:
  std::int64_t count_, per_term_, pixels_ = 0;
  Workspace memory_;
  float* values_;
};

// Where gradients of the small tensors go; one (P, C) block per normalised term.
struct SmallGradients {
  float *means, *variances, *gammas, *betas;  // the latter two may be null
  float* weights;                             // (P, terms)
};

// From the sums over the units of each part to the gradients of statistics, scales and weights.
inline void finish_gradients(const std::vector<MixTerm>& terms, const float* weights,
                             TermSums& sums, std::int64_t parts, std::int64_t units_per_part,
                             std::int64_t channels, double eps, const SmallGradients& out) {
  for (std::int64_t p = 0; p < parts; ++p) {
    double* total = sums.of(p * units_per_part);
    for (std::int64_t u = 1; u < units_per_part; ++u) {
      const double* more = sums.of(p * units_per_part + u);
      for (std::int64_t i = 0; i < sums.per_unit; ++i) total[i] += more[i];
    }
    std::int64_t block = 0;  // of the next normalised term
    for (std::size_t s = 0; s < terms.size(); ++s) {
      const MixTerm& term = terms[s];
      const double* sums_of_term = sums.of(p * units_per_part, s);
      const double weight = weights[p * terms.size() + s];
      double weight_gradient = 0;
      for (std::int64_t c = 0; c < channels; ++c) {
        const double first = sums_of_term[interleaved(c, 0, kSums)];
        const double second = sums_of_term[interleaved(c, 1, kSums)];
        if (term.identity()) {
          weight_gradient += second;
          continue;
        }
        const std::int64_t at = p * channels + c, to = block * parts * channels + at;
        const double rstd = 1.0 / std::sqrt(term.variance[at] + eps);
        const double gamma = term.gamma == nullptr ? 1.0 : term.gamma[at];
        const double beta = term.beta == nullptr ? 0.0 : term.beta[at];
        const double normalised = rstd * second;
        weight_gradient += gamma * normalised + beta * first;
        out.means[to] = static_cast<float>(-weight * gamma * rstd * first);
        out.variances[to] = static_cast<float>(-0.5 * weight * gamma * rstd * rstd * normalised);
        if (out.gammas != nullptr) out.gammas[to] = static_cast<float>(weight * normalised);
        if (out.betas != nullptr) out.betas[to] = static_cast<float>(weight * first);
      }
      out.weights[p * terms.size() + s] = static_cast<float>(weight_gradient);
      block += !term.identity();
    }
  }
}

// Mean and Σ (x - mean)² per channel of the pixels so far.
struct Spread {
  double* mean;
  double* squares;

  // Adds `count` pixels with their mean and spread to `before` pixels.
  void merge(double before, std::int64_t c, double count, double other, double other_squares) {
    const double share = count / (before + count), difference = other - mean[c];
    mean[c] += share * difference;
    squares[c] += other_squares + difference * difference * before * share;
  }
};

}  // namespace pnfs
