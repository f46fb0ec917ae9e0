// The input mix of Eq. 2: pnfs/kernels/scale_mix.py has the definition. Rows of the output are made
// one after the other, in a buffer that stays in the first-level cache.
//
// Upsampling is first vertical, one row of half the width, then horizontal, on load. Its gradient
// is gathered: a row of g is narrowed to half the width and added, with its two vertical weights,
// to two rows of half resolution, which are complete once g's rows have passed them.

#include <algorithm>
#include <array>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "cpu/mix.h"
#include "cpu/ops.h"

namespace pnfs {
namespace {

// A thread takes a band of an image: all of it where there are images enough to share out.
constexpr std::int64_t kEnoughUnits = 16;
constexpr std::int64_t kLeastRows = 8;

enum Transform { kSame, kDown, kUp };

using Size = std::array<std::int64_t, 5>;  // P, N, C, H, W

struct Problem {
  std::vector<MixTerm> terms;
  std::vector<bool> up;
  std::int64_t parts, images, channels, height, width;
  bool relu;

  bool any_up() const { return std::find(up.begin(), up.end(), true) != up.end(); }
  // Pixels of one image of a term.
  std::int64_t pixels(std::size_t s) const { return height * width / (up[s] ? 4 : 1); }
  template <class T>
  const T* map(std::size_t s, std::int64_t p, std::int64_t n) const {
    return static_cast<const T*>(terms[s].map) + p * terms[s].part_stride +
           n * pixels(s) * channels;
  }
  template <class T>
  T* gradient(std::size_t s, std::int64_t p, std::int64_t n) const {
    return static_cast<T*>(terms[s].gradient) + (p * images + n) * pixels(s) * channels;
  }
};

// Of position i on an axis of 2·half samples, between `before` and the sample after it on the axis
// of half as many with the same ends. Integers, so that both ends are met exactly.
struct Between {
  std::int64_t before;
  float share;  // of the sample after

  Between(std::int64_t i, std::int64_t half) {
    const std::int64_t steps = 2 * half - 1, position = i * (half - 1);
    before = std::min(position / steps, std::max<std::int64_t>(0, half - 2));
    share = static_cast<float>(position - before * steps) / static_cast<float>(steps);
  }
};

// Of every position; of none where nothing is upsampled, and sizes may be odd.
std::vector<Between> between(std::int64_t size, bool any_up) {
  std::vector<Between> all;
  for (std::int64_t i = 0; any_up && i < size; ++i) all.emplace_back(i, size / 2);
  return all;
}

// Bands of images: units of work, cut by shapes alone.
struct Bands {
  std::int64_t per_image, rows, height;

  explicit Bands(const Problem& q) : height(q.height) {
    const std::int64_t images = std::max<std::int64_t>(1, q.parts * q.images);
    const std::int64_t wanted = std::max<std::int64_t>(1, kEnoughUnits / images);
    rows = std::max(kLeastRows, (height + wanted - 1) / wanted);
    rows += rows % 2;
    per_image = std::max<std::int64_t>(1, (height + rows - 1) / rows);
  }
  std::int64_t begin(std::int64_t band) const { return band * rows; }
  std::int64_t end(std::int64_t band) const { return std::min(height, (band + 1) * rows); }
};

// A row of half the width, read as one of full width.
struct Widened {
  const float* row;
  const Between* columns;
  std::int64_t channels;
  std::int64_t step;  // from a column to the next: 0 where there is only one

  template <class Group>
  FloatLanes load(const Group& group, std::int64_t pixel, int v) const {
    const float* at = row + columns[pixel].before * channels;
    const FloatLanes before = group.load(at, v), after = group.load(at + step, v);
    return before + columns[pixel].share * (after - before);
  }
};

// out = rows before and after, mixed, less the mean: first, while the differences are exact.
template <class T>
void mix_rows(const T* before, const T* after, float share, const float* mean, std::int64_t pixels,
              std::int64_t channels, float* out) {
  for_channel_groups(channels, [&](const auto& group) {
    constexpr int kVectors = std::decay_t<decltype(group)>::kVectors;
    FloatLanes centre[kVectors];
    for (int v = 0; v < kVectors; ++v) centre[v] = group.load(mean, v);
    for (std::int64_t i = 0; i < pixels * channels; i += channels) {
      for (int v = 0; v < kVectors; ++v) {
        const FloatLanes a = group.load(before + i, v), b = group.load(after + i, v);
        group.store(out + i, v, (a - centre[v]) + share * (b - a));
      }
    }
  });
}

template <class T>
void forward(const Problem& q, const Coefficients& coefficients, T* out) {
  const Bands bands(q);
  const auto rows = between(q.height, q.any_up()), columns = between(q.width, q.any_up());
  const std::int64_t c = q.channels, w = q.width, units = q.parts * q.images * bands.per_image;
  const std::size_t last = q.terms.size() - 1;
  const std::int64_t row_step = q.height > 2 ? w / 2 * c : 0, column_step = w > 2 ? c : 0;
#pragma omp parallel if (units > 1)
  {
    Scratch sum(w * c), narrow(w / 2 * c), zeros(c);
    std::fill_n(zeros.data(), c, 0.0f);
#pragma omp for schedule(static)
    for (std::int64_t unit = 0; unit < units; ++unit) {
      const std::int64_t image = unit / bands.per_image, band = unit % bands.per_image;
      const std::int64_t p = image / q.images, n = image % q.images;
      for (std::int64_t y = bands.begin(band); y < bands.end(band); ++y) {
        for (std::size_t s = 0; s <= last; ++s) {
          const T* map = q.map<T>(s, p, n);
          Term term = coefficients.term(p, s);
          const float* before = s == 0 ? nullptr : sum.data();
          const auto add = [&](const auto& source) {
            if (s < last) return add_term(source, w, c, term, before, sum.data(), kNoFloor);
            T* to = out + (image * q.height + y) * w * c;
            add_term(source, w, c, term, before, to, q.relu ? 0.0f : kNoFloor);
          };
          if (q.up[s]) {
            const T* above = map + rows[y].before * (w / 2) * c;
            mix_rows(above, above + row_step, rows[y].share, term.mean, w / 2, c, narrow.data());
            term.mean = zeros.data();
            add(Widened{narrow.data(), columns.data(), c, column_step});
          } else {
            add(Pixels<T>{map + y * w * c, c});
          }
        }
      }
    }
  }
}

// For each column of half the width, the columns of g that it gathers and their weights.
struct Gather {
  static constexpr std::int64_t kMost = 6;
  struct Column {
    std::int64_t first = 0, count = 0;
    float weight[kMost];
  };
  std::vector<Column> columns;

  explicit Gather(const std::vector<Between>& wide) : columns(wide.size() / 2) {
    const auto add = [&](std::int64_t half, std::size_t column, float weight) {
      if (weight == 0.0f) return;
      Column& to = columns[half];
      if (to.count == 0) to.first = static_cast<std::int64_t>(column);
      to.weight[to.count++] = weight;
    };
    for (std::size_t x = 0; x < wide.size(); ++x) {
      add(wide[x].before, x, 1.0f - wide[x].share);
      add(wide[x].before + 1, x, wide[x].share);
    }
  }
};

// above += (1 - share) · narrowed g and below += share · narrowed g; either may be null.
inline void gather_row(const Gather& gather, const float* g, float share, std::int64_t channels,
                       float* above, float* below) {
  for_channel_groups(channels, [&](const auto& group) {
    constexpr int kVectors = std::decay_t<decltype(group)>::kVectors;
    for (std::size_t x = 0; x < gather.columns.size(); ++x) {
      const Gather::Column& column = gather.columns[x];
      FloatLanes sum[kVectors] = {};
      for (std::int64_t i = 0; i < column.count; ++i) {
        const float* pixel = g + (column.first + i) * channels;
        for (int v = 0; v < kVectors; ++v) sum[v] += column.weight[i] * group.load(pixel, v);
      }
      const auto add = [&](float* row, float weight) {
        float* to = row + static_cast<std::int64_t>(x) * channels;
        for (int v = 0; v < kVectors; ++v) {
          group.store(to, v, group.load(to, v) + weight * sum[v]);
        }
      };
      if (above != nullptr) add(above, 1.0f - share);
      if (below != nullptr) add(below, share);
    }
  });
}

// The gradient before the final ReLU, in float32: g where h > 0.
template <class T>
void load_gradient(const T* g, const T* h, std::int64_t count, float* out) {
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const FloatLanes value = load_lanes(g + i);
    store_lanes(out + i,
                h == nullptr ? value : (load_lanes(h + i) > 0.0f ? value : FloatLanes{}));
  }
  for (; i < count; ++i) {
    const float value = load(g + i);
    out[i] = h == nullptr || load(h + i) > 0.0f ? value : 0.0f;
  }
}

template <class T>
void backward(const Problem& q, const Coefficients& coefficients, const T* g,
              std::int64_t g_part_stride, const T* h, TermSums& sums, const Bands& bands) {
  const auto rows = between(q.height, q.any_up()), columns = between(q.width, q.any_up());
  const Gather gather(columns);
  const std::int64_t c = q.channels, w = q.width, units = q.parts * q.images * bands.per_image;
  const std::int64_t half = q.height / 2, half_row = w / 2 * c;
  const bool any_up = q.any_up();
#pragma omp parallel if (units > 1)
  {
    Scratch row(w * c), halves(2 * half_row);
#pragma omp for schedule(static)
    for (std::int64_t unit = 0; unit < units; ++unit) {
      const std::int64_t image = unit / bands.per_image, band = unit % bands.per_image;
      const std::int64_t p = image / q.images, n = image % q.images;
      const T* g_image = g + p * g_part_stride + n * q.height * w * c;
      const T* h_image = h == nullptr ? nullptr : h + image * q.height * w * c;
      const std::int64_t begin = bands.begin(band), end = bands.end(band);
      // Rows of half resolution that this band completes: [half_begin, half_end); `done` of them
      // have been written.
      const std::int64_t half_begin = begin / 2, half_end = any_up ? std::min(half, end / 2) : 0;
      std::int64_t done = half_begin;
      const auto half_sums = [&](std::int64_t y) { return halves.data() + y % 2 * half_row; };
      const auto is_ours = [&](std::int64_t y) { return y >= half_begin && y < half_end; };
      const auto complete_until = [&](std::int64_t y) {
        for (; done < std::min(y, half_end); ++done) {
          for (std::size_t s = 0; s < q.terms.size(); ++s) {
            if (!q.up[s]) continue;
            const std::int64_t at = done * half_row;
            term_gradient(half_sums(done), q.map<T>(s, p, n) + at, q.gradient<T>(s, p, n) + at,
                          w / 2, c, coefficients.term(p, s), sums.first(unit, s),
                          sums.second(unit, s));
          }
          std::fill_n(half_sums(done), half_row, 0.0f);
        }
      };
      std::fill_n(halves.data(), 2 * half_row, 0.0f);
      // With upsampling, rows around the band are gathered too: all that touch ours.
      std::int64_t from = begin, to = end;
      if (any_up) {
        while (from > 0 && rows[from - 1].before + 1 >= half_begin) --from;
        while (to < q.height && rows[to].before < half_end) ++to;
      }
      for (std::int64_t y = from; y < to; ++y) {
        load_gradient(g_image + y * w * c, h_image == nullptr ? nullptr : h_image + y * w * c,
                      w * c, row.data());
        if (y >= begin && y < end) {
          for (std::size_t s = 0; s < q.terms.size(); ++s) {
            if (q.up[s]) continue;
            const std::int64_t at = y * w * c;
            term_gradient(row.data(), q.map<T>(s, p, n) + at, q.gradient<T>(s, p, n) + at, w, c,
                          coefficients.term(p, s), sums.first(unit, s), sums.second(unit, s));
          }
        }
        if (!any_up) continue;
        const std::int64_t above = rows[y].before;
        complete_until(above);
        gather_row(gather, row.data(), rows[y].share, c,
                   is_ours(above) ? half_sums(above) : nullptr,
                   is_ours(above + 1) ? half_sums(above + 1) : nullptr);
      }
      complete_until(half_end);
    }
  }
}

Problem problem(const Addresses& sources, const Integers& part_strides, const Integers& transforms,
                const std::array<Addresses, 4>& norms, const Size& size, bool relu, bool down_relu,
                const Addresses& gradients) {
  Problem q{{}, {}, size[0], size[1], size[2], size[3], size[4], relu};
  std::size_t next = 0;  // normalised term
  for (std::size_t s = 0; s < sources.size(); ++s) {
    MixTerm term{reinterpret_cast<const void*>(sources[s]), part_strides[s], nullptr, nullptr,
                 nullptr, nullptr, nullptr, transforms[s] == kDown && down_relu};
    if (transforms[s] != kSame) {
      const auto norm = [&](int i) { return reinterpret_cast<const float*>(norms[i][next]); };
      term.mean = norm(0);
      term.variance = norm(1);
      term.gamma = norm(2);
      term.beta = norm(3);
      ++next;
    }
    if (!gradients.empty()) term.gradient = reinterpret_cast<void*>(gradients[s]);
    q.terms.push_back(term);
    q.up.push_back(transforms[s] == kUp);
  }
  return q;
}

}  // namespace

void scale_mix(const Addresses& sources, const Integers& part_strides, const Integers& transforms,
               const std::array<Addresses, 4>& norms, Address weights, bool relu, bool down_relu,
               double eps, Address out, const Size& size, int dtype) {
  const Problem q =
      problem(sources, part_strides, transforms, norms, size, relu, down_relu, {});
  const Coefficients coefficients(q.terms, reinterpret_cast<const float*>(weights), q.parts,
                                  q.channels, eps);
  dispatch_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    forward(q, coefficients, reinterpret_cast<T*>(out));
  });
}

void scale_mix_backward(Address g, std::int64_t g_part_stride, Address h, const Addresses& sources,
                        const Integers& part_strides, const Integers& transforms,
                        const std::array<Addresses, 4>& norms, Address weights, bool relu,
                        bool down_relu, double eps, const Addresses& g_sources,
                        const std::array<Address, 4>& g_norms, Address g_weights, const Size& size,
                        int dtype) {
  const Problem q =
      problem(sources, part_strides, transforms, norms, size, relu, down_relu, g_sources);
  const auto* w = reinterpret_cast<const float*>(weights);
  const Coefficients coefficients(q.terms, w, q.parts, q.channels, eps);
  const Bands bands(q);
  const std::int64_t units_per_part = q.images * bands.per_image;
  TermSums sums(q.parts * std::max<std::int64_t>(1, units_per_part), q.terms.size(), q.channels);
  dispatch_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    backward(q, coefficients, reinterpret_cast<const T*>(g), g_part_stride,
             relu ? reinterpret_cast<const T*>(h) : nullptr, sums, bands);
  });
  const auto gradient = [&](int i) { return reinterpret_cast<float*>(g_norms[i]); };
  finish_gradients(q.terms, w, sums, q.parts, std::max<std::int64_t>(1, units_per_part),
                   q.channels, eps,
                   {gradient(0), gradient(1), gradient(2), gradient(3),
                    reinterpret_cast<float*>(g_weights)});
}

}  // namespace pnfs
