// The functions of the Python module pnfs._cpu, one or more per op.
//
// They take raw addresses, sizes and strides: nothing here knows torch or Python. cpu_module.cpp
// alone includes pybind11, which costs four seconds of compilation per file.
#pragma once

#include <array>
#include <cstdint>

namespace pnfs {

using Address = std::uintptr_t;

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

// Contiguous float64 arrays of n poses with k keypoints; `groups` (int64) may be 0. Writes indices
// to `keep` (n int64) and returns how many. See pnfs/kernels/oks_nms.py.
std::int64_t oks_nms(Address points, Address scores, Address areas, Address sigmas, Address groups,
                     Address keep, std::int64_t n, std::int64_t k, double threshold,
                     bool skip_after_removal);

}  // namespace pnfs
