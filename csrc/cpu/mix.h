// What mixed_sum and scale_mix share: weighted sums of normalised maps, and their gradients.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/channels.h"
#include "cpu/ops.h"

namespace pnfs {

// One summand, all parts. Maps are (P, pixels, C) with parts `part_stride` elements apart.
struct MixTerm {
  const void* map;
  std::int64_t part_stride;
  void* gradient;  // like the map, without gaps; null in the forward pass
  const float *mean, *variance;  // (P, C), null: not normalised
  const float *gamma, *beta;     // (P, C), null: 1 and 0
  bool relu;
};

// The terms' per-channel coefficients, per part.
class Coefficients {
 public:
  Coefficients(const std::vector<MixTerm>& terms, const float* weights, std::int64_t parts,
               std::int64_t channels, double eps)
      : terms_(terms), weights_(weights), channels_(channels),
        values_(parts * terms.size() * 3 * channels) {
    for (std::int64_t p = 0; p < parts; ++p) {
      for (std::size_t s = 0; s < terms.size(); ++s) {
        const MixTerm& term = terms[s];
        float* mean = values(p, s);
        for (std::int64_t c = 0; c < channels; ++c) {
          const std::int64_t at = p * channels + c;
          const double gamma = term.gamma == nullptr ? 1.0 : term.gamma[at];
          const double rstd = term.mean == nullptr ? 1.0 : 1.0 / std::sqrt(term.variance[at] + eps);
          mean[c] = term.mean == nullptr ? 0.0f : term.mean[at];
          mean[channels + c] = static_cast<float>(gamma * rstd);
          mean[2 * channels + c] = term.beta == nullptr ? 0.0f : term.beta[at];
        }
      }
    }
  }

  Term term(std::int64_t part, std::size_t s) const {
    const float* mean = const_cast<Coefficients*>(this)->values(part, s);
    return {mean, mean + channels_, mean + 2 * channels_, weights_[part * terms_.size() + s],
            terms_[s].relu ? 0.0f : kNoFloor};
  }

 private:
  float* values(std::int64_t part, std::size_t s) {
    return values_.data() + (part * terms_.size() + s) * 3 * channels_;
  }

  const std::vector<MixTerm>& terms_;
  const float* weights_;
  std::int64_t channels_;
  std::vector<float> values_;
};

// What term_gradient sums up, per unit of work.
class TermSums {
 public:
  TermSums(std::int64_t units, std::size_t terms, std::int64_t channels)
      : terms_(terms), channels_(channels), values_(units * terms * 2 * channels) {}

  double* first(std::int64_t unit, std::size_t s) {
    return values_.data() + (unit * terms_ + s) * 2 * channels_;
  }
  double* second(std::int64_t unit, std::size_t s) { return first(unit, s) + channels_; }

 private:
  std::size_t terms_;
  std::int64_t channels_;
  std::vector<double> values_;
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
  std::int64_t block = 0;  // of the next normalised term
  for (std::size_t s = 0; s < terms.size(); ++s) {
    const MixTerm& term = terms[s];
    for (std::int64_t p = 0; p < parts; ++p) {
      double* first = sums.first(p * units_per_part, s);
      double* second = sums.second(p * units_per_part, s);
      for (std::int64_t u = 1; u < units_per_part; ++u) {
        const double* more_first = sums.first(p * units_per_part + u, s);
        const double* more_second = sums.second(p * units_per_part + u, s);
        for (std::int64_t c = 0; c < channels; ++c) {
          first[c] += more_first[c];
          second[c] += more_second[c];
        }
      }
      const double weight = weights[p * terms.size() + s];
      double weight_gradient = 0;
      for (std::int64_t c = 0; c < channels; ++c) {
        if (term.mean == nullptr) {
          weight_gradient += second[c];
          continue;
        }
        const std::int64_t at = p * channels + c, to = block * parts * channels + at;
        const double rstd = 1.0 / std::sqrt(term.variance[at] + eps);
        const double gamma = term.gamma == nullptr ? 1.0 : term.gamma[at];
        const double beta = term.beta == nullptr ? 0.0 : term.beta[at];
        const double normalised = rstd * second[c];
        weight_gradient += gamma * normalised + beta * first[c];
        out.means[to] = static_cast<float>(-weight * gamma * rstd * first[c]);
        out.variances[to] = static_cast<float>(-0.5 * weight * gamma * rstd * rstd * normalised);
        if (out.gammas != nullptr) out.gammas[to] = static_cast<float>(weight * normalised);
        if (out.betas != nullptr) out.betas[to] = static_cast<float>(weight * first[c]);
      }
      out.weights[p * terms.size() + s] = static_cast<float>(weight_gradient);
    }
    block += term.mean != nullptr;
  }
}

}  // namespace pnfs
