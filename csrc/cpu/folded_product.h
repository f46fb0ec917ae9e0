// The matrix product of folded_network: rows of A, of C and of what C starts from lie anywhere, as
// pointers say, so that a tile crosses the rows of an image; B is packed in panels. folded_pairs.h
// has the product of operands in bfloat16.
//
// Included by sources that are compiled once per instruction set, see cpu/simd.h.
#pragma once

#include "cpu/folded_network.h"
#include "cpu/simd.h"

namespace pnfs {
namespace {

enum Activation { kLinear, kRelu, kRelu6 };

constexpr std::int64_t kBlock = 48;  // pixels at a time: whole tiles of 6 and of 8 rows

PNFS_INLINE Vec activate(Vec v, int act) {
  if (act == kLinear) return v;
  v = relu(v);
  if (act == kRelu) return v;
  return v > 6.0f ? fill(6.0f) : v;
}

// C = act(start + A·B) + post_scale·post, for `pixels` rows.
struct Product {
  const float* a[kBlock];      // row: `segments` runs of `depth` elements, `segment_at` after it
  const float* start[kBlock];  // row of what the sum starts from
  const float* post[kBlock];   // row, where has_post
  float* out[kBlock];
  std::int64_t pixels, segments, depth, columns;
  std::int64_t segment_at[9];
  const float* weight;
  int act;
  bool has_post;
  float post_scale;
};

// What a finished sum of one row becomes.
PNFS_INLINE void finish(const Product& p, std::int64_t row, std::int64_t column, Vec sum) {
  Vec value = activate(sum, p.act);
  if (p.has_post) value += p.post_scale * load(p.post[row] + column);
  store(p.out[row] + column, value);
}

// A as it lies, and panels of floats.
struct Floats {
  const Product& p;

  std::int64_t panel_rows() const { return p.segments * p.depth; }

  // sum += A·B of kRows pixels from `row` on; rows of b are b_step apart.
  template <int kRows, int kVecs>
  PNFS_INLINE_MEMBER void multiply_add(std::int64_t row, const float* b, std::int64_t b_step,
                                       Vec (&sum)[kRows][kVecs]) const {
    for (std::int64_t s = 0; s < p.segments; ++s) {
      const float* a[kRows];
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) a[r] = p.a[row + r] + p.segment_at[s];
      for (std::int64_t k = 0; k < p.depth; ++k) {
        Vec columns[kVecs];
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) columns[v] = load(b + v * kWidth);
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) {
          const float element = a[r][k];
#pragma GCC unroll 4
          for (int v = 0; v < kVecs; ++v) sum[r][v] += element * columns[v];
        }
        b += b_step;
      }
    }
  }
};

// kRows pixels from `row` on, kVecs vectors from `column` on.
template <int kRows, int kVecs, class Operands>
PNFS_INLINE void product_tile(const Product& p, const Operands& operands, std::int64_t row,
                              const float* b, std::int64_t b_step, std::int64_t column) {
  Vec sum[kRows][kVecs];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    const float* start = p.start[row + r] + column;
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) sum[r][v] = load(start + v * kWidth);
  }
  operands.multiply_add(row, b, b_step, sum);
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) finish(p, row + r, column + v * kWidth, sum[r][v]);
  }
}

template <int kRows, int kVecs, class Operands>
void product_rest(const Product& p, const Operands& operands, std::int64_t row, std::int64_t rows,
                  const float* b, std::int64_t b_step, std::int64_t column) {
  if constexpr (kRows > 0) {
    if (rows == kRows) {
      return product_tile<kRows, kVecs>(p, operands, row, b, b_step, column);
    }
    product_rest<kRows - 1, kVecs>(p, operands, row, rows, b, b_step, column);
  }
}

template <int kRows, int kVecs, class Operands>
void product_columns(const Product& p, const Operands& operands, const float* b,
                     std::int64_t b_step, std::int64_t column) {
  std::int64_t row = 0;
  for (; row + kRows <= p.pixels; row += kRows) {
    product_tile<kRows, kVecs>(p, operands, row, b, b_step, column);
  }
  product_rest<kRows - 1, kVecs>(p, operands, row, p.pixels - row, b, b_step, column);
}

// Widths of panels, as pnfs.kernels.folded_network.panel_widths() has them.
PNFS_INLINE std::int64_t panel_width(std::int64_t rest) {
  const std::int64_t vectors = (rest + 15) / 16;
  if (vectors <= 3) return 16 * vectors;
  if (vectors == 5) return 48;
  return vectors % 4 == 0 || vectors > 9 || vectors == 7 ? 64 : 48;
}

template <class Operands>
void multiply_panels(const Product& p, const Operands& operands) {
  const float* b = p.weight;
  for (std::int64_t column = 0; column < p.columns;) {
    const std::int64_t width = panel_width(p.columns - column);
    if constexpr (kWidth == 16) {
      switch (width) {
        case 64: product_columns<6, 4>(p, operands, b, 64, column); break;
        case 48: product_columns<8, 3>(p, operands, b, 48, column); break;
        case 32: product_columns<6, 2>(p, operands, b, 32, column); break;
        default: product_columns<8, 1>(p, operands, b, 16, column); break;
      }
    } else {
      for (std::int64_t at = 0; at < width; at += 2 * kWidth) {
        product_columns<6, 2>(p, operands, b + at, width, column + at);
      }
    }
    b += width * operands.panel_rows();
    column += width;
  }
}

}  // namespace
}  // namespace pnfs
