// The functions of the Python module pnfs._cuda, one or more per op.
//
// They take device addresses, sizes and the stream's handle, launch, and return without waiting. The
// caller has made the tensors' device current. cuda_module.cpp alone includes pybind11.
#pragma once

#include <array>
#include <cstdint>

namespace pnfs {

using Address = std::uintptr_t;

// As csrc/cpu/ops.h; a crop that does not lie within `pixels` gives NaN.
void crop_normalize(Address pixels, std::int64_t bytes, Address offsets, Address sizes,
                    Address matrices, Address flips, std::int64_t count, int height, int width,
                    std::array<float, 3> scale, std::array<float, 3> bias, bool rgb, int dtype,
                    Address out, Address stream);

}  // namespace pnfs
