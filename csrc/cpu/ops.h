// The functions of the Python module pnfs._cpu, one or more per op.
//
// They take raw addresses, sizes and strides: nothing here knows torch or Python. cpu_module.cpp
// alone includes pybind11, which costs four seconds of compilation per file.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace pnfs {

using Address = std::uintptr_t;
using Addresses = std::vector<Address>;
using Integers = std::vector<std::int64_t>;
using Strides5 = std::array<std::int64_t, 5>;  // in elements

// Contiguous arrays; `bytes` is the length of `pixels`. See pnfs/kernels/crop_normalize.py.
// Throws std::out_of_range when a crop does not lie within `pixels`.
void crop_normalize(Address pixels, std::int64_t bytes, Address offsets, Address sizes,
                    Address matrices, Address flips, std::int64_t count, int height, int width,
                    std::array<float, 3> scale, std::array<float, 3> bias, bool rgb, int dtype,
                    Address out);

// `size` is N, K, h, w; strides are in elements. `flipped` and `permutation` may be 0. See
// pnfs/kernels/decode_heatmaps.py.
void decode_heatmaps(Address heatmaps, const std::array<std::int64_t, 4>& stride, Address flipped,
                     const std::array<std::int64_t, 4>& flip_stride, Address permutation,
                     Address matrices, Address xy, Address score,
                     const std::array<std::int64_t, 4>& size, bool shift, int dtype);

// x, ys and their gradients: maps of `dtype` (float32, bfloat16), channels-last inside a part. The
// others are contiguous float32. `stencils`: per result the dilation of a convolution, 0 for an average
// pool, -1 for a max pool; `weights` are the convolutions'. `norm`: mean, var, gamma, beta, each may
// be 0. means and variances are empty without statistics. `size`: P, N, C, H, W, elements from part to
// part of x, stride, activation (0 none, 1 ReLU, 2 ReLU6). See pnfs/kernels/depthwise_fanout.py. Throws
// std::runtime_error for an unusable PNFS_ISA.
void depthwise_fanout(Address x, const Integers& stencils, const Addresses& weights,
                      const std::array<Address, 4>& norm, const Addresses& ys,
                      const Addresses& means, const Addresses& variances,
                      const std::array<std::int64_t, 8>& size, double eps, int dtype);

// ys, means, g_means and g_variances are empty where the statistics have no gradient.
void depthwise_fanout_backward(Address x, const Integers& stencils, const Addresses& weights,
                               const std::array<Address, 4>& norm, const Addresses& gys,
                               const Addresses& ys, const Addresses& means,
                               const Addresses& g_means, const Addresses& g_variances, Address gx,
                               const Addresses& g_weights, const std::array<Address, 4>& g_norm,
                               const std::array<std::int64_t, 8>& size, double eps, int dtype);

// One tensor (n, c, y, x) per input with its strides; the rest is contiguous: float32 weights, the
// plan (int64), scores (images, K, h, w). See pnfs/kernels/folded_network.py. Throws
// std::runtime_error for an unusable PNFS_ISA.
void folded_network(const Addresses& inputs,
                    const std::vector<std::array<std::int64_t, 4>>& strides, Address weights,
                    Address plan, Address scores, std::int64_t images);

// Contiguous float64 arrays of n poses with k keypoints; `groups` (int64) may be 0. Writes indices
// to `keep` (n int64) and returns how many. See pnfs/kernels/oks_nms.py.
std::int64_t oks_nms(Address points, Address scores, Address areas, Address sigmas, Address groups,
                     Address keep, std::int64_t n, std::int64_t k, double threshold,
                     bool skip_after_removal);

// Keypoint vectors: per part an address, strides (n, keypoint, component, y, x) and the number of
// its keypoints; `keypoints` are those of all parts back to back; `size` is N, K, d, h, w. Gradients
// have an address and strides per part, or the lists are empty: none is wanted. Either all
// components or all pixels are adjacent. `scores` and `grad_scores`: contiguous (N, K, h, w) of
// `dtype` (float32, bfloat16). See pnfs/kernels/vector_heatmap.py.
void vector_heatmap(const std::vector<Address>& vectors, const std::vector<Strides5>& strides,
                    const std::vector<std::int64_t>& counts,
                    const std::vector<std::int64_t>& keypoints, Address scores,
                    const std::array<std::int64_t, 5>& size, int dtype);
void vector_heatmap_backward(const std::vector<Address>& vectors,
                             const std::vector<Strides5>& strides,
                             const std::vector<Address>& gradients,
                             const std::vector<Strides5>& gradient_strides,
                             const std::vector<std::int64_t>& counts,
                             const std::vector<std::int64_t>& keypoints, Address grad_scores,
                             const std::array<std::int64_t, 5>& size, int dtype);

// The same vectors; `joints` (N, K, 2), `weights` (N, K) and the scalar `loss` are contiguous
// float32; `gain` multiplies the gradients, not the loss. See pnfs/kernels/vector_heatmap_loss.py.
void vector_heatmap_loss(const std::vector<Address>& vectors, const std::vector<Strides5>& strides,
                         const std::vector<Address>& gradients,
                         const std::vector<Strides5>& gradient_strides,
                         const std::vector<std::int64_t>& counts,
                         const std::vector<std::int64_t>& keypoints, Address joints,
                         Address weights, Address loss, const std::array<std::int64_t, 5>& size,
                         float sigma, float stride, float gain, int dtype);

// `tensors`: x, pointwise, depthwise, bias, mean, var, gamma, beta, y, mean_y, var_y. x and y are of
// `dtype` (float32, bfloat16) and channels-last inside a part; the others are contiguous float32.
// depthwise, bias, mean with var, gamma, beta, and mean_y with var_y may be 0. `size`: P, N, C, O, H, W,
// elements from part to part of x, dilation, activation (0 none, 1 ReLU, 2 ReLU6; used with mean and
// var). See pnfs/kernels/separable_conv.py. Throws std::runtime_error for an unusable PNFS_ISA.
void separable_conv(const std::array<Address, 11>& tensors, const std::array<std::int64_t, 9>& size,
                    double eps, int dtype);

// `tensors`: x, pointwise, depthwise, mean, var, gamma, beta, y, mean_y, gy, gmean, gvar, more, and the
// gradients of x, pointwise, depthwise, bias, mean, var, gamma, beta, of which 0 are not wanted, but for
// x's and pointwise's. Those of x and y are like x and y. gmean is 0, and y is not read, where the
// statistics have no gradient. `more` is 0, or like x without gaps, and added to x's gradient.
void separable_conv_backward(const std::array<Address, 21>& tensors,
                             const std::array<std::int64_t, 9>& size, double eps, int dtype);

// `tensors`: x, weight, bias, y, mean, var. x and y are of `dtype` and channels-last inside a part; the
// others are contiguous float32. bias, and mean with var, may be 0. `size`: P, N, C, O, H, W of x,
// elements from part to part of x. See pnfs/kernels/strided_conv.py.
void strided_conv(const std::array<Address, 6>& tensors, const std::array<std::int64_t, 7>& size,
                  int dtype);

// `tensors`: x, weight, y, mean, gy, gmean, gvar, more, and the gradients of x, weight and bias, of
// which the last may be 0. y, mean, gmean and gvar are 0 where the statistics have no gradient; `more`
// is 0, or like x without gaps, and added to x's gradient.
void strided_conv_backward(const std::array<Address, 11>& tensors,
                           const std::array<std::int64_t, 7>& size, int dtype);

// Stacked maps, channels-last inside a part; `size` is P, pixels of a part, C, and parts lie
// `part_stride` elements apart. Small tensors are contiguous float32. Of `maps`, the first has no
// statistics where there is one more than `means`. See pnfs/kernels/mixed_sum.py.
void mixed_sum(const Addresses& maps, const Integers& part_strides, const Addresses& means,
               const Addresses& variances, Address weights, const Integers& relu, double eps,
               Address out, const std::array<std::int64_t, 3>& size, int dtype);

// `g_maps` are without gaps; `g_means` and `g_variances` are (terms with statistics, P, C).
void mixed_sum_backward(Address g, std::int64_t g_part_stride, const Addresses& maps,
                        const Integers& part_strides, const Addresses& means,
                        const Addresses& variances, Address weights, const Integers& relu,
                        double eps, const Addresses& g_maps, Address g_means, Address g_variances,
                        Address g_weights, const std::array<std::int64_t, 3>& size, int dtype);

// As mixed_sum; `size` is P, N, C, H, W of the output, `norms` are means, variances, gammas and
// betas of the sources that are not "same". See pnfs/kernels/scale_mix.py.
void scale_mix(const Addresses& sources, const Integers& part_strides, const Integers& transforms,
               const std::array<Addresses, 4>& norms, Address weights, bool relu, bool down_relu,
               double eps, Address out, const std::array<std::int64_t, 5>& size, int dtype);

// `h` is the output; `g_norms` are (terms with statistics, P, C) each, in the order of `norms`.
void scale_mix_backward(Address g, std::int64_t g_part_stride, Address h, const Addresses& sources,
                        const Integers& part_strides, const Integers& transforms,
                        const std::array<Addresses, 4>& norms, Address weights, bool relu,
                        bool down_relu, double eps, const Addresses& g_sources,
                        const std::array<Address, 4>& g_norms, Address g_weights,
                        const std::array<std::int64_t, 5>& size, int dtype);

// As mixed_sum; mean and variance are (P, C). See pnfs/kernels/batch_stats.py.
void batch_stats(Address x, std::int64_t part_stride, Address mean, Address variance,
                 const std::array<std::int64_t, 3>& size, int dtype);
void batch_stats_backward(Address x, std::int64_t part_stride, Address mean, Address g_mean,
                          Address g_variance, Address gx, const std::array<std::int64_t, 3>& size,
                          int dtype);

// `size` is pixels, C of maps that are channels-last; `norm` is mean, variance, scale and shift, (C)
// float32; `residual` may be 0; `activation`: 0 none, 1 ReLU, 2 ReLU6. With `batch` the statistics are
// computed and written. See pnfs/kernels/batch_norm_act.py.
void batch_norm_act(Address x, Address residual, const std::array<Address, 4>& norm, Address y,
                    const std::array<std::int64_t, 2>& size, bool batch, double eps,
                    int activation, int dtype);

// `gradients`: of scale, shift, mean and variance, the latter two 0 with `batch`. `gv` is the
// gradient of what the activation took, like gy; it is 0, and so is `residual`, but where there are
// both a residual and an activation.
void batch_norm_act_backward(Address gy, Address x, Address residual,
                             const std::array<Address, 4>& norm, Address gx, Address gv,
                             const std::array<Address, 4>& gradients,
                             const std::array<std::int64_t, 2>& size, bool batch, double eps,
                             int activation, int dtype);

}  // namespace pnfs
