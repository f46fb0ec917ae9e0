// The mixed operation of Eq. 1: pnfs/kernels/mixed_sum.py has the definition. Every map is read
// once, in tiles that stay in the first-level cache while the terms are added up.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/mix.h"
#include "cpu/ops.h"

namespace pnfs {
namespace {

using Size = std::array<std::int64_t, 3>;  // P, pixels of a part, C

std::vector<MixTerm> mix_terms(const Addresses& maps, const Integers& part_strides,
                               const Addresses& means, const Addresses& variances,
                               const Integers& relu, const Addresses& gradients) {
  const std::size_t plain = maps.size() - means.size();  // terms without normalisation: x, or none
  std::vector<MixTerm> terms;
  for (std::size_t s = 0; s < maps.size(); ++s) {
    MixTerm term{reinterpret_cast<const void*>(maps[s]), part_strides[s], nullptr, nullptr, nullptr,
                 nullptr, nullptr, false};
    if (s >= plain) {
      term.mean = reinterpret_cast<const float*>(means[s - plain]);
      term.variance = reinterpret_cast<const float*>(variances[s - plain]);
      term.relu = relu[s - plain] != 0;
    }
    if (!gradients.empty()) term.gradient = reinterpret_cast<void*>(gradients[s]);
    terms.push_back(term);
  }
  return terms;
}

template <class T>
void forward(const std::vector<MixTerm>& terms, const Coefficients& coefficients, const Cut& cut,
             const Size& size, T* out) {
  const std::int64_t channels = size[2], units = size[0] * cut.units_per_part;
  const std::size_t last = terms.size() - 1;
#pragma omp parallel if (units > 1)
  {
    Scratch tile(cut.tile * channels);
    float* sum = tile.data();
#pragma omp for schedule(static)
    for (std::int64_t unit = 0; unit < units; ++unit) {
      const std::int64_t p = unit / cut.units_per_part;
      cut.for_tiles(unit % cut.units_per_part, [&](std::int64_t at, std::int64_t count) {
        for (std::size_t s = 0; s <= last; ++s) {
          const T* map = static_cast<const T*>(terms[s].map) + p * terms[s].part_stride;
          const Pixels<T> source{map + at * channels, channels};
          const float* before = s == 0 ? nullptr : sum;
          const Term term = coefficients.term(p, s);
          if (s < last) {
            add_term(source, count, channels, term, before, sum, kNoFloor);
          } else {
            T* to = out + (p * cut.pixels + at) * channels;
            add_term(source, count, channels, term, before, to, kNoFloor);
          }
        }
      });
    }
  }
}

template <class T>
void backward(const std::vector<MixTerm>& terms, const Coefficients& coefficients, const Cut& cut,
              const Size& size, const T* g, std::int64_t g_part_stride, TermSums& sums) {
  const std::int64_t channels = size[2], units = size[0] * cut.units_per_part;
#pragma omp parallel for schedule(static) if (units > 1)
  for (std::int64_t unit = 0; unit < units; ++unit) {
    const std::int64_t p = unit / cut.units_per_part;
    cut.for_tiles(unit % cut.units_per_part, [&](std::int64_t at, std::int64_t count) {
      for (std::size_t s = 0; s < terms.size(); ++s) {
        const T* map = static_cast<const T*>(terms[s].map) + p * terms[s].part_stride;
        T* gradient = static_cast<T*>(terms[s].gradient) + p * cut.pixels * channels;
        term_gradient(g + p * g_part_stride + at * channels, map + at * channels,
                      gradient + at * channels, count, channels, coefficients.term(p, s),
                      sums.first(unit, s), sums.second(unit, s));
      }
    });
  }
}

}  // namespace

void mixed_sum(const Addresses& maps, const Integers& part_strides, const Addresses& means,
               const Addresses& variances, Address weights, const Integers& relu, double eps,
               Address out, const Size& size, int dtype) {
  const auto terms = mix_terms(maps, part_strides, means, variances, relu, {});
  const Coefficients coefficients(terms, reinterpret_cast<const float*>(weights), size[0], size[2],
                                  eps);
  dispatch_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    forward(terms, coefficients, Cut(size[1], size[2]), size, reinterpret_cast<T*>(out));
  });
}

void mixed_sum_backward(Address g, std::int64_t g_part_stride, const Addresses& maps,
                        const Integers& part_strides, const Addresses& means,
                        const Addresses& variances, Address weights, const Integers& relu,
                        double eps, const Addresses& g_maps, Address g_means, Address g_variances,
                        Address g_weights, const Size& size, int dtype) {
  const auto terms = mix_terms(maps, part_strides, means, variances, relu, g_maps);
  const auto* w = reinterpret_cast<const float*>(weights);
  const Coefficients coefficients(terms, w, size[0], size[2], eps);
  const Cut cut(size[1], size[2]);
  TermSums sums(size[0] * cut.units_per_part, terms.size(), size[2]);
  dispatch_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    backward(terms, coefficients, cut, size, reinterpret_cast<const T*>(g), g_part_stride, sums);
  });
  finish_gradients(terms, w, sums, size[0], cut.units_per_part, size[2], eps,
                   {reinterpret_cast<float*>(g_means), reinterpret_cast<float*>(g_variances),
                    nullptr, nullptr, reinterpret_cast<float*>(g_weights)});
}

}  // namespace pnfs
