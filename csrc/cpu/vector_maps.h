// The walk that vector_heatmap and vector_heatmap_loss share: read the vectors of all parts tile by
// tile, reduce each to its squared length, let the op turn lengths into factors, and write
// gradient = factor · vector while the tile is still in cache.
//
// Two layouts. Interleaved (channels-last): the components of a vector are adjacent; a tile is a
// piece of a row, for all keypoints. Planar (contiguous): the pixels of a component are adjacent; a
// tile is a row, or a few where they are adjacent too, for one keypoint after the other. Lengths and
// factors lie pixel by pixel in either, so what happens between reading and writing is one loop over
// lanes of pixels.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "core/dtypes.h"
#include "cpu/ops.h"
#include "cpu/vector_lanes.h"

namespace pnfs {
namespace {

constexpr std::int64_t kSerialElements = 1 << 14;  // below this, threads cost more than work
constexpr std::int64_t kStreamBytes = 1 << 24;     // of gradients that no cache keeps
constexpr std::int64_t kTileElements = 1 << 13;    // a first-level cache full of float32

struct VectorSize {
  std::int64_t n, k, d, h, w;  // images, keypoints of the skeleton, components, cells
};

inline VectorSize as_vector_size(const std::array<std::int64_t, 5>& size) {
  return {size[0], size[1], size[2], size[3], size[4]};
}

// What Python passes: per part the address, strides and number of keypoints; `keypoints` holds those
// of all parts back to back. No gradients: none are wanted.
struct VectorArguments {
  const std::vector<Address>& vectors;
  const std::vector<Strides5>& strides;
  const std::vector<Address>& gradients;
  const std::vector<Strides5>& gradient_strides;
  const std::vector<std::int64_t>& counts;
  const std::vector<std::int64_t>& keypoints;
  VectorSize size;
};

// float16 needs a GPU to be worth its rounding; the CPU takes the other two.
template <class Visit>
void dispatch_vector_dtype(int code, Visit visit) {
  switch (code) {
    case 0: return visit(float{});
    case 1: return visit(BFloat16{});
    default: throw std::invalid_argument("unknown dtype code");
  }
}

template <class T>
struct VectorPart {
  const T* v;
  T* gradient;                // null: not wanted
  Strides5 stride, written;   // of v and of the gradient
  std::int64_t count, first;  // its keypoints are the slots first .. first + count - 1
};

// A keypoint of a part. Slots are numbered part by part.
struct Slot {
  std::int64_t part, index, keypoint;
};

// Pixels of image n: a piece of row y from column x on, or whole rows.
struct VectorTile {
  std::int64_t n, y, x, rows, pixels;
};

template <class T>
class VectorMaps {
 public:
  // What a thread needs for a tile.
  struct Scratch {
    explicit Scratch(const VectorMaps& maps)
        : lengths(maps.slots_.size() * static_cast<std::size_t>(maps.pitch_)),
          live(maps.slots_.size()) {
      for (const std::size_t slot : maps.by_keypoint_) {
        rows.push_back(lengths.data() + static_cast<std::int64_t>(slot) * maps.pitch_);
      }
    }
    std::vector<float> lengths;      // slots × pitch: squared lengths, then factors
    std::vector<std::uint8_t> live;  // per slot, in image n
    std::vector<float*> rows;        // of `lengths`, keypoint by keypoint
    std::int64_t n = -1;
  };

  explicit VectorMaps(const VectorArguments& given) : size_(given.size) {
    const bool write = !given.gradients.empty();
    bool interleaved = true, aligned = true, dense = true;
    std::int64_t elements = 0;
    for (std::size_t p = 0; p < given.vectors.size(); ++p) {
      const auto& stride = given.strides[p];
      const auto& written = write ? given.gradient_strides[p] : stride;
      const Address gradient = write ? given.gradients[p] : 0;
      const std::int64_t count = given.counts[p], first = static_cast<std::int64_t>(slots_.size());
      parts_.push_back({reinterpret_cast<const T*>(given.vectors[p]),
                        reinterpret_cast<T*>(gradient), stride, written, count, first});
      for (std::int64_t j = 0; j < count; ++j) {
        slots_.push_back({static_cast<std::int64_t>(p), j, given.keypoints.at(slots_.size())});
      }
      elements += count * size_.n * size_.d * size_.h * size_.w;
      planar_ = planar_ && (size_.w == 1 || (stride[4] == 1 && written[4] == 1));
      interleaved = interleaved && (size_.d == 1 || (stride[2] == 1 && written[2] == 1));
      dense = dense && stride[3] == size_.w && written[3] == size_.w;
      aligned = aligned && gradient % (kOctet * sizeof(T)) == 0;
      for (const auto step : written) aligned = aligned && (step == 1 || step % kOctet == 0);
    }
    if (size_.n > 0 && !planar_ && !interleaved) throw std::out_of_range("vectors have mixed memory layouts");
    first_of_.push_back(0);
    for (std::int64_t k = 0; k < size_.k; ++k) {
      for (std::size_t slot = 0; slot < slots_.size(); ++slot) {
        if (slots_[slot].keypoint == k) by_keypoint_.push_back(slot);
      }
      first_of_.push_back(by_keypoint_.size());
    }
    const std::int64_t width = planar_ ? size_.d : static_cast<std::int64_t>(slots_.size()) * size_.d;
    const std::int64_t pixels = std::max(kLanes, kTileElements / width / kLanes * kLanes);
    rows_ = planar_ && dense ? std::clamp(pixels / size_.w, std::int64_t{1}, size_.h) : 1;
    columns_ = planar_ ? size_.w : std::min(size_.w, pixels);
    pitch_ = (rows_ * columns_ + kLanes - 1) / kLanes * kLanes;
    threads_ = elements > kSerialElements;
    stream_ = write && aligned && (planar_ ? size_.w : size_.d) % kOctet == 0 &&
              elements * static_cast<std::int64_t>(sizeof(T)) >= kStreamBytes;
  }

  std::int64_t tiles() const { return size_.n * tiles_down() * tiles_across(); }
  std::int64_t tile_pixels() const { return rows_ * columns_; }

  // Calls `run_tiles(first, last)` on every thread with its share of the tiles.
  template <class RunTiles>
  void share(const RunTiles& run_tiles) const {
    const std::int64_t all = tiles();
#pragma omp parallel if (threads_)
    {
      std::int64_t first = 0, last = all;
#if defined(_OPENMP)
      const std::int64_t members = omp_get_num_threads(), me = omp_get_thread_num();
      first = all * me / members;
      last = all * (me + 1) / members;
#endif
      run_tiles(first, last);
      finish_streaming();
    }
  }

  // Runs tile `t`; `work` is told
  //   begin(tile)              which it is;
  //   live(k)                  whether keypoint k counts; if not, its gradient is zero;
  //   combine(k, rows, count)  rows[i][pixel] is the squared length in the i-th part that predicts
  //                            k (the value itself where d = 1) and is to become the factor.
  template <class Work>
  void run(std::int64_t t, Scratch& scratch, Work& work) const {
    const std::int64_t row = t / tiles_across(), x = t % tiles_across() * columns_;
    const std::int64_t n = row / tiles_down(), y = row % tiles_down() * rows_;
    const std::int64_t rows = std::min(rows_, size_.h - y);
    const VectorTile tile{n, y, x, rows, rows * std::min(columns_, size_.w - x)};
    work.begin(tile);
    if (n != scratch.n) {
      for (std::size_t s = 0; s < slots_.size(); ++s) {
        scratch.live[s] = work.live(slots_[s].keypoint);
      }
      scratch.n = n;
    }
    if (!planar_) {
      for (const auto& part : parts_) read_interleaved(part, tile, scratch);
    }
    for (std::int64_t k = 0; k < size_.k; ++k) {
      const std::size_t first = first_of_[static_cast<std::size_t>(k)];
      const std::size_t last = first_of_[static_cast<std::size_t>(k) + 1];
      if (scratch.live[by_keypoint_[first]]) {
        for (std::size_t i = first; planar_ && i < last; ++i) {
          read_planar(slots_[by_keypoint_[i]], tile, scratch.rows[i]);
        }
        work.combine(k, scratch.rows.data() + first, static_cast<std::int64_t>(last - first));
      }
      for (std::size_t i = first; planar_ && i < last; ++i) {
        const Slot& slot = slots_[by_keypoint_[i]];
        const bool live = scratch.live[by_keypoint_[i]] != 0;
        stream_ ? write_planar<true>(slot, tile, scratch.rows[i], live)
                : write_planar<false>(slot, tile, scratch.rows[i], live);
      }
    }
    for (const auto& part : parts_) {
      if (!planar_ && part.gradient != nullptr) write_interleaved(part, tile, scratch);
    }
  }

 private:
  std::int64_t tiles_down() const { return (size_.h + rows_ - 1) / rows_; }
  std::int64_t tiles_across() const { return (size_.w + columns_ - 1) / columns_; }

  static std::int64_t start(const Strides5& stride, const VectorTile& tile) {
    return tile.n * stride[0] + tile.y * stride[3] + tile.x * stride[4];
  }

  void read_interleaved(const VectorPart<T>& part, const VectorTile& tile, Scratch& scratch) const {
    switch (size_.d) {
      case 1: return read_values(part, tile, scratch);
      case 4: return read_vectors<4>(part, tile, scratch);
      case 8: return read_vectors<8>(part, tile, scratch);
      case 16: return read_vectors<16>(part, tile, scratch);
      default: return read_vectors<0>(part, tile, scratch);
    }
  }

  void write_interleaved(const VectorPart<T>& part, const VectorTile& tile, Scratch& scratch) const {
    if (stream_) {
      size_.d == 8 ? write_vectors<8, true>(part, tile, scratch) : write_vectors<0, true>(part, tile, scratch);
    } else if (size_.d == 4) {
      write_vectors<4, false>(part, tile, scratch);
    } else {
      size_.d == 8 ? write_vectors<8, false>(part, tile, scratch) : write_vectors<0, false>(part, tile, scratch);
    }
  }

  // d = 1, pixels not adjacent.
  void read_values(const VectorPart<T>& part, const VectorTile& tile, Scratch& scratch) const {
    const T* from = part.v + start(part.stride, tile);
    float* to = scratch.lengths.data() + part.first * pitch_;
    for (std::int64_t x = 0; x < tile.pixels; ++x, from += part.stride[4]) {
      for (std::int64_t j = 0; j < part.count; ++j) {
        to[j * pitch_ + x] = load(from + j * part.stride[1]);
      }
    }
  }

  template <int kDepth>
  void read_vectors(const VectorPart<T>& part, const VectorTile& tile, Scratch& scratch) const {
    // Locals, since every store might change what `this` and `part` point to.
    const std::int64_t depth = kDepth == 0 ? size_.d : kDepth, count = part.count;
    const std::int64_t pixels = tile.pixels, step = part.stride[4], slot_step = part.stride[1];
    const std::int64_t pitch = pitch_, ahead = part.stride[3];
    const std::uint8_t* live = scratch.live.data() + part.first;
    const T* from = part.v + start(part.stride, tile);
    float* to = scratch.lengths.data() + part.first * pitch_;
    for (std::int64_t x = 0; x < pixels; x += kOctet) {
      const std::int64_t here = std::min(kOctet, pixels - x);
      for (std::int64_t j = 0; j < count; ++j) {
        if (!live[j]) continue;
        const T* v = from + x * step + j * slot_step;
        float* out = to + j * pitch + x;
        if (here == kOctet) {
          prefetch(from + x * step + ahead + j * kOctet * depth, kOctet * depth);
          const Octet squared = squared_lengths<kDepth>(v, step, depth);
          std::memcpy(out, &squared, sizeof squared);
          continue;
        }
        for (std::int64_t i = 0; i < here; ++i) {
          float sum = 0;
          for (std::int64_t c = 0; c < depth; ++c) {
            const float component = load(v + i * step + c);
            sum += component * component;
          }
          out[i] = sum;
        }
      }
    }
  }

  // Memory that is needed a row later: the processor's own prefetching does not follow a walk in
  // tiles. It may lie past the end.
  static void prefetch(const T* first, std::int64_t elements) {
    const char* address = reinterpret_cast<const char*>(first);
    for (std::size_t i = 0; i < static_cast<std::size_t>(elements) * sizeof(T); i += 64) {
      __builtin_prefetch(address + i, 0, 2);
    }
  }

  template <int kDepth, bool kStream>
  void write_vectors(const VectorPart<T>& part, const VectorTile& tile,
                     const Scratch& scratch) const {
    const std::int64_t depth = kDepth == 0 ? size_.d : kDepth, whole = depth / kOctet * kOctet;
    const std::int64_t count = part.count, pixels = tile.pixels, pitch = pitch_;
    const std::int64_t step = part.stride[4], slot_step = part.stride[1];
    const std::int64_t out_step = part.written[4], out_slot_step = part.written[1];
    const std::uint8_t* live = scratch.live.data() + part.first;
    const float* factors = scratch.lengths.data() + part.first * pitch_;
    const T* from = part.v + start(part.stride, tile);
    T* to = part.gradient + start(part.written, tile);
    for (std::int64_t x = 0; x < pixels; ++x) {
      const T* v = from + x * step;
      T* out = to + x * out_step;
      const float* factor_at = factors + x;
      for (std::int64_t j = 0; j < count; ++j) {
        const float factor = *factor_at;
        std::int64_t c = 0;
        for (; c < whole; c += kOctet) {
          store_octet<kStream>(out + c, live[j] ? load_floats<Octet>(v + c) * factor : Octet{});
        }
        if (kDepth == 4) {
          store_floats(out, live[j] ? load_floats<Quad>(v) * factor : Quad{});
        } else if (kDepth == 0) {
          for (; c < depth; ++c) {
            out[c] = from_float<T>(!live[j] ? 0.0f : depth == 1 ? factor : load(v + c) * factor);
          }
        }
        v += slot_step;
        out += out_slot_step;
        factor_at += pitch;
      }
    }
  }

  void read_planar(const Slot& slot, const VectorTile& tile, float* to) const {
    const VectorPart<T>& part = parts_[static_cast<std::size_t>(slot.part)];
    const T* from = part.v + start(part.stride, tile) + slot.index * part.stride[1];
    const std::int64_t step = part.stride[2];
    const bool plain = size_.d == 1;
    std::int64_t x = 0;
    for (; x + kLanes <= tile.pixels; x += kLanes) {
      FloatLanes sum = {};
      for (std::int64_t c = 0; c < size_.d; ++c) {
        const auto v = load_floats<FloatLanes>(from + c * step + x);
        sum = plain ? v : sum + v * v;
      }
      store_floats(to + x, sum);
    }
    for (; x < tile.pixels; ++x) {
      float sum = 0;
      for (std::int64_t c = 0; c < size_.d; ++c) {
        const float v = load(from + c * step + x);
        sum = plain ? v : sum + v * v;
      }
      to[x] = sum;
    }
  }

  template <bool kStream>
  void write_planar(const Slot& slot, const VectorTile& tile, const float* factors,
                    bool live) const {
    const VectorPart<T>& part = parts_[static_cast<std::size_t>(slot.part)];
    if (part.gradient == nullptr) return;
    const T* from = part.v + start(part.stride, tile) + slot.index * part.stride[1];
    T* to = part.gradient + start(part.written, tile) + slot.index * part.written[1];
    const bool plain = size_.d == 1;
    for (std::int64_t c = 0; c < size_.d; ++c, from += part.stride[2], to += part.written[2]) {
      std::int64_t x = 0;
      for (; x + kLanes <= tile.pixels; x += kLanes) {
        const auto factor = load_floats<FloatLanes>(factors + x);
        const FloatLanes value = plain ? factor : load_floats<FloatLanes>(from + x) * factor;
        store_lanes<kStream>(to + x, live ? value : FloatLanes{});
      }
      for (; x < tile.pixels; ++x) {
        const float value = plain ? factors[x] : load(from + x) * factors[x];
        to[x] = from_float<T>(live ? value : 0.0f);
      }
    }
  }

  VectorSize size_;
  std::vector<VectorPart<T>> parts_;
  std::vector<Slot> slots_;
  std::vector<std::size_t> by_keypoint_;  // slots, those of keypoint 0 first, then of 1, …
  std::vector<std::size_t> first_of_;     // where those of a keypoint begin
  bool planar_ = true, stream_ = false, threads_ = false;
  std::int64_t rows_ = 1, columns_ = 1, pitch_ = 0;  // pitch: floats between the lengths of slots
};

}  // namespace
}  // namespace pnfs
