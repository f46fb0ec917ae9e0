// Driver of mixed_sum, Eq. 1: pnfs/kernels/mixed_sum.py has the definition, mix_kernels.h the
// arithmetic. Every map is read once, in tiles; backward, a tile of g stays in the first-level cache
// while the terms take it in turn.

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "cpu/mix_driver.h"
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

}  // namespace

void mixed_sum(const Addresses& maps, const Integers& part_strides, const Addresses& means,
               const Addresses& variances, Address weights, const Integers& relu, double eps,
               Address out, const Size& size, int dtype) {
  const std::int64_t parts = size[0], c = size[2], elements = size[0] * size[1] * size[2];
  const auto terms = mix_terms(maps, part_strides, means, variances, relu, {});
  const auto* w = reinterpret_cast<const float*>(weights);
  const Coefficients coefficients(terms, w, parts, c, eps);
  const MixKernels& kernels = mix_kernels();
  const Cut cut(size[1], c);
  const std::int64_t units = parts * cut.units_per_part;
  void* to = reinterpret_cast<void*>(out);
  const bool streams = worth_streaming(to, elements, c, dtype);
#pragma omp parallel if (units > 1)
  {
    static thread_local Workspace memory;
    float* tile = memory.floats(cut.tile * c);
    std::vector<TermOfMap> here(terms.size());
#pragma omp for schedule(static)
    for (std::int64_t unit = 0; unit < units; ++unit) {
      const std::int64_t p = unit / cut.units_per_part;
      cut.for_tiles(unit % cut.units_per_part, [&](std::int64_t at, std::int64_t count) {
        for (std::size_t s = 0; s < terms.size(); ++s) {
          const std::int64_t first = p * terms[s].part_stride + at * c;
          here[s] = {coefficients.term(p, s), element(terms[s].map, first, dtype)};
        }
        AddTerms run{};
        run.count = count;
        run.channels = c;
        run.out = element(to, (p * cut.pixels + at) * c, dtype);
        run.streams = streams;
        run.floor = kNoFloor;
        add_all_terms(kernels, dtype, run, here, tile);
      });
    }
  }
}

void mixed_sum_backward(Address g, std::int64_t g_part_stride, const Addresses& maps,
                        const Integers& part_strides, const Addresses& means,
                        const Addresses& variances, Address weights, const Integers& relu,
                        double eps, const Addresses& g_maps, Address g_means, Address g_variances,
                        Address g_weights, const Size& size, int dtype) {
  const std::int64_t parts = size[0], c = size[2], elements = size[0] * size[1] * size[2];
  const auto terms = mix_terms(maps, part_strides, means, variances, relu, g_maps);
  const auto* w = reinterpret_cast<const float*>(weights);
  const Coefficients coefficients(terms, w, parts, c, eps);
  const MixKernels& kernels = mix_kernels();
  const Cut cut(size[1], c);
  const std::int64_t units = parts * cut.units_per_part;
  const void* from = reinterpret_cast<const void*>(g);
  TermSums sums(units, terms.size(), c);
#pragma omp parallel if (units > 1)
  {
    FloatSums partial(sums);
#pragma omp for schedule(static)
    for (std::int64_t unit = 0; unit < units; ++unit) {
      const std::int64_t p = unit / cut.units_per_part;
      cut.for_tiles(unit % cut.units_per_part, [&](std::int64_t at, std::int64_t count) {
        TermGradient run{};
        run.g = element(from, p * g_part_stride + at * c, dtype);
        run.count = count;
        run.channels = c;
        for (std::size_t s = 0; s < terms.size(); ++s) {
          const MixTerm& term = terms[s];
          run.y = element(term.map, p * term.part_stride + at * c, dtype);
          run.gy = element(term.gradient, (p * cut.pixels + at) * c, dtype);
          run.term = coefficients.term(p, s);
          run.sums = partial.of(s);
          run.streams = worth_streaming(term.gradient, elements, c, dtype);
          kernels.term_gradient(dtype, run);
        }
        partial.add_pixels(count, sums.of(unit));
      });
      partial.finish(sums.of(unit));
    }
  }
  finish_gradients(terms, w, sums, parts, cut.units_per_part, c, eps,
                   {reinterpret_cast<float*>(g_means), reinterpret_cast<float*>(g_variances),
                    nullptr, nullptr, reinterpret_cast<float*>(g_weights)});
}

}  // namespace pnfs
