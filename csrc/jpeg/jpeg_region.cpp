// A region of a JPEG image, by libjpeg-turbo.
//
// Of the rows above it and the blocks beside it the library only reads the symbols, and of a file
// with one scan it reads nothing below. It smooths colours across blocks ("fancy upsampling"), but
// not beyond the columns that it was asked for: a block more is decoded on each side, and dropped.

#include <algorithm>
#include <csetjmp>
#include <cstdio>
#include <cstring>
#include <vector>

#include <jpeglib.h>

#include "jpeg/ops.h"

namespace pnfs {
namespace {

constexpr std::int64_t kMostPixels = std::int64_t{1} << 30;  // as OpenCV: more is a damaged header

struct File {
  Address bytes;
  std::int64_t count;
  int reduction;
};

// The library's decompressor. It reports an error by jumping to where setjmp(back) was called: what
// is used after that belongs to a caller of that function.
struct Decompressor {
  jpeg_decompress_struct info = {};
  jpeg_error_mgr errors;
  std::jmp_buf back;

  Decompressor() {
    info.err = jpeg_std_error(&errors);
    info.client_data = this;
    errors.error_exit = [](j_common_ptr common) {
      std::longjmp(static_cast<Decompressor*>(common->client_data)->back, 1);
    };
    errors.output_message = [](j_common_ptr) {};
  }
  ~Decompressor() { jpeg_destroy_decompress(&info); }
  Decompressor(const Decompressor&) = delete;
  Decompressor& operator=(const Decompressor&) = delete;
};

// Colour with the usual sampling: of others, reduced, the library leaves pixels of a region unset.
bool is_usual(const jpeg_decompress_struct& info) {
  if (info.jpeg_color_space != JCS_YCbCr || info.num_components != 3) return false;
  for (int i = 1; i < 3; ++i) {
    if (info.comp_info[i].h_samp_factor != 1 || info.comp_info[i].v_samp_factor != 1) return false;
  }
  const int across = info.comp_info[0].h_samp_factor, down = info.comp_info[0].v_samp_factor;
  return (across <= 2 && down <= 2) || (across == 4 && down == 1);
}

// Reads the header and chooses colours and scale; false for files that are not decoded here. May
// jump.
bool read_header(jpeg_decompress_struct& info, const File& file) {
  jpeg_create_decompress(&info);
  jpeg_mem_src(&info, reinterpret_cast<std::uint8_t*>(file.bytes),
               static_cast<unsigned long>(file.count));
  jpeg_read_header(&info, TRUE);
  if (!is_usual(info)) return false;
  if (std::int64_t{info.image_width} * info.image_height > kMostPixels) return false;
  info.out_color_space = JCS_EXT_BGR;
  info.scale_num = 1;
  info.scale_denom = static_cast<unsigned>(file.reduction);
  jpeg_calc_output_dimensions(&info);
  return true;
}

// A progressive file that ends early: its blocks are smoothed with more neighbours than a region
// has. Known once decompression has started.
bool lacks_scans(const jpeg_decompress_struct& info) {
  if (!info.progressive_mode) return false;
  for (int i = 0; i < info.num_components; ++i) {
    for (int k = 0; k < DCTSIZE2; ++k) {
      if (info.coef_bits[i][k] != 0) return true;
    }
  }
  return false;
}

// May jump. `row` is empty.
bool read_region(jpeg_decompress_struct& info, const File& file, const Region& region,
                 std::vector<std::uint8_t>& row, std::uint8_t* out) {
  if (!read_header(info, file)) return false;
  const std::int64_t height = info.output_height, columns = info.output_width;
  const auto [left, top, right, bottom] = region;
  if (left < 0 || left >= right || right > columns) return false;
  if (top < 0 || top >= bottom || bottom > height) return false;
  jpeg_start_decompress(&info);
  if (lacks_scans(info)) return false;
  const std::int64_t block = info.max_h_samp_factor * DCTSIZE;  // columns, or fewer when reduced
  const std::int64_t first = std::max<std::int64_t>(left - block, 0);
  const std::int64_t end = std::min<std::int64_t>(right + block, columns);
  JDIMENSION from = static_cast<JDIMENSION>(first), width = static_cast<JDIMENSION>(end - first);
  jpeg_crop_scanline(&info, &from, &width);  // moves `from` left to a block's first column
  row.resize(std::size_t{3} * width);
  jpeg_skip_scanlines(&info, static_cast<JDIMENSION>(top));
  const std::size_t wanted = 3 * static_cast<std::size_t>(right - left);
  for (std::int64_t y = top; y < bottom; ++y, out += wanted) {
    JSAMPROW pixels = row.data();
    jpeg_read_scanlines(&info, &pixels, 1);
    std::memcpy(out, pixels + 3 * (left - from), wanted);
  }
  return true;
}

// Whether `act` returns true, and does not jump.
template <class Act>
bool succeeds(Decompressor& decompressor, const Act& act) {
  if (setjmp(decompressor.back) != 0) return false;
  return act();
}

}  // namespace

std::optional<Size> jpeg_size(Address bytes, std::int64_t count, int reduction) {
  const File file{bytes, count, reduction};
  Decompressor decompressor;
  jpeg_decompress_struct& info = decompressor.info;
  if (!succeeds(decompressor, [&] { return read_header(info, file); })) return std::nullopt;
  return Size(info.output_height, info.output_width);
}

bool decode_jpeg_region(Address bytes, std::int64_t count, int reduction, const Region& region,
                        Address out) {
  const File file{bytes, count, reduction};
  Decompressor decompressor;
  std::vector<std::uint8_t> row;
  auto* pixels = reinterpret_cast<std::uint8_t*>(out);
  return succeeds(decompressor,
                  [&] { return read_region(decompressor.info, file, region, row, pixels); });
}

}  // namespace pnfs
