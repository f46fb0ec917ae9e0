// The functions of the Python module pnfs._jpeg: raw addresses, no Python and no torch.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>

namespace pnfs {

using Address = std::uintptr_t;
using Size = std::pair<std::int64_t, std::int64_t>;  // height, width

// Of the image in a JPEG file of `bytes` bytes when it is decoded at 1/`reduction` (1, 2, 4, 8) of
// its size. Nothing for a damaged header, and for colours other than YCbCr.
std::optional<Size> jpeg_size(Address file, std::int64_t bytes, int reduction);

// Writes the pixels of a region that lies inside the image to out (bottom - top, right - left, 3),
// blue-green-red, those that decoding the whole image gives. False where `jpeg_size` has nothing
// and for damaged files.
bool decode_jpeg_region(Address file, std::int64_t bytes, int reduction, std::int64_t left,
                        std::int64_t top, std::int64_t right, std::int64_t bottom, Address out);

}  // namespace pnfs
