// Loss of keypoint vectors against Gaussians that are never stored, and its gradient:
// pnfs/kernels/vector_heatmap_loss.py has the definition.
//
// The Gaussian of a joint is a product of one over columns and one over rows, and its centre is a
// whole cell: one table of exp(-r²/2σ²) for r = 0, 1, … serves the whole call.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "core/gaussian.h"
#include "core/squash.h"
#include "cpu/ops.h"
#include "cpu/vector_maps.h"

namespace pnfs {
namespace {

// Gaussians below this count as 0. Beside the roundoff of a score they are nothing, but the product of
// two would be subnormal, and a processor takes a hundred cycles for each of those.
constexpr float kLeastGaussian = 1.1e-19f;  // its square is a normal number

class GaussianTable {
 public:
  GaussianTable(float sigma, std::int64_t reach) : scale_(-0.5f / (sigma * sigma)), reach_(reach) {
    values_.resize(static_cast<std::size_t>(2 * reach - 1));
    for (std::int64_t r = 0; r < reach; ++r) {
      const float value = at(static_cast<float>(r));
      values_[static_cast<std::size_t>(reach - 1 - r)] = value;
      values_[static_cast<std::size_t>(reach - 1 + r)] = value;
    }
  }

  // out[i] = exp(-(i - cell)² / 2σ²); cells come from target_cell on an axis of `size` ≤ reach.
  void fill(float cell, std::int64_t size, float* out) const {
    if (cell >= 0) {  // and at most size - 1
      const float* from = values_.data() + reach_ - 1 - static_cast<std::int64_t>(cell);
      std::copy(from, from + size, out);
      return;
    }
    for (std::int64_t i = 0; i < size; ++i) out[i] = at(static_cast<float>(i) - cell);
  }

 private:
  float at(float distance) const {
    const float value = gaussian(distance, scale_);
    return value < kLeastGaussian ? 0.0f : value;
  }

  float scale_;
  std::int64_t reach_;
  std::vector<float> values_;  // by distance: reach - 1, …, 1, 0, 1, …, reach - 1
};

struct Targets {
  const float* joints;   // (N, K, 2) input pixels
  const float* weights;  // (N, K)
  float stride;
  GaussianTable table;
};

class LossWork {
 public:
  // `gain` multiplies the gradients.
  LossWork(const Targets& targets, const VectorSize& size, std::int64_t tile_pixels, float gain)
      : targets_(targets),
        size_(size),
        columns_(static_cast<std::size_t>(size.k * size.w)),
        rows_(static_cast<std::size_t>(size.k * size.h)),
        target_(static_cast<std::size_t>(tile_pixels)) {
    const double terms = static_cast<double>(size.n) * static_cast<double>(size.k) *
                         static_cast<double>(size.h * size.w);
    scale_ = static_cast<float>(gain / terms);
  }

  // Σ w·(p - g)² over the present tile.
  double loss() const {
    double total = static_cast<double>(rest_);
    for (int lane = 0; lane < kLanes; ++lane) total += static_cast<double>(lanes_[lane]);
    return total;
  }

  void begin(const VectorTile& tile) {
    lanes_ = FloatLanes{};
    rest_ = 0;
    const bool same_image = tile.n == tile_.n;
    tile_ = tile;
    if (same_image) return;
    for (std::int64_t k = 0; k < size_.k; ++k) {
      if (!live(k)) continue;
      const float* joint = targets_.joints + (tile.n * size_.k + k) * 2;
      targets_.table.fill(target_cell(joint[0], targets_.stride, size_.w), size_.w,
                          columns_.data() + k * size_.w);
      targets_.table.fill(target_cell(joint[1], targets_.stride, size_.h), size_.h,
                          rows_.data() + k * size_.h);
    }
  }

  bool live(std::int64_t k) const { return targets_.weights[tile_.n * size_.k + k] != 0; }

  void combine(std::int64_t k, float* const* rows, std::int64_t count) {
    const float weight = targets_.weights[tile_.n * size_.k + k];
    const Joint joint = joint_of(k, weight * scale_);
    if (size_.d == 1) {
      add(weight, [&](auto zero, std::int64_t x) { return plain(zero, joint, rows, count, x); });
    } else if (count == 1) {
      float* const row = rows[0];
      add(weight, [&](auto zero, std::int64_t x) { return squash(zero, joint, row, x); });
    } else {
      add(weight, [&](auto zero, std::int64_t x) { return squash(zero, joint, rows, count, x); });
    }
  }

 private:
  // The Gaussian of a keypoint in the tile is scale · target[pixel].
  struct Joint {
    const float* target;
    float scale, gain;
  };

  Joint joint_of(std::int64_t k, float gain) {
    const float* columns = columns_.data() + k * size_.w + tile_.x;
    const float* rows = rows_.data() + k * size_.h + tile_.y;
    if (tile_.rows == 1) return {columns, rows[0], gain};
    for (std::int64_t r = 0; r < tile_.rows; ++r) {
      float* target = target_.data() + r * size_.w;
      for (std::int64_t x = 0; x < size_.w; ++x) target[x] = rows[r] * columns[x];
    }
    return {target_.data(), 1.0f, gain};
  }

  // Adds weight · Σ over pixels of error(x), each (p - g)²; `error` is told by its first argument
  // whether to work on lanes.
  template <class Error>
  void add(float weight, const Error& error) {
    const std::int64_t pixels = tile_.pixels;
    FloatLanes sums = {};
    std::int64_t x = 0;
    for (; x + kLanes <= pixels; x += kLanes) sums += error(FloatLanes{}, x);
    lanes_ += sums * weight;
    float sum = 0;
    for (; x < pixels; ++x) sum += error(0.0f, x);
    rest_ += sum * weight;
  }

  template <class Number>
  static Number at(const float* address) {
    Number value;
    std::memcpy(&value, address, sizeof value);
    return value;
  }

  template <class Number>
  static void put(float* address, Number value) {
    std::memcpy(address, &value, sizeof value);
  }

  // (p - g)² at pixels x …; squared lengths become factors gain · (p - g) · 2 q².
  template <class Number>
  static Number squash(Number, const Joint& joint, float* row, std::int64_t x) {
    const Number squared = at<Number>(row + x), q = squash_factor(squared);
    const Number difference = squared * q - at<Number>(joint.target + x) * joint.scale;
    put(row + x, difference * (2.0f * joint.gain) * (q * q));
    return difference * difference;
  }

  template <class Number>
  static Number squash(Number zero, const Joint& joint, float* const* rows, std::int64_t count,
                       std::int64_t x) {
    Number score = zero;
    for (std::int64_t i = 0; i < count; ++i) {
      const Number squared = at<Number>(rows[i] + x), q = squash_factor(squared);
      score += squared * q;
      put(rows[i] + x, q);
    }
    const Number difference = score - at<Number>(joint.target + x) * joint.scale;
    for (std::int64_t i = 0; i < count; ++i) {
      const Number q = at<Number>(rows[i] + x);
      put(rows[i] + x, difference * (2.0f * joint.gain) * (q * q));
    }
    return difference * difference;
  }

  // d = 1: the values themselves are summed, and the factor is the gradient.
  template <class Number>
  static Number plain(Number zero, const Joint& joint, float* const* rows, std::int64_t count,
                      std::int64_t x) {
    Number score = zero;
    for (std::int64_t i = 0; i < count; ++i) score += at<Number>(rows[i] + x);
    const Number difference = score - at<Number>(joint.target + x) * joint.scale;
    for (std::int64_t i = 0; i < count; ++i) put(rows[i] + x, difference * joint.gain);
    return difference * difference;
  }

  const Targets& targets_;
  VectorSize size_;
  std::vector<float> columns_, rows_;  // Gaussians of the tile's image: K × w and K × h
  std::vector<float> target_;          // of one keypoint in the tile
  float scale_;
  VectorTile tile_ = {-1, 0, 0, 0, 0};
  FloatLanes lanes_ = {};
  float rest_ = 0;  // pixels that fill no lanes
};

}  // namespace

void vector_heatmap_loss(const std::vector<Address>& vectors, const std::vector<Strides5>& strides,
                         const std::vector<Address>& gradients,
                         const std::vector<Strides5>& gradient_strides,
                         const std::vector<std::int64_t>& counts,
                         const std::vector<std::int64_t>& keypoints, Address joints,
                         Address weights, Address loss, const std::array<std::int64_t, 5>& size,
                         float sigma, float stride, float gain, int dtype) {
  const VectorSize cells = as_vector_size(size);
  const Targets targets{reinterpret_cast<const float*>(joints),
                        reinterpret_cast<const float*>(weights), stride,
                        GaussianTable(sigma, std::max(cells.h, cells.w))};
  dispatch_vector_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const VectorMaps<T> maps(
        {vectors, strides, gradients, gradient_strides, counts, keypoints, cells});
    // One number per tile, added in the order of the tiles: the same sum for any number of threads.
    std::vector<double> sums(static_cast<std::size_t>(maps.tiles()));
    maps.share([&](std::int64_t first, std::int64_t last) {
      typename VectorMaps<T>::Scratch scratch(maps);
      LossWork work(targets, cells, maps.tile_pixels(), gain);
      for (std::int64_t t = first; t < last; ++t) {
        maps.run(t, scratch, work);
        sums[static_cast<std::size_t>(t)] = work.loss();
      }
    });
    double total = 0;
    for (const double sum : sums) total += sum;
    const double terms = static_cast<double>(cells.n * cells.k) * static_cast<double>(cells.h * cells.w);
    *reinterpret_cast<float*>(loss) = static_cast<float>(terms > 0 ? 0.5 * total / terms : 0);
  });
}

}  // namespace pnfs
