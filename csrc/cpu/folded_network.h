// What the driver of folded_network (folded_network.cpp: the plan, memory, threads) and its kernels
// (folded_network_kernels.h, once per instruction set) share. pnfs/kernels/folded_network.py has the
// definitions. Plain data only, see cpu/simd.h.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pnfs {

constexpr std::int64_t kFoldedLanes = 16;  // channels and columns are padded to a multiple of this

// A buffer of one image: rows of pixels of `step` floats, of which `channels`, padded to kFoldedLanes
// where `step` is, are this map's. `pad` pixels of zeros lie around it.
struct FoldedMap {
  float* data;  // of the padded map; null: no map
  std::int64_t h, w, step, channels, pad;

  std::int64_t row() const { return (w + 2 * pad) * step; }
  // Pixel (y, x), from -pad on.
  float* at(std::int64_t y, std::int64_t x) const {
    return data + (y + pad) * row() + (x + pad) * step;
  }
};

struct FoldedLoad {
  const float* image;  // of one image
  std::int64_t strides[3];  // channel, row, column
  FoldedMap out;
};

struct FoldedConv {
  FoldedMap source, out, pre, up, post;
  std::int64_t channels, outputs;
  const float *bias, *weight, *taps, *taps_bias, *expand, *expand_bias;  // null: none
  std::int64_t kernel, stride, dilation;
  bool borders, pairs;  // pairs: operands of the products in bfloat16, see folded_pairs.h
  int act, taps_act, expand_act;
  float pre_scale, post_scale;
};

struct FoldedPool {
  FoldedMap source, out, post;
  bool largest;
  const float *scale, *shift;
  float post_scale;
};

struct FoldedHead {
  std::int64_t depth, parts, keypoints;
  bool pairs;
  const FoldedMap* sources;                  // per part
  const float* const* weights;               // per part
  const float* const* biases;                // per part
  const std::int64_t* counts;                // per part its keypoints
  const std::int64_t* const* of_part;        // per part which they are
  float* scores;                             // (K, h, w) of one image
};

// Each computes rows [first, last) of the output and needs *_scratch floats, aligned to 64 bytes.
struct FoldedKernels {
  void (*load)(const FoldedLoad&, std::int64_t first, std::int64_t last);
  void (*conv)(const FoldedConv&, std::int64_t first, std::int64_t last, float* scratch);
  void (*pool)(const FoldedPool&, std::int64_t first, std::int64_t last);
  void (*head)(const FoldedHead&, std::int64_t first, std::int64_t last, float* scratch);
  std::size_t (*conv_scratch)(const FoldedConv&);
  std::size_t (*head_scratch)(const FoldedHead&);
};

extern const FoldedKernels kFoldedPortable;
#if defined(__x86_64__)
extern const FoldedKernels kFoldedAvx2, kFoldedAvx512;
// For programs with operands in bfloat16, on a CPU that multiplies these.
extern const FoldedKernels kFoldedAvx512Bf16, kFoldedAmx;
#endif

}  // namespace pnfs
