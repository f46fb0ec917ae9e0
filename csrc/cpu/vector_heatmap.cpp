// Score maps from keypoint vectors, and the gradient: pnfs/kernels/vector_heatmap.py has the
// definition.

#include <cstdint>
#include <vector>

#include "core/squash.h"
#include "cpu/ops.h"
#include "cpu/vector_maps.h"

namespace pnfs {
namespace {

// Where the scores of a tile lie; they are (N, K, h, w), contiguous.
template <class T>
struct ScoreTile {
  T* scores;
  VectorSize size;
  VectorTile tile = {};

  void begin(const VectorTile& next) { tile = next; }
  bool live(std::int64_t) const { return true; }
  T* map(std::int64_t k) const {
    return scores + ((tile.n * size.k + k) * size.h + tile.y) * size.w + tile.x;
  }
};

template <class T>
struct Forward : ScoreTile<T> {
  void combine(std::int64_t k, float* const* rows, std::int64_t count) const {
    T* out = this->map(k);
    const bool squash = this->size.d > 1;
    const auto score = [&](auto load_at) {
      auto sum = load_at(rows[0]);
      if (squash) sum *= squash_factor(sum);
      for (std::int64_t i = 1; i < count; ++i) {
        const auto value = load_at(rows[i]);
        sum += squash ? value * squash_factor(value) : value;
      }
      return sum;
    };
    std::int64_t x = 0;
    for (; x + kLanes <= this->tile.pixels; x += kLanes) {
      store_floats(out + x, score([x](const float* row) { return load_floats<FloatLanes>(row + x); }));
    }
    for (; x < this->tile.pixels; ++x) {
      out[x] = from_float<T>(score([x](const float* row) { return row[x]; }));
    }
  }
};

template <class T>
struct Backward : ScoreTile<T> {
  void combine(std::int64_t k, float* const* rows, std::int64_t count) const {
    const T* grad = this->map(k);
    const bool squash = this->size.d > 1;
    const auto factor = [&](auto squared, auto incoming) {
      if (!squash) return incoming;
      const auto q = squash_factor(squared);
      return 2.0f * incoming * q * q;
    };
    for (std::int64_t i = 0; i < count; ++i) {
      float* row = rows[i];
      std::int64_t x = 0;
      for (; x + kLanes <= this->tile.pixels; x += kLanes) {
        store_floats(row + x, factor(load_floats<FloatLanes>(row + x), load_floats<FloatLanes>(grad + x)));
      }
      for (; x < this->tile.pixels; ++x) row[x] = factor(row[x], load(grad + x));
    }
  }
};

template <template <class> class Work>
void run(const VectorArguments& given, Address scores, int dtype) {
  dispatch_vector_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const VectorMaps<T> maps(given);
    maps.share([&](std::int64_t first, std::int64_t last) {
      typename VectorMaps<T>::Scratch scratch(maps);
      Work<T> work{{reinterpret_cast<T*>(scores), given.size}};
      for (std::int64_t t = first; t < last; ++t) maps.run(t, scratch, work);
    });
  });
}

}  // namespace

void vector_heatmap(const std::vector<Address>& vectors, const std::vector<Strides5>& strides,
                    const std::vector<std::int64_t>& counts,
                    const std::vector<std::int64_t>& keypoints, Address scores,
                    const std::array<std::int64_t, 5>& size, int dtype) {
  run<Forward>({vectors, strides, {}, {}, counts, keypoints, as_vector_size(size)}, scores, dtype);
}

void vector_heatmap_backward(const std::vector<Address>& vectors,
                             const std::vector<Strides5>& strides,
                             const std::vector<Address>& gradients,
                             const std::vector<Strides5>& gradient_strides,
                             const std::vector<std::int64_t>& counts,
                             const std::vector<std::int64_t>& keypoints, Address grad_scores,
                             const std::array<std::int64_t, 5>& size, int dtype) {
  run<Backward>({vectors, strides, gradients, gradient_strides, counts, keypoints,
                 as_vector_size(size)},
                grad_scores, dtype);
}

}  // namespace pnfs
