// Flip average, argmax, quarter offset and affine map of heatmaps: pnfs/kernels/decode_heatmaps.py
// has the definition. A map is read from memory once; only the neighbours of its maximum are read
// again.
//
// The argmax keeps, in each of 16 lanes, the largest value and the block of cells it came from; the
// cell is looked up in that block at the end. Lanes are neighbouring cells of a row, or neighbouring
// keypoints where the layout is channels-last. Other layouts, rows shorter than a vector and unusual
// numbers of keypoints take a plain loop.

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>

#include "core/dtypes.h"
#include "core/lanes.h"
#include "cpu/ops.h"

namespace pnfs {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();
constexpr std::int64_t kSerialElements = 1 << 14;  // below this, threads cost more than work
constexpr std::int64_t kRowBlock = 8 * kLanes;     // columns of a block where lanes are cells
constexpr std::int64_t kKeypointBlock = 16;        // and where they are keypoints

using Shape = std::array<std::int64_t, 4>;  // N, K, h, w: sizes, or strides in elements

struct Problem {
  Shape size, stride, flip_stride;
  const std::int64_t* permutation;  // null: identity
  const double* matrices;           // (N, 2, 3)
  float* xy;                        // (N, K, 2)
  float* score;                     // (N, K)
  std::int64_t shift;               // 0 or 1 cell to the right

  std::int64_t flip_keypoint(std::int64_t k) const {
    return permutation == nullptr ? k : permutation[k];
  }
  // The column of the flipped map that belongs to column x.
  std::int64_t flip_column(std::int64_t x) const {
    return x == 0 ? size[3] - 1 : size[3] - 1 - x + shift;
  }
};

// The maximum so far and the cell it was first seen in. NaN never wins: the comparison is false.
struct Peak {
  float value = kLowest;
  std::int32_t cell = 0;

  void see(float v, std::int32_t at) {
    if (v > value || (v == value && at < cell)) {
      value = v;
      cell = at;
    }
  }
};

constexpr FloatLanes kLowestLanes = FloatLanes{} + kLowest;

// NaN in `v` is ignored; `most` has none.
inline FloatLanes larger(FloatLanes v, FloatLanes most) { return v > most ? v : most; }

// Sixteen of them, of blocks in place of cells. Blocks come in ascending order, so that a later equal
// never wins. Within a block only the maximum is kept, and blocks do not wait for one another.
struct PeakLanes {
  FloatLanes value = kLowestLanes;
  IntLanes block = {};

  void see(FloatLanes most, std::int64_t at) {
    const auto higher = most > value;
    value = higher ? most : value;
    block = higher ? IntLanes{} + static_cast<std::int32_t>(at) : block;
  }
};

// The merged map of one person and keypoint.
template <class T>
struct Merged {
  const T* a;
  const T* b;  // null: no flip average
  const Problem& p;

  Merged(const Problem& problem, const T* heatmaps, const T* flipped, std::int64_t n,
         std::int64_t k)
      : a(heatmaps + n * problem.stride[0] + k * problem.stride[1]),
        b(flipped == nullptr ? nullptr
                             : flipped + n * problem.flip_stride[0] +
                                   problem.flip_keypoint(k) * problem.flip_stride[1]),
        p(problem) {}

  float operator()(std::int64_t y, std::int64_t x) const {
    const float value = load(a + y * p.stride[2] + x * p.stride[3]);
    if (b == nullptr) return value;
    const std::int64_t column = p.flip_column(x);
    return (value + load(b + y * p.flip_stride[2] + column * p.flip_stride[3])) * 0.5f;
  }
};

// Rows from column `first` on, cut into blocks of up to `size` columns.
struct Blocks {
  std::int64_t first, width, size;

  std::int64_t per_row() const { return (width - first + size - 1) / size; }

  // The first cell of block `found.cell` that has the value.
  template <class T>
  Peak look_up(Peak found, const Merged<T>& merged) const {
    const std::int64_t y = found.cell / per_row(), begin = first + found.cell % per_row() * size;
    const std::int64_t end = std::min(begin + size, width);
    std::int64_t x = begin;
    while (x < end && merged(y, x) != found.value) ++x;
    return {found.value, static_cast<std::int32_t>(x < end ? y * width + x : 0)};
  }
};

// Writes the result of person n, keypoint k.
template <class T>
void finish(const Problem& p, const Merged<T>& merged, std::int64_t n, std::int64_t k, Peak peak) {
  const std::int64_t h = p.size[2], w = p.size[3];
  double x = 0, y = 0;
  if (peak.value > 0) {
    const std::int64_t px = peak.cell % w, py = peak.cell / w;
    x = static_cast<double>(px);
    y = static_cast<double>(py);
    if (px > 1 && px < w - 1 && py > 1 && py < h - 1) {
      const auto quarter = [](float before, float after) {
        return after > before ? 0.25 : after < before ? -0.25 : 0.0;
      };
      x += quarter(merged(py, px - 1), merged(py, px + 1));
      y += quarter(merged(py - 1, px), merged(py + 1, px));
    }
  }
  const double* m = p.matrices + n * 6;
  const std::int64_t row = n * p.size[1] + k;
  p.xy[2 * row] = static_cast<float>(m[0] * x + m[1] * y + m[2]);
  p.xy[2 * row + 1] = static_cast<float>(m[3] * x + m[4] * y + m[5]);
  p.score[row] = peak.value;
}

// Any layout.
template <class T>
Peak peak_of_cells(const Problem& p, const Merged<T>& merged) {
  Peak peak;
  for (std::int64_t y = 0; y < p.size[2]; ++y) {
    for (std::int64_t x = 0; x < p.size[3]; ++x) {
      peak.see(merged(y, x), static_cast<std::int32_t>(y * p.size[3] + x));
    }
  }
  return peak;
}

template <class T>
bool has_row_lanes(const Problem& p, const T* flipped) {
  return p.stride[3] == 1 && (flipped == nullptr || p.flip_stride[3] == 1) &&
         p.size[3] - p.shift >= kLanes;
}

// Cells of a row are adjacent.
template <class T>
Peak peak_of_rows(const Problem& p, const Merged<T>& merged) {
  std::int64_t h = p.size[2], w = p.size[3];
  if (merged.b == nullptr && p.stride[2] == w) {  // the whole map is one row
    w *= h;
    h = 1;
  }
  const std::int64_t first = merged.b == nullptr ? 0 : p.shift;
  const Blocks blocks{first, w, kRowBlock};
  Peak peak;  // of column 0 where the shift makes it a special one
  PeakLanes lanes;
  std::int64_t block = 0;
  for (std::int64_t y = 0; y < h; ++y) {
    const T* a = merged.a + y * p.stride[2];
    const auto walk = [&](auto values) {
      for (std::int64_t begin = first; begin < w; begin += kRowBlock, ++block) {
        const std::int64_t end = std::min(begin + kRowBlock, w);
        FloatLanes most = kLowestLanes;
        std::int64_t x = begin;
        for (; x + kLanes <= end; x += kLanes) most = larger(values(x), most);
        if (x < end) most = larger(values(w - kLanes), most);  // overlaps cells that were seen
        lanes.see(most, block);
      }
    };
    if (merged.b == nullptr) {
      walk([&](std::int64_t x) { return load_lanes(a + x); });
      continue;
    }
    // Lane i of column x is column last - x - i of the flipped map.
    const T* last = merged.b + y * p.flip_stride[2] + w - 1 + p.shift;
    if (first == 1) peak.see(merged(y, 0), static_cast<std::int32_t>(y * w));
    walk([&](std::int64_t x) {
      return (load_lanes(a + x) + reversed(load_lanes(last - x - (kLanes - 1)))) * 0.5f;
    });
  }
  Peak found;
  for (int lane = 0; lane < kLanes; ++lane) found.see(lanes.value[lane], lanes.block[lane]);
  found = blocks.look_up(found, merged);
  peak.see(found.value, found.cell);
  return peak;
}

// Keypoints of a cell are adjacent, 16 to 32 of them: all maps of person n. Lanes of the second
// group overlap the first's so that they end with the last keypoint.
template <class T>
bool has_keypoint_lanes(const Problem& p, const T* flipped) {
  return p.stride[1] == 1 && (flipped == nullptr || p.flip_stride[1] == 1) &&
         p.size[1] >= kLanes && p.size[1] <= 2 * kLanes;
}

template <int kGroups, bool kFlip, class T>
void decode_keypoint_lanes(const Problem& p, const T* heatmaps, const T* flipped, std::int64_t n) {
  const std::int64_t k = p.size[1], h = p.size[2], w = p.size[3];
  const std::int64_t second = k - kLanes;  // first keypoint of the last group
  const T* a = heatmaps + n * p.stride[0];
  const T* b = kFlip ? flipped + n * p.flip_stride[0] : nullptr;
  PeakLanes lanes[kGroups];
  IntLanes source[kGroups] = {};  // where each lane's partner lies in the two loads of `b`
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto place = [&](std::int64_t keypoint) {
      const std::int64_t from = p.flip_keypoint(keypoint);
      return static_cast<std::int32_t>(from < kLanes ? from : kLanes + from - second);
    };
    source[0][lane] = place(lane);
    if (kGroups == 2) source[1][lane] = place(second + lane);
  }
  const Blocks blocks{0, w, kKeypointBlock};
  std::int64_t block = 0;
  for (std::int64_t y = 0; y < h; ++y) {
    for (std::int64_t begin = 0; begin < w; begin += kKeypointBlock, ++block) {
      const std::int64_t end = std::min(begin + kKeypointBlock, w);
      FloatLanes most[kGroups];
      std::fill_n(most, kGroups, kLowestLanes);
      for (std::int64_t x = begin; x < end; ++x) {
        const T* at = a + y * p.stride[2] + x * p.stride[3];
        FloatLanes low = {}, high = {};
        if (kFlip) {
          const T* other = b + y * p.flip_stride[2] + p.flip_column(x) * p.flip_stride[3];
          // The walk runs against the memory of `b`, which the hardware does not foresee.
          __builtin_prefetch(b + (y + 1) * p.flip_stride[2] + x * p.flip_stride[3]);
          low = load_lanes(other);
          high = kGroups == 2 ? load_lanes(other + second) : low;
        }
        for (int group = 0; group < kGroups; ++group) {
          FloatLanes v = load_lanes(at + (group == 0 ? 0 : second));
          if (kFlip) v = (v + select(low, high, source[group])) * 0.5f;
          most[group] = larger(v, most[group]);
        }
      }
      for (int group = 0; group < kGroups; ++group) lanes[group].see(most[group], block);
    }
  }
  for (std::int64_t j = 0; j < k; ++j) {
    const PeakLanes& group = lanes[j < kLanes ? 0 : kGroups - 1];
    const std::int64_t lane = j < kLanes ? j : j - second;
    const Merged<T> merged(p, heatmaps, flipped, n, j);
    finish(p, merged, n, j, blocks.look_up({group.value[lane], group.block[lane]}, merged));
  }
}

template <class T>
void decode_person(const Problem& p, const T* heatmaps, const T* flipped, std::int64_t n) {
  const bool one = p.size[1] == kLanes;
  if (flipped == nullptr) {
    one ? decode_keypoint_lanes<1, false>(p, heatmaps, flipped, n)
        : decode_keypoint_lanes<2, false>(p, heatmaps, flipped, n);
  } else {
    one ? decode_keypoint_lanes<1, true>(p, heatmaps, flipped, n)
        : decode_keypoint_lanes<2, true>(p, heatmaps, flipped, n);
  }
}

template <class T>
void decode(const Problem& p, const T* heatmaps, const T* flipped) {
  const std::int64_t n = p.size[0], k = p.size[1];
  const bool threads = n * k * p.size[2] * p.size[3] > kSerialElements;
  const bool rows = has_row_lanes(p, flipped);
  if (!rows && has_keypoint_lanes(p, flipped)) {
#pragma omp parallel for schedule(static) if (threads)
    for (std::int64_t i = 0; i < n; ++i) decode_person(p, heatmaps, flipped, i);
    return;
  }
#pragma omp parallel for schedule(static) if (threads)
  for (std::int64_t map = 0; map < n * k; ++map) {
    const std::int64_t i = map / k, j = map % k;
    const Merged<T> merged(p, heatmaps, flipped, i, j);
    finish(p, merged, i, j, rows ? peak_of_rows(p, merged) : peak_of_cells(p, merged));
  }
}

}  // namespace

void decode_heatmaps(Address heatmaps, const Shape& stride, Address flipped,
                     const Shape& flip_stride, Address permutation, Address matrices, Address xy,
                     Address score, const Shape& size, bool shift, int dtype) {
  const Problem p{size,
                  stride,
                  flip_stride,
                  reinterpret_cast<const std::int64_t*>(permutation),
                  reinterpret_cast<const double*>(matrices),
                  reinterpret_cast<float*>(xy),
                  reinterpret_cast<float*>(score),
                  shift ? 1 : 0};
  dispatch_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    decode(p, reinterpret_cast<const T*>(heatmaps), reinterpret_cast<const T*>(flipped));
  });
}

}  // namespace pnfs
