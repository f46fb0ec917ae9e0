// Loops over pixels whose C channels are adjacent, for ops that treat every channel for itself.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <new>

#include "core/dtypes.h"
#include "core/lanes.h"

namespace pnfs {

// Vectors of channels that a loop over pixels carries along: as many as fit into the registers.
#if defined(__AVX512F__)
constexpr int kGroup = 4;
#else
constexpr int kGroup = 1;
#endif

// Adjacent channels, from `first`: kVectors times 16, or fewer than 16.
template <int kVectors_, bool kPartial>
struct ChannelGroup {
  static constexpr int kVectors = kVectors_;
  std::int64_t first, count;

  template <class T>
  FloatLanes load(const T* pixel, int vector) const {
    const T* address = pixel + first + vector * kLanes;
    if constexpr (!kPartial) return load_lanes(address);
    T padded[kLanes] = {};
    std::copy_n(address, count, padded);
    return load_lanes(padded);
  }

  template <class T>
  void store(T* pixel, int vector, FloatLanes value) const {
    T* address = pixel + first + vector * kLanes;
    if constexpr (!kPartial) return store_lanes(address, value);
    T padded[kLanes];
    store_lanes(padded, value);
    std::copy_n(padded, count, address);
  }

  // to[c] += value[c]
  void add(double* to, int vector, FloatLanes value) const {
    to += first + vector * kLanes;
    const std::int64_t lanes = kPartial ? count : kLanes;
    for (std::int64_t lane = 0; lane < lanes; ++lane) to[lane] += value[lane];
  }
};

// Calls `visit` with the groups that C channels fall into.
template <class Visit>
void for_channel_groups(std::int64_t channels, Visit visit) {
  std::int64_t c = 0;
  for (; c + kGroup * kLanes <= channels; c += kGroup * kLanes) {
    visit(ChannelGroup<kGroup, false>{c, kGroup * kLanes});
  }
  for (; c + kLanes <= channels; c += kLanes) visit(ChannelGroup<1, false>{c, kLanes});
  if (c < channels) visit(ChannelGroup<1, true>{c, channels - c});
}

// Uninitialised floats on a cache line of their own.
class Scratch {
 public:
  explicit Scratch(std::int64_t count)
      : data_(static_cast<float*>(::operator new(count * sizeof(float), kAlignment))) {}
  ~Scratch() { ::operator delete(data_, kAlignment); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* data() { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  float* data_;
};

constexpr std::int64_t kTile = 4096;        // elements that stay in the first-level cache
constexpr std::int64_t kUnit = 16 * kTile;  // elements of one map that a thread takes at a time

// The pixels of a part, cut into units of work and those into tiles, by shapes alone: sums that are
// taken per unit and added up in order do not depend on threads.
struct Cut {
  std::int64_t pixels, unit, tile, units_per_part;

  Cut(std::int64_t pixels_of_part, std::int64_t channels)
      : pixels(pixels_of_part),
        unit(std::max<std::int64_t>(1, kUnit / std::max<std::int64_t>(1, channels))),
        tile(std::max<std::int64_t>(1, kTile / std::max<std::int64_t>(1, channels))),
        units_per_part(std::max<std::int64_t>(1, (pixels + unit - 1) / unit)) {}

  // Calls visit(first pixel, count) for the tiles of the u-th unit of a part.
  template <class Visit>
  void for_tiles(std::int64_t u, Visit visit) const {
    const std::int64_t end = std::min(pixels, (u + 1) * unit);
    for (std::int64_t at = u * unit; at < end; at += tile) visit(at, std::min(tile, end - at));
  }
};

constexpr float kNoFloor = -std::numeric_limits<float>::infinity();

inline FloatLanes at_least(float floor, FloatLanes v) { return v < floor ? FloatLanes{} + floor : v; }

// One summand of a mix: weight · max(slope (y - mean) + shift, floor), per channel. The mean is not
// folded into the shift: where it is large against the deviation, that would cost digits.
struct Term {
  const float *mean, *slope, *shift;  // (C)
  float weight, floor;
};

template <class Group>
struct TermLanes {
  FloatLanes mean[Group::kVectors], slope[Group::kVectors], shift[Group::kVectors];
  float weight, floor;

  TermLanes(const Group& group, const Term& term) : weight(term.weight), floor(term.floor) {
    for (int v = 0; v < Group::kVectors; ++v) {
      mean[v] = group.load(term.mean, v);
      slope[v] = group.load(term.slope, v);
      shift[v] = group.load(term.shift, v);
    }
  }
};

// Pixels as they lie in memory.
template <class T>
struct Pixels {
  const T* data;
  std::int64_t channels;

  template <class Group>
  FloatLanes load(const Group& group, std::int64_t pixel, int v) const {
    return group.load(data + pixel * channels, v);
  }
};

// out = max(sum + term(source), floor) for `count` pixels; a null `sum` is 0. `out` may be `sum`.
template <class Source, class T>
void add_term(const Source& source, std::int64_t count, std::int64_t channels, const Term& term,
              const float* sum, T* out, float floor) {
  for_channel_groups(channels, [&](const auto& group) {
    const TermLanes t(group, term);
    const auto walk = [&](auto initial) {
      for (std::int64_t i = 0; i < count; ++i) {
        for (int v = 0; v < group.kVectors; ++v) {
          const FloatLanes z = (source.load(group, i, v) - t.mean[v]) * t.slope[v] + t.shift[v];
          const FloatLanes value = t.weight * at_least(t.floor, z) + initial(i, v);
          group.store(out + i * channels, v, at_least(floor, value));
        }
      }
    };
    if (sum == nullptr) {
      walk([](std::int64_t, int) { return FloatLanes{}; });
    } else {
      walk([&](std::int64_t i, int v) { return group.load(sum + i * channels, v); });
    }
  });
}

// The gradient of a term for `count` pixels: gy = ∂term/∂y · g, and per channel, over the pixels
// that the floor does not cut off, first[c] += Σ g and second[c] += Σ g (y - mean).
template <class G, class T>
void term_gradient(const G* g, const T* y, T* gy, std::int64_t count, std::int64_t channels,
                   const Term& term, double* first, double* second) {
  for_channel_groups(channels, [&](const auto& group) {
    constexpr int kVectors = std::decay_t<decltype(group)>::kVectors;
    const TermLanes t(group, term);
    FloatLanes sum[kVectors] = {}, product[kVectors] = {}, factor[kVectors];
    for (int v = 0; v < kVectors; ++v) factor[v] = t.weight * t.slope[v];
    for (std::int64_t i = 0; i < count; ++i) {
      for (int v = 0; v < kVectors; ++v) {
        const FloatLanes centred = group.load(y + i * channels, v) - t.mean[v];
        const FloatLanes z = centred * t.slope[v] + t.shift[v];
        const FloatLanes incoming = group.load(g + i * channels, v);
        const FloatLanes passed = z <= t.floor ? FloatLanes{} : incoming;
        group.store(gy + i * channels, v, passed * factor[v]);
        sum[v] += passed;
        product[v] += passed * centred;
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      group.add(first, v, sum[v]);
      group.add(second, v, product[v]);
    }
  });
}

}  // namespace pnfs
