// The functions of the Python module pnfs._cuda, one or more per op.
//
// They take device addresses, sizes and the stream's handle, launch, and return without waiting. The
// caller has made the tensors' device current. cuda_module.cpp alone includes pybind11.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace pnfs {

using Address = std::uintptr_t;
using Addresses = std::vector<Address>;
using Integers = std::vector<std::int64_t>;

// As csrc/cpu/ops.h; a crop that does not lie within `pixels` gives NaN.
void crop_normalize(Address pixels, std::int64_t bytes, Address offsets, Address sizes,
                    Address matrices, Address flips, std::int64_t count, int height, int width,
                    std::array<float, 3> scale, std::array<float, 3> bias, bool rgb, int dtype,
                    Address out, Address stream);

// Both as csrc/cpu/ops.h, for convolutions of dilation 1 and 2. `scratch` has room for as many float32
// as depthwise_fanout_scratch says; `size` is theirs.
std::int64_t depthwise_fanout_scratch(const Integers& stencils,
                                      const std::array<std::int64_t, 8>& size, int dtype,
                                      bool backward);
void depthwise_fanout(Address x, const Integers& stencils, const Addresses& weights,
                      const std::array<Address, 4>& norm, const Addresses& ys,
                      const Addresses& means, const Addresses& variances,
                      const std::array<std::int64_t, 8>& size, double eps, int dtype,
                      Address scratch, Address stream);
void depthwise_fanout_backward(Address x, const Integers& stencils, const Addresses& weights,
                               const std::array<Address, 4>& norm, const Addresses& gys,
                               const Addresses& ys, const Addresses& means,
                               const Addresses& g_means, const Addresses& g_variances, Address gx,
                               const Addresses& g_weights, const std::array<Address, 4>& g_norm,
                               const std::array<std::int64_t, 8>& size, double eps, int dtype,
                               Address scratch, Address stream);

// As csrc/cpu/ops.h, for poses whose order is known: `order` (n int64) lists them group after group,
// best score first, and `ends` (int64) where each of `groups` groups ends in it. `words` is the
// size of the largest group over 32, rounded up; `bits` has room for n * words uint32. Writes n
// bools to `keep`, in that order.
void oks_nms(Address points, Address areas, Address sigmas, Address order, Address ends,
             std::int64_t groups, std::int64_t n, std::int64_t k, std::int64_t words,
             double threshold, bool skip_after_removal, Address bits, Address keep,
             Address stream);

}  // namespace pnfs
