// What the drivers of mixed_sum, scale_mix and batch_stats (threads, memory, reductions: mix_driver.h)
// and their kernels (mix_kernels.h, once per instruction set) share. Plain data only, see cpu/simd.h.
//
// Kernels take runs of pixels whose C channels are adjacent, and go through memory from front to
// back, which is what prefetchers expect. What belongs to a channel (coefficients, sums) stays in the
// first-level cache meanwhile: float32, the values of a channel's group of 16 together.
#pragma once

#include <cstdint>

namespace pnfs {

constexpr std::int64_t kGroup = 16;         // channels; a multiple of every instruction set's lanes
constexpr std::int64_t kCoefficients = 3;   // mean, slope, shift
constexpr std::int64_t kSums = 2;           // Σ g, Σ g (y - mean)

// Where value `kind` of channel c lies, of `kinds` values per channel.
constexpr std::int64_t interleaved(std::int64_t c, std::int64_t kind, std::int64_t kinds) {
  return c / kGroup * kGroup * kinds + kind * kGroup + c % kGroup;
}

// One summand of a mix: weight · max(slope (y - mean) + shift, floor), per channel. The mean is not
// folded into the shift: where it is large against the deviation, that would cost digits.
struct Term {
  const float* coefficients;  // kCoefficients per channel
  float weight, floor;
  bool identity;  // it is weight · y
};

struct TermOfMap {
  Term term;
  const void* map;  // the first pixel
};

// Of position i on an axis of 2·half samples, between `before` and the sample after it on the axis of
// half as many with the same ends.
struct Between {
  std::int64_t before;
  float share;  // of the sample after
};

// The columns of g that a column of half the width gathers.
struct Gathered {
  static constexpr std::int64_t kMost = 6;
  std::int64_t first, count;
  float weight[kMost];
};

// out = max(Σ terms + widened row + sum, floor) for `count` pixels.
struct AddTerms {
  static constexpr std::int64_t kMost = 3;
  const TermOfMap* terms;
  std::int64_t how_many;  // at most kMost
  std::int64_t count, channels;
  const float* sum;  // null: 0
  // A row of half the width, less its mean, and the term that it is; null: none.
  const float* row;
  const Between* columns;
  std::int64_t step;  // from a column of the row to the next: 0 where there is only one
  Term widened;
  void* out;
  bool to_float;  // `out` is float32 whatever the dtype, and may be `sum`
  bool streams;   // it is stored past the caches; its pixels are aligned to lines
  float floor;
};

// The gradient of a term for `count` pixels: gy = ∂term/∂y · g, and per channel, over the pixels that
// the floor does not cut off, `sums` grow by Σ g and Σ g (y - mean); by Σ g y alone for an identity.
struct TermGradient {
  const void* g;
  bool g_is_float;  // whatever the dtype
  const void* y;
  void* gy;
  std::int64_t count, channels;
  Term term;
  float* sums;  // kSums per channel
  bool streams;
};

// Of a map: Σ (x - about) and Σ (x - about)² per channel. Pixels lie in `streams` runs of `count`,
// `step` pixels apart, which are read side by side: memory answers several streams faster than one.
struct Moments {
  static constexpr std::int64_t kStreams = 4;
  const void* x;
  std::int64_t streams, count, step, channels;
  const float* about;      // (padded C)
  float *first, *second;  // (padded C), added to
};

// dtype: see core/dtypes.h; 0 or 1.
struct MixKernels {
  void (*add_terms)(int dtype, const AddTerms&);
  void (*term_gradient)(int dtype, const TermGradient&);
  // out = g where h > 0, else 0; g where h is null.
  void (*pass_gradient)(int dtype, const void* g, const void* h, std::int64_t count, float* out);
  // out = before + share (after - before) - mean, for `count` pixels.
  void (*mix_rows)(int dtype, const void* before, const void* after, float share, const Term&,
                   std::int64_t count, std::int64_t channels, float* out);
  // above += (1 - share) · narrowed g and below += share · narrowed g, rows of `count` pixels; either
  // may be null.
  void (*gather_row)(const Gathered* columns, std::int64_t count, const float* g, float share,
                     std::int64_t channels, float* above, float* below);
  void (*add_moments)(int dtype, const Moments&);
};

extern const MixKernels kMixPortable;
#if defined(__x86_64__)
extern const MixKernels kMixAvx2, kMixAvx512;
#endif

}  // namespace pnfs
