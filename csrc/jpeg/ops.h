// The functions of the Python module pnfs._jpeg: raw addresses, no Python and no torch.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <utility>

namespace pnfs {

using Address = std::uintptr_t;
using Size = std::pair<std::int64_t, std::int64_t>;  // height, width

// Left, top, right, bottom (exclusive), in pixels.
using Region = std::array<std::int64_t, 4>;

// Of the image in a JPEG file of `count` bytes when it is decoded at 1/`reduction` (1, 2, 4, 8) of
// its size. Nothing for a damaged header, and for the kinds of file that are not decoded here:
// other colours than YCbCr, unusual sampling, more than 2^30 pixels.
std::optional<Size> jpeg_size(Address bytes, std::int64_t count, int reduction);

// Writes the pixels of a region to out (bottom - top, right - left, 3), blue-green-red: those that
// decoding the whole image gives. False, with anything in out, where `jpeg_size` has nothing, for
// damaged files, progressive ones without all their scans, and regions empty or not inside.
bool decode_jpeg_region(Address bytes, std::int64_t count, int reduction, const Region& region,
                        Address out);

}  // namespace pnfs
