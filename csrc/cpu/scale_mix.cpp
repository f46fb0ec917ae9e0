// Driver of scale_mix, Eq. 2: pnfs/kernels/scale_mix.py has the definition, mix_kernels.h the
// arithmetic. Rows of the output are made one after the other.
//
// Upsampling is first vertical, one row of half the width, then horizontal, on load. Its gradient is
// gathered: a row of g is narrowed to half the width and added, with its two vertical weights, to two
// rows of half resolution, which are complete once g's rows have passed them.

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "cpu/mix_driver.h"
#include "cpu/ops.h"

namespace pnfs {
namespace {

// A thread takes a band of an image: all of it where there are images enough to share out.
constexpr std::int64_t kEnoughUnits = 16;
constexpr std::int64_t kLeastRows = 8;

enum Transform { kSame, kDown, kUp };

using Size = std::array<std::int64_t, 5>;  // P, N, C, H, W
using Norms = std::array<Addresses, 4>;

struct Problem {
  std::vector<MixTerm> terms;
  std::vector<bool> up;
  std::int64_t parts, images, channels, height, width;
  int dtype;

  bool any_up() const { return std::find(up.begin(), up.end(), true) != up.end(); }
  std::int64_t row() const { return width * channels; }
  std::int64_t half_row() const { return width / 2 * channels; }
  std::int64_t elements() const { return parts * images * height * row(); }
  // Elements of one image of a term.
  std::int64_t image(std::size_t s) const { return height * row() / (up[s] ? 4 : 1); }
  const char* map(std::size_t s, std::int64_t p, std::int64_t n, std::int64_t at) const {
    return element(terms[s].map, p * terms[s].part_stride + n * image(s) + at, dtype);
  }
  char* gradient(std::size_t s, std::int64_t p, std::int64_t n, std::int64_t at) const {
    return element(terms[s].gradient, (p * images + n) * image(s) + at, dtype);
  }
};

Problem problem(const Addresses& sources, const Integers& part_strides, const Integers& transforms,
                const Norms& norms, const Size& size, bool down_relu, const Addresses& gradients,
                int dtype) {
  Problem q{{}, {}, size[0], size[1], size[2], size[3], size[4], dtype};
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

// Integers, so that both ends are met exactly.
Between between(std::int64_t i, std::int64_t half) {
  const std::int64_t steps = 2 * half - 1, position = i * (half - 1);
  const std::int64_t before = std::min(position / steps, std::max<std::int64_t>(0, half - 2));
  return {before, static_cast<float>(position - before * steps) / static_cast<float>(steps)};
}

// Of all positions of an axis.
std::vector<Between> positions(std::int64_t size) {
  std::vector<Between> all;
  for (std::int64_t i = 0; i < size; ++i) all.push_back(between(i, size / 2));
  return all;
}

std::vector<Gathered> gathered(const std::vector<Between>& wide) {
  std::vector<Gathered> columns(wide.size() / 2, Gathered{});
  const auto add = [&](std::int64_t half, std::size_t column, float weight) {
    if (weight == 0.0f) return;
    Gathered& to = columns[half];
    if (to.count == 0) to.first = static_cast<std::int64_t>(column);
    to.weight[to.count++] = weight;
  };
  for (std::size_t x = 0; x < wide.size(); ++x) {
    add(wide[x].before, x, 1.0f - wide[x].share);
    add(wide[x].before + 1, x, wide[x].share);
  }
  return columns;
}

// Bands of images: units of work, cut by shapes alone.
struct Bands {
  std::int64_t images, height, rows, per_image, units;

  explicit Bands(const Problem& q) : images(q.images), height(q.height) {
    const std::int64_t all = std::max<std::int64_t>(1, q.parts * q.images);
    const std::int64_t wanted = std::max<std::int64_t>(1, kEnoughUnits / all);
    rows = std::max(kLeastRows, (height + wanted - 1) / wanted);
    rows += rows % 2;
    per_image = std::max<std::int64_t>(1, (height + rows - 1) / rows);
    units = q.parts * q.images * per_image;
  }
  std::int64_t part(std::int64_t unit) const { return unit / per_image / images; }
  std::int64_t image(std::int64_t unit) const { return unit / per_image % images; }
  std::int64_t begin(std::int64_t unit) const { return unit % per_image * rows; }
  std::int64_t end(std::int64_t unit) const { return std::min(height, begin(unit) + rows); }
};

struct Forward {
  const Problem& q;
  const Coefficients& coefficients;
  const MixKernels& kernels;
  const std::vector<Between>&rows, &columns;
  void* out;
  bool streams;
  float floor;

  // Row y of image n of part p. `tile` is scratch for a row, `narrow` for one of half the width.
  void row(std::int64_t p, std::int64_t n, std::int64_t y, float* tile, float* narrow,
           std::vector<TermOfMap>& here) const {
    here.clear();
    for (std::size_t s = 0; s < q.terms.size(); ++s) {
      if (!q.up[s]) here.push_back({coefficients.term(p, s), q.map(s, p, n, y * q.row())});
    }
    AddTerms run{};
    run.count = q.width;
    run.channels = q.channels;
    run.columns = columns.data();
    run.step = q.width > 2 ? q.channels : 0;
    for (std::size_t s = 0; s < q.terms.size(); ++s) {
      if (!q.up[s]) continue;
      if (run.row != nullptr) {  // another one before: the kernel widens one row at a time
        run.out = tile;
        run.to_float = true;
        run.floor = kNoFloor;
        kernels.add_terms(q.dtype, run);
        run.sum = tile;
      }
      run.row = narrow;
      run.widened = coefficients.term(p, s);
      const char* above = q.map(s, p, n, rows[y].before * q.half_row());
      const char* below = element(above, q.height > 2 ? q.half_row() : 0, q.dtype);
      kernels.mix_rows(q.dtype, above, below, rows[y].share, run.widened, q.width / 2, q.channels,
                       narrow);
    }
    run.out = element(out, ((p * q.images + n) * q.height + y) * q.row(), q.dtype);
    run.to_float = false;
    run.streams = streams;
    run.floor = floor;
    add_all_terms(kernels, q.dtype, run, here, tile);
  }
};

struct Backward {
  const Problem& q;
  const Coefficients& coefficients;
  const MixKernels& kernels;
  const std::vector<Between>& rows;
  const std::vector<Gathered>& columns;
  const void* g;
  std::int64_t g_part_stride;
  const void* h;  // null: there is no final ReLU

  // Rows [begin, end) of image n of part p. `row` is scratch for a row, `halves` for two of half the
  // width.
  void band(std::int64_t p, std::int64_t n, std::int64_t begin, std::int64_t end, float* row,
            float* halves, FloatSums& partial, double* sums) const {
    // Rows of half resolution that this band completes: those before `done` have been written.
    const std::int64_t half_begin = begin / 2, half_end = columns.empty() ? half_begin : end / 2;
    std::int64_t done = half_begin;
    const auto half_sums = [&](std::int64_t y) { return halves + y % 2 * q.half_row(); };
    const auto ours = [&](std::int64_t y) {
      return y >= half_begin && y < half_end ? half_sums(y) : nullptr;
    };
    const auto complete_until = [&](std::int64_t y) {
      for (; done < std::min(y, half_end); ++done) {
        write(p, n, done * q.half_row(), q.width / 2, half_sums(done), true, partial);
        std::fill_n(half_sums(done), q.half_row(), 0.0f);
      }
    };
    std::fill_n(halves, 2 * q.half_row(), 0.0f);
    // Rows around the band are gathered too: all that touch our rows of half resolution.
    std::int64_t from = begin, to = end;
    if (half_end > half_begin) {
      while (from > 0 && rows[from - 1].before + 1 >= half_begin) --from;
      while (to < q.height && rows[to].before < half_end) ++to;
    }
    for (std::int64_t y = from; y < to; ++y) {
      const std::int64_t at = n * q.height * q.row() + y * q.row();
      const void* passes =
          h == nullptr ? nullptr : element(h, p * q.images * q.height * q.row() + at, q.dtype);
      kernels.pass_gradient(q.dtype, element(g, p * g_part_stride + at, q.dtype), passes, q.row(),
                            row);
      if (y >= begin && y < end) {
        write(p, n, y * q.row(), q.width, row, false, partial);
        partial.add_pixels(q.width, sums);
      }
      if (half_end == half_begin) continue;
      const std::int64_t above = rows[y].before;
      complete_until(above);
      kernels.gather_row(columns.data(), q.width / 2, row, rows[y].share, q.channels, ours(above),
                         ours(above + 1));
    }
    complete_until(half_end);
    partial.finish(sums);
  }

  // Gradients of a row that begins `at` elements into the image, of the terms that are upsampled or
  // of the others.
  void write(std::int64_t p, std::int64_t n, std::int64_t at, std::int64_t pixels, const float* row,
             bool up, FloatSums& partial) const {
    for (std::size_t s = 0; s < q.terms.size(); ++s) {
      if (q.up[s] != up) continue;
      TermGradient run{};
      run.g = row;
      run.g_is_float = true;
      run.y = q.map(s, p, n, at);
      run.gy = q.gradient(s, p, n, at);
      run.count = pixels;
      run.channels = q.channels;
      run.term = coefficients.term(p, s);
      run.sums = partial.of(s);
      run.streams = !up && worth_streaming(q.terms[s].gradient, q.elements(), q.channels, q.dtype);
      kernels.term_gradient(q.dtype, run);
    }
  }
};

}  // namespace

void scale_mix(const Addresses& sources, const Integers& part_strides, const Integers& transforms,
               const Norms& norms, Address weights, bool relu, bool down_relu, double eps,
               Address out, const Size& size, int dtype) {
  const Problem q =
      problem(sources, part_strides, transforms, norms, size, down_relu, {}, dtype);
  const Coefficients coefficients(q.terms, reinterpret_cast<const float*>(weights), q.parts,
                                  q.channels, eps);
  const MixKernels& kernels = mix_kernels();
  std::vector<Between> rows, columns;
  if (q.any_up()) {
    rows = positions(q.height);
    columns = positions(q.width);
  }
  void* to = reinterpret_cast<void*>(out);
  const Forward forward{q,  coefficients, kernels, rows, columns,
                        to, worth_streaming(to, q.elements(), q.channels, dtype),
                        relu ? 0.0f : kNoFloor};
  const Bands bands(q);
#pragma omp parallel if (bands.units > 1)
  {
    static thread_local Workspace memory;
    float* tile = memory.floats(q.row() + q.half_row());
    std::vector<TermOfMap> here;
#pragma omp for schedule(static)
    for (std::int64_t unit = 0; unit < bands.units; ++unit) {
      for (std::int64_t y = bands.begin(unit); y < bands.end(unit); ++y) {
        forward.row(bands.part(unit), bands.image(unit), y, tile, tile + q.row(), here);
      }
    }
  }
}

void scale_mix_backward(Address g, std::int64_t g_part_stride, Address h, const Addresses& sources,
                        const Integers& part_strides, const Integers& transforms,
                        const Norms& norms, Address weights, bool relu, bool down_relu, double eps,
                        const Addresses& g_sources, const std::array<Address, 4>& g_norms,
                        Address g_weights, const Size& size, int dtype) {
  const Problem q =
      problem(sources, part_strides, transforms, norms, size, down_relu, g_sources, dtype);
  const auto* w = reinterpret_cast<const float*>(weights);
  const Coefficients coefficients(q.terms, w, q.parts, q.channels, eps);
  const MixKernels& kernels = mix_kernels();
  std::vector<Between> rows;
  std::vector<Gathered> columns;
  if (q.any_up()) {
    rows = positions(q.height);
    columns = gathered(positions(q.width));
  }
  const Backward backward{q,
                          coefficients,
                          kernels,
                          rows,
                          columns,
                          reinterpret_cast<const void*>(g),
                          g_part_stride,
                          relu ? reinterpret_cast<const void*>(h) : nullptr};
  const Bands bands(q);
  const std::int64_t units_per_part = std::max<std::int64_t>(1, q.images * bands.per_image);
  TermSums sums(q.parts * units_per_part, q.terms.size(), q.channels);
#pragma omp parallel if (bands.units > 1)
  {
    static thread_local Workspace memory;
    float* row = memory.floats(q.row() + 2 * q.half_row());
    FloatSums partial(sums);
#pragma omp for schedule(static)
    for (std::int64_t unit = 0; unit < bands.units; ++unit) {
      backward.band(bands.part(unit), bands.image(unit), bands.begin(unit), bands.end(unit), row,
                    row + q.row(), partial, sums.of(unit));
    }
  }
  const auto gradient = [&](int i) { return reinterpret_cast<float*>(g_norms[i]); };
  finish_gradients(q.terms, w, sums, q.parts, units_per_part, q.channels, eps,
                   {gradient(0), gradient(1), gradient(2), gradient(3),
                    reinterpret_cast<float*>(g_weights)});
}

}  // namespace pnfs
