// A region of a JPEG image, by libjpeg-turbo.
//
// Of the rows above it and the blocks beside it the library only reads the symbols, and it stops at
// the region's end. It smooths colours across blocks ("fancy upsampling"), but not beyond the columns
// that it was asked for: so a block more is decoded on each side, and dropped.

#include <algorithm>
#include <csetjmp>
#include <cstdio>
#include <cstring>
#include <vector>

#include <jpeglib.h>

#include "jpeg/ops.h"

namespace pnfs {
namespace {

struct Errors {
  jpeg_error_mgr manager;  // first: the library's pointer to it is one to this
  std::jmp_buf back;
};

[[noreturn]] void jump_back(j_common_ptr info) {
  std::longjmp(reinterpret_cast<Errors*>(info->err)->back, 1);
}

void be_silent(j_common_ptr) {}

// The library's decompressor. Every error inside the library jumps to where setjmp(errors.back)
// was called, so nothing that needs a destructor may come to life after that.
struct Decompressor {
  jpeg_decompress_struct info = {};
  Errors errors;

  Decompressor() {
    info.err = jpeg_std_error(&errors.manager);
    errors.manager.error_exit = jump_back;
    errors.manager.output_message = be_silent;
  }
  ~Decompressor() { jpeg_destroy_decompress(&info); }
  Decompressor(const Decompressor&) = delete;
  Decompressor& operator=(const Decompressor&) = delete;
};

// Reads the header and chooses colours and scale; false for colours other than YCbCr.
bool read_header(jpeg_decompress_struct& info, Address file, std::int64_t bytes, int reduction) {
  jpeg_create_decompress(&info);
  jpeg_mem_src(&info, reinterpret_cast<std::uint8_t*>(file), static_cast<unsigned long>(bytes));
  jpeg_read_header(&info, TRUE);
  if (info.jpeg_color_space != JCS_YCbCr || info.num_components != 3) return false;
  info.out_color_space = JCS_EXT_BGR;
  info.scale_num = 1;
  info.scale_denom = static_cast<unsigned>(reduction);
  jpeg_calc_output_dimensions(&info);
  return true;
}

}  // namespace

std::optional<Size> jpeg_size(Address file, std::int64_t bytes, int reduction) {
  Decompressor decompressor;
  jpeg_decompress_struct& info = decompressor.info;
  if (setjmp(decompressor.errors.back)) return std::nullopt;
  if (!read_header(info, file, bytes, reduction)) return std::nullopt;
  return Size(info.output_height, info.output_width);
}

bool decode_jpeg_region(Address file, std::int64_t bytes, int reduction, std::int64_t left,
                        std::int64_t top, std::int64_t right, std::int64_t bottom, Address out) {
  Decompressor decompressor;
  std::vector<std::uint8_t> row;
  jpeg_decompress_struct& info = decompressor.info;
  if (setjmp(decompressor.errors.back)) return false;
  if (!read_header(info, file, bytes, reduction)) return false;
  jpeg_start_decompress(&info);
  const std::int64_t block = info.max_h_samp_factor * 8;  // columns, or fewer when reduced
  const std::int64_t first = std::max<std::int64_t>(left - block, 0);
  const std::int64_t end = std::min<std::int64_t>(right + block, info.output_width);
  JDIMENSION from = static_cast<JDIMENSION>(first), width = static_cast<JDIMENSION>(end - first);
  jpeg_crop_scanline(&info, &from, &width);  // moves `from` left to a block's first column
  row.resize(std::size_t{3} * width);
  jpeg_skip_scanlines(&info, static_cast<JDIMENSION>(top));
  const std::size_t wanted = 3 * static_cast<std::size_t>(right - left);
  for (std::int64_t y = top; y < bottom; ++y) {
    JSAMPROW pixels = row.data();
    jpeg_read_scanlines(&info, &pixels, 1);
    std::uint8_t* to = reinterpret_cast<std::uint8_t*>(out) + (y - top) * wanted;
    std::memcpy(to, pixels + 3 * (left - from), wanted);
  }
  return true;
}

}  // namespace pnfs
