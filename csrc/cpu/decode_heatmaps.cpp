// Flip average, argmax, quarter offset and affine map of heatmaps: pnfs/kernels/decode_heatmaps.py
// has the definition. Each map is read from memory once, row by row; only the four neighbours of
// the maximum are read again.
//
// The argmax keeps, in each of 16 lanes, the largest value and the cell it came from. Two walks:
// along the row where the cells of a row are adjacent, across the keypoints where those are
// (channels-last). A row whose elements need work (flip average, half precision, other strides) is
// first written to a buffer in cache.

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "core/dtypes.h"
#include "cpu/ops.h"

namespace pnfs {
namespace {

constexpr int64_t kLanes = 16;
constexpr float kLowest = -std::numeric_limits<float>::infinity();
constexpr int64_t kSerialElements = 1 << 14;  // below this, starting threads costs more than work

typedef float FloatLanes __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t IntLanes __attribute__((vector_size(kLanes * sizeof(int32_t))));

using Shape = std::array<int64_t, 4>;  // N, K, h, w: sizes, or strides in elements

struct Problem {
  Shape size, stride, flip_stride;
  const int64_t* permutation;  // null: identity
  const double* matrices;      // (N, 2, 3)
  float* xy;                   // (N, K, 2)
  float* score;                // (N, K)
  bool shift;
};

// Sixteen running maxima; `at` is the cell each was first seen in. NaN never wins: the comparison
// is false.
struct Running {
  FloatLanes best = FloatLanes{} + kLowest;
  IntLanes at = {};

  void see(const float* values, IntLanes cells) {
    FloatLanes v;
    std::memcpy(&v, values, sizeof v);
    const auto larger = v > best;
    best = larger ? v : best;
    at = larger ? cells : at;
  }
};

IntLanes lane_numbers() {
  IntLanes lanes;
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane;
  return lanes;
}

// One merged value; `a` and `b` point to the maps of one person and keypoint.
template <class T>
struct Merged {
  const T* a;
  const T* b;  // null: no flip average
  const Problem& p;

  float operator()(int64_t y, int64_t x) const {
    const float value = load(a + y * p.stride[2] + x * p.stride[3]);
    if (b == nullptr) return value;
    const int64_t w = p.size[3];
    const int64_t mirrored = p.shift && x > 0 ? w - x : w - 1 - x;
    return (value + load(b + y * p.flip_stride[2] + mirrored * p.flip_stride[3])) * 0.5f;
  }
};

// Writes the result of person n, keypoint k, whose maximum `best` is in cell `at`.
template <class T>
void finish(const Problem& p, const Merged<T>& merged, int64_t n, int64_t k, float best,
            int64_t at) {
  const int64_t h = p.size[2], w = p.size[3];
  double x = 0, y = 0;
  if (best > 0) {
    const int64_t px = at % w, py = at / w;
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
  const int64_t row = n * p.size[1] + k;
  p.xy[2 * row] = static_cast<float>(m[0] * x + m[1] * y + m[2]);
  p.xy[2 * row + 1] = static_cast<float>(m[3] * x + m[4] * y + m[5]);
  p.score[row] = best;
}

// out[x] = merged row; `a_step`, `b_step` are the strides along x.
template <class T>
void merge_row(float* out, const T* a, int64_t a_step, const T* b, int64_t b_step, int64_t w,
               bool shift) {
  if (b == nullptr) {
    for (int64_t x = 0; x < w; ++x) out[x] = load(a + x * a_step);
    return;
  }
  const T* last = b + (w - 1) * b_step;
  int64_t x = 0;
  if (shift) {
    out[0] = (load(a) + load(last)) * 0.5f;
    last += b_step;  // column x shows what column x - 1 would
    x = 1;
  }
  for (; x < w; ++x) out[x] = (load(a + x * a_step) + load(last - x * b_step)) * 0.5f;
}

// Rows of adjacent cells. `buffer` holds max(w, 16) floats.
template <class T>
void decode_map(const Problem& p, const Merged<T>& merged, int64_t n, int64_t k, float* buffer) {
  static const IntLanes lanes = lane_numbers();
  int64_t h = p.size[2], w = p.size[3];
  const bool direct = std::is_same<T, float>::value && merged.b == nullptr && p.stride[3] == 1;
  if (direct && p.stride[2] == w) {  // the whole map is one row
    w *= h;
    h = 1;
  }
  const bool in_place = direct && w >= kLanes;
  const int64_t length = std::max(w, kLanes);
  if (!in_place) std::fill(buffer, buffer + length, kLowest);
  Running running;
  for (int64_t y = 0; y < h; ++y) {
    const T* a = merged.a + y * p.stride[2];
    const float* row = buffer;
    if (in_place) {
      row = reinterpret_cast<const float*>(a);
    } else {
      const T* b = merged.b == nullptr ? nullptr : merged.b + y * p.flip_stride[2];
      if (p.stride[3] == 1 && p.flip_stride[3] == 1) {
        merge_row(buffer, a, 1, b, 1, w, p.shift);  // constant steps: the compiler vectorises
      } else {
        merge_row(buffer, a, p.stride[3], b, p.flip_stride[3], w, p.shift);
      }
    }
    const int32_t cell = static_cast<int32_t>(y * w);
    int64_t x = 0;
    for (; x + kLanes <= length; x += kLanes) {
      running.see(row + x, lanes + (cell + static_cast<int32_t>(x)));
    }
    if (x < length) {  // the last lanes again, overlapping
      running.see(row + length - kLanes, lanes + (cell + static_cast<int32_t>(length - kLanes)));
    }
  }
  float best = running.best[0];
  int32_t at = running.at[0];
  for (int lane = 1; lane < kLanes; ++lane) {
    const float value = running.best[lane];
    if (value > best || (value == best && running.at[lane] < at)) {
      best = value;
      at = running.at[lane];
    }
  }
  finish(p, merged, n, k, best, at);
}

// Adjacent keypoints. `buffer` holds w * columns floats, columns = K rounded up to 16.
template <class T>
void decode_person(const Problem& p, const T* a, const T* b, int64_t n, int64_t columns,
                   float* buffer, std::vector<Running>& running) {
  const int64_t k = p.size[1], h = p.size[2], w = p.size[3];
  const auto source = [&](int64_t j) { return p.permutation == nullptr ? j : p.permutation[j]; };
  const bool in_place = std::is_same<T, float>::value && b == nullptr && k >= kLanes;
  const auto first_of = [&](int64_t group) {
    return in_place ? std::min(group * kLanes, k - kLanes) : group * kLanes;
  };
  std::fill(running.begin(), running.end(), Running());
  for (int64_t y = 0; y < h; ++y) {
    const T* row_a = a + y * p.stride[2];
    const float* row = buffer;
    int64_t step = columns;
    if (in_place) {
      row = reinterpret_cast<const float*>(row_a);
      step = p.stride[3];
    } else {
      for (int64_t x = 0; x < w; ++x) {
        const T* from = row_a + x * p.stride[3];
        float* to = buffer + x * columns;
        if (b == nullptr) {
          for (int64_t j = 0; j < k; ++j) to[j] = load(from + j);
          continue;
        }
        const int64_t mirrored = p.shift && x > 0 ? w - x : w - 1 - x;
        const T* other = b + y * p.flip_stride[2] + mirrored * p.flip_stride[3];
        for (int64_t j = 0; j < k; ++j) {
          to[j] = (load(from + j) + load(other + source(j) * p.flip_stride[1])) * 0.5f;
        }
      }
    }
    for (int64_t group = 0; group < columns / kLanes; ++group) {
      Running local = running[group];
      const float* values = row + first_of(group);
      for (int64_t x = 0; x < w; ++x) {
        local.see(values + x * step, IntLanes{} + static_cast<int32_t>(y * w + x));
      }
      running[group] = local;
    }
  }
  for (int64_t j = 0; j < k; ++j) {
    const int64_t group = j / kLanes, lane = j - first_of(group);
    const T* flipped = b == nullptr ? nullptr : b + source(j) * p.flip_stride[1];
    const Merged<T> merged{a + j * p.stride[1], flipped, p};
    finish(p, merged, n, j, running[group].best[lane], running[group].at[lane]);
  }
}

template <class T>
void decode(const Problem& p, const T* heatmaps, const T* flipped) {
  const int64_t n = p.size[0], k = p.size[1], h = p.size[2], w = p.size[3];
  const bool threads = n * k * h * w > kSerialElements;
  const auto person = [&](const T* maps, const Shape& stride, int64_t i) {
    return maps == nullptr ? nullptr : maps + i * stride[0];
  };
  if (p.stride[1] == 1 && k > 1 && w > 1 && p.stride[3] != 1) {
    const int64_t columns = (k + kLanes - 1) / kLanes * kLanes;
#pragma omp parallel if (threads)
    {
      std::vector<float> buffer(static_cast<size_t>(w * columns), kLowest);
      std::vector<Running> running(static_cast<size_t>(columns / kLanes));
#pragma omp for
      for (int64_t i = 0; i < n; ++i) {
        decode_person(p, person(heatmaps, p.stride, i), person(flipped, p.flip_stride, i), i,
                      columns, buffer.data(), running);
      }
    }
    return;
  }
#pragma omp parallel if (threads)
  {
    std::vector<float> buffer(static_cast<size_t>(std::max(w, kLanes)));
#pragma omp for
    for (int64_t map = 0; map < n * k; ++map) {
      const int64_t i = map / k, j = map % k;
      const int64_t source = p.permutation == nullptr ? j : p.permutation[j];
      const T* b = person(flipped, p.flip_stride, i);
      const Merged<T> merged{person(heatmaps, p.stride, i) + j * p.stride[1],
                             b == nullptr ? nullptr : b + source * p.flip_stride[1], p};
      decode_map(p, merged, i, j, buffer.data());
    }
  }
}

}  // namespace

void decode_heatmaps(uintptr_t heatmaps, const Shape& stride, uintptr_t flipped,
                     const Shape& flip_stride, uintptr_t permutation, uintptr_t matrices,
                     uintptr_t xy, uintptr_t score, const Shape& size, bool shift, int dtype) {
  const Problem p{size,
                  stride,
                  flip_stride,
                  reinterpret_cast<const int64_t*>(permutation),
                  reinterpret_cast<const double*>(matrices),
                  reinterpret_cast<float*>(xy),
                  reinterpret_cast<float*>(score),
                  shift};
  dispatch_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    decode(p, reinterpret_cast<const T*>(heatmaps), reinterpret_cast<const T*>(flipped));
  });
}

}  // namespace pnfs
