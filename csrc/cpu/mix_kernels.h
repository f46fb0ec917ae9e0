// The arithmetic of mixed_sum, scale_mix and batch_stats: see mix.h. Compiled once per instruction
// set; everything here has internal linkage, see simd.h.
//
// Kernels copy their arguments to local variables: stores might change what lies in memory, for all
// the compiler knows.
#pragma once

#include "cpu/channel_lanes.h"
#include "cpu/mix.h"

namespace pnfs {
namespace {

PNFS_INLINE Vec at_least(float floor, Vec v) { return floor > v ? fill(floor) : v; }

// The coefficients of a vector of channels.
struct TermLanes {
  const float* at;
  float weight, floor;

  PNFS_INLINE_MEMBER TermLanes(const Term& term, std::int64_t group, std::int64_t lane)
      : at(term.coefficients + kCoefficients * group + lane),
        weight(term.weight), floor(term.floor) {}
  PNFS_INLINE_MEMBER Vec mean() const { return load(at); }
  PNFS_INLINE_MEMBER Vec slope() const { return load(at + kGroup); }
  PNFS_INLINE_MEMBER Vec shift() const { return load(at + 2 * kGroup); }
  PNFS_INLINE_MEMBER Vec of_centred(Vec centred) const {
    return weight * at_least(floor, centred * slope() + shift());
  }
};

template <int kTerms, bool kSum, bool kRow, bool kStream, class T, class Out>
void add_terms_of(const AddTerms& run) {
  TermOfMap terms[kTerms + 1];
  for (int k = 0; k < kTerms; ++k) terms[k] = run.terms[k];
  const float *sum = run.sum, *row = run.row;
  const Between* columns = run.columns;
  const std::int64_t count = run.count, channels = run.channels, step = run.step;
  const Term widened = run.widened;
  Out* out = static_cast<Out*>(run.out);
  const float floor = run.floor;
  for (std::int64_t pixel = 0; pixel < count; ++pixel) {
    const std::int64_t first = pixel * channels;
    const float* left = nullptr;
    float share = 0;
    if constexpr (kRow) {
      left = row + columns[pixel].before * channels;
      share = columns[pixel].share;
    }
    for_lanes(channels, [&](std::int64_t c, std::int64_t group, std::int64_t lane, auto lanes) {
      const std::int64_t at = first + c;
      Vec total = {};
      if constexpr (kSum) total = lanes.get(sum + at);
      if constexpr (kRow) {
        const Vec before = lanes.get(left + c), after = lanes.get(left + step + c);
        const TermLanes t(widened, group, lane);
        total += t.of_centred(before + share * (after - before));
      }
      for (int k = 0; k < kTerms; ++k) {
        const Vec y = lanes.get(static_cast<const T*>(terms[k].map) + at);
        const TermLanes t(terms[k].term, group, lane);
        total += terms[k].term.identity ? t.weight * y : t.of_centred(y - t.mean());
      }
      lanes.template put_out<kStream>(out + at, at_least(floor, total));
    });
  }
  if constexpr (kStream) finish_streams();
}

template <bool kSum, bool kRow, bool kStream, class T, class Out>
void add_some_terms(const AddTerms& run) {
  switch (run.how_many) {
    case 0: return add_terms_of<0, kSum, kRow, kStream, T, Out>(run);
    case 1: return add_terms_of<1, kSum, kRow, kStream, T, Out>(run);
    case 2: return add_terms_of<2, kSum, kRow, kStream, T, Out>(run);
    default: return add_terms_of<3, kSum, kRow, kStream, T, Out>(run);
  }
}

template <bool kStream, class T, class Out>
void add_terms_to(const AddTerms& run) {
  if (run.sum != nullptr) {
    run.row != nullptr ? add_some_terms<true, true, kStream, T, Out>(run)
                       : add_some_terms<true, false, kStream, T, Out>(run);
  } else {
    run.row != nullptr ? add_some_terms<false, true, kStream, T, Out>(run)
                       : add_some_terms<false, false, kStream, T, Out>(run);
  }
}

template <class T>
void add_terms_of_type(const AddTerms& run) {
  if (run.to_float) return add_terms_to<false, T, float>(run);
  run.streams ? add_terms_to<true, T, T>(run) : add_terms_to<false, T, T>(run);
}

void add_terms(int dtype, const AddTerms& run) {
  dtype == 0 ? add_terms_of_type<float>(run) : add_terms_of_type<BFloat16>(run);
}

template <bool kIdentity, bool kStream, class G, class T>
void term_gradient_of(const TermGradient& run) {
  const G* g = static_cast<const G*>(run.g);
  const T* y = static_cast<const T*>(run.y);
  T* gy = static_cast<T*>(run.gy);
  const std::int64_t channels = run.channels, end = run.count * channels;
  const Term term = run.term;
  float* sums = run.sums;
  for (std::int64_t first = 0; first < end; first += channels) {
    for_lanes(channels, [&](std::int64_t c, std::int64_t group, std::int64_t lane, auto lanes) {
      const std::int64_t at = first + c;
      const TermLanes t(term, group, lane);
      float* sum = sums + kSums * group + lane;
      float* product = sum + kGroup;
      Vec passed = lanes.get(g + at), value = lanes.get(y + at), factor = fill(t.weight);
      if constexpr (!kIdentity) {
        const Vec slope = t.slope();
        value -= t.mean();
        passed = value * slope + t.shift() <= t.floor ? Vec{} : passed;
        factor *= slope;
        store(sum, load(sum) + passed);
      }
      lanes.template put_out<kStream>(gy + at, passed * factor);
      store(product, load(product) + passed * value);
    });
  }
  if constexpr (kStream) finish_streams();
}

template <bool kStream, class G, class T>
void term_gradient_to(const TermGradient& run) {
  run.term.identity ? term_gradient_of<true, kStream, G, T>(run)
                    : term_gradient_of<false, kStream, G, T>(run);
}

template <class G, class T>
void term_gradient_from(const TermGradient& run) {
  run.streams ? term_gradient_to<true, G, T>(run) : term_gradient_to<false, G, T>(run);
}

void term_gradient(int dtype, const TermGradient& run) {
  if (dtype == 0) return term_gradient_from<float, float>(run);
  run.g_is_float ? term_gradient_from<float, BFloat16>(run)
                 : term_gradient_from<BFloat16, BFloat16>(run);
}

template <bool kMasked, class T>
void pass_gradient_of(const T* g, const T* h, std::int64_t count, float* out) {
  const auto pass = [&](std::int64_t i, auto lanes) {
    const Vec v = lanes.get(g + i);
    if constexpr (kMasked) {
      lanes.put(out + i, lanes.get(h + i) > 0.0f ? v : Vec{});
    } else {
      lanes.put(out + i, v);
    }
  };
  std::int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) pass(i, AllLanes{});
  if (i < count) pass(i, SomeLanes{count - i});
}

template <class T>
void pass_gradient_of_type(const void* g, const void* h, std::int64_t count, float* out) {
  const T *from = static_cast<const T*>(g), *mask = static_cast<const T*>(h);
  mask == nullptr ? pass_gradient_of<false>(from, mask, count, out)
                  : pass_gradient_of<true>(from, mask, count, out);
}

void pass_gradient(int dtype, const void* g, const void* h, std::int64_t count, float* out) {
  dtype == 0 ? pass_gradient_of_type<float>(g, h, count, out)
             : pass_gradient_of_type<BFloat16>(g, h, count, out);
}

// The mean goes first, while differences are exact.
template <class T>
void mix_rows_of(const T* before, const T* after, float share, const Term term,
                 std::int64_t count, std::int64_t channels, float* out) {
  for (std::int64_t first = 0; first < count * channels; first += channels) {
    for_lanes(channels, [&](std::int64_t c, std::int64_t group, std::int64_t lane, auto lanes) {
      const Vec a = lanes.get(before + first + c), b = lanes.get(after + first + c);
      const Vec mean = TermLanes(term, group, lane).mean();
      lanes.put(out + first + c, (a - mean) + share * (b - a));
    });
  }
}

void mix_rows(int dtype, const void* before, const void* after, float share, const Term& term,
              std::int64_t count, std::int64_t channels, float* out) {
  if (dtype == 0) {
    mix_rows_of(static_cast<const float*>(before), static_cast<const float*>(after), share, term,
                count, channels, out);
  } else {
    mix_rows_of(static_cast<const BFloat16*>(before), static_cast<const BFloat16*>(after), share,
                term, count, channels, out);
  }
}

void gather_row(const Gathered* columns, std::int64_t count, const float* g, float share,
                std::int64_t channels, float* above, float* below) {
  for (std::int64_t x = 0; x < count; ++x) {
    const Gathered column = columns[x];
    const float* from = g + column.first * channels;
    const std::int64_t at = x * channels;
    for_lanes(channels, [&](std::int64_t c, std::int64_t, std::int64_t, auto lanes) {
      Vec sum = {};
      for (std::int64_t i = 0; i < column.count; ++i) {
        sum += column.weight[i] * lanes.get(from + i * channels + c);
      }
      const auto add = [&](float* row, float weight) {
        if (row != nullptr) lanes.put(row + at + c, lanes.get(row + at + c) + weight * sum);
      };
      add(above, 1.0f - share);
      add(below, share);
    });
  }
}

template <int kStreams, class T>
void add_moments_of(const Moments& run) {
  const T* x = static_cast<const T*>(run.x);
  const std::int64_t count = run.count, channels = run.channels, step = run.step * channels;
  const float* about = run.about;
  float *first = run.first, *second = run.second;
  for (std::int64_t pixel = 0; pixel < count; ++pixel) {
    for_lanes(channels, [&](std::int64_t c, std::int64_t, std::int64_t, auto lanes) {
      Vec sum = load(first + c), squares = load(second + c);
      const Vec centre = load(about + c);
      for (int s = 0; s < kStreams; ++s) {
        const Vec d = lanes.get(x + s * step + pixel * channels + c) - centre;
        sum += d;
        squares += d * d;
      }
      store(first + c, sum);
      store(second + c, squares);
    });
  }
}

template <class T>
void add_moments_of_type(const Moments& run) {
  run.streams == Moments::kStreams ? add_moments_of<Moments::kStreams, T>(run)
                                   : add_moments_of<1, T>(run);
}

void add_moments(int dtype, const Moments& run) {
  dtype == 0 ? add_moments_of_type<float>(run) : add_moments_of_type<BFloat16>(run);
}

constexpr MixKernels kKernels{add_terms, term_gradient, pass_gradient,
                              mix_rows,  gather_row,    add_moments};

}  // namespace
}  // namespace pnfs
