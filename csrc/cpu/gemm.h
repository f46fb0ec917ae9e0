// Matrix product C = start + A·B of operands that lie in cache, for kernels that work on a few rows
// of an image at a time.
//
// A tile of C, kTileRows × kTileVecs vectors, is summed over k in registers. B is read in panels of
// as many columns, so that a panel stays in the first-level cache while the tiles below each other
// pass.
//
// Included by sources that are compiled once per instruction set, see cpu/simd.h.
#pragma once

#include "cpu/simd.h"

namespace pnfs {
namespace {

// The tile, a row of B's panel and an element of A fill the registers: 32 with AVX-512, else 16.
constexpr int kTileRows = 6;
constexpr int kTileVecs = kWidth == 16 ? 4 : 2;
constexpr std::int64_t kPanel = kTileVecs * kWidth;

// A(row, k) is data[row·row_step + k·k_step].
struct LeftMatrix {
  const float* data;
  std::int64_t row_step, k_step;
};

// B(k, column) in panels: panel j has columns j·kPanel to j·kPanel + width, where width is kPanel,
// or less in the last. It starts at data + j·kPanel·panel_step, and its rows are k_step apart.
// A matrix with adjacent columns has a panel_step of 1 and may be read in narrower panels.
struct RightMatrix {
  const float* data;
  std::int64_t panel_step;
  std::int64_t k_step;  // 0: the panel's width, as pack_panel() lays it out
};

// C(row, column) is data[row·row_step + column]. It starts as start[row·start_step + column]: C
// itself to add to it, or a bias or zeros with a step of 0.
struct ResultMatrix {
  float* data;
  std::int64_t row_step;
  const float* start;
  std::int64_t start_step;
};

// Memory that will be needed after the product, fetched to the second-level cache on the way: one
// address per step of k, so that the arithmetic hides the latency.
struct Prefetch {
  const char* at;
  std::int64_t step;
};

// Spreads `bytes` over a product of this size, in panels of kVecs vectors.
template <int kVecs = kTileVecs>
PNFS_INLINE Prefetch prefetch_during(const void* from, std::int64_t bytes, std::int64_t rows,
                                     std::int64_t columns, std::int64_t depth) {
  const std::int64_t tiles = rows / kTileRows * (columns / (kVecs * kWidth));
  const std::int64_t steps = larger(1, tiles * depth);
  return {static_cast<const char*>(from), (bytes + steps - 1) / steps};
}

// kRows rows from `row` on, kVecs vectors from `column` on; b points to the columns.
template <int kRows, int kVecs>
PNFS_INLINE void multiply_tile(LeftMatrix left, std::int64_t row, const float* b,
                               std::int64_t b_step, std::int64_t depth, ResultMatrix result,
                               std::int64_t column, Prefetch& prefetch) {
  const float* a = left.data + row * left.row_step;
  const float* start = result.start + row * result.start_step + column;
  const char* next = prefetch.at;
  Vec sum[kRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) sum[r][v] = load(start + r * result.start_step + v * kWidth);
  }
  for (std::int64_t k = 0; k < depth; ++k) {
    if (kRows == kTileRows) {  // smaller tiles are rare, and short of load slots
      __builtin_prefetch(next, 0, 2);
      next += prefetch.step;
    }
    Vec columns[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) columns[v] = load(b + v * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const float element = a[r * left.row_step];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sum[r][v] += element * columns[v];
    }
    a += left.k_step;
    b += b_step;
  }
  prefetch.at = next;
  float* c = result.data + row * result.row_step + column;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) store(c + r * result.row_step + v * kWidth, sum[r][v]);
  }
}

template <int kVecs>
PNFS_INLINE void multiply_columns(LeftMatrix left, std::int64_t rows, const float* b,
                                  std::int64_t b_step, std::int64_t depth, ResultMatrix result,
                                  std::int64_t column, Prefetch& prefetch) {
  std::int64_t row = 0;
  for (; row + kTileRows <= rows; row += kTileRows) {
    multiply_tile<kTileRows, kVecs>(left, row, b, b_step, depth, result, column, prefetch);
  }
  switch (rows - row) {
    case 5: return multiply_tile<5, kVecs>(left, row, b, b_step, depth, result, column, prefetch);
    case 4: return multiply_tile<4, kVecs>(left, row, b, b_step, depth, result, column, prefetch);
    case 3: return multiply_tile<3, kVecs>(left, row, b, b_step, depth, result, column, prefetch);
    case 2: return multiply_tile<2, kVecs>(left, row, b, b_step, depth, result, column, prefetch);
    case 1: return multiply_tile<1, kVecs>(left, row, b, b_step, depth, result, column, prefetch);
    default: return;
  }
}

// C = start + A·B: `rows` rows, `columns` columns (a multiple of kWidth), `depth` terms. Panels of
// kVecs vectors: narrow ones suit a C that is read and written at a small depth.
template <int kVecs = kTileVecs>
void multiply(LeftMatrix left, RightMatrix right, ResultMatrix result, std::int64_t rows,
              std::int64_t columns, std::int64_t depth, Prefetch prefetch) {
  static_assert(kVecs == 4 || kVecs == 2, "the tails below are made for these");
  constexpr std::int64_t kColumns = kVecs * kWidth;
  for (std::int64_t first = 0; first < columns; first += kColumns) {
    const std::int64_t width = smaller(kColumns, columns - first);
    const std::int64_t step = right.k_step == 0 ? width : right.k_step;
    const float* b = right.data + first * right.panel_step;
    if (width == kColumns) {
      multiply_columns<kVecs>(left, rows, b, step, depth, result, first, prefetch);
      continue;
    }
    std::int64_t done = 0;
    if (width >= 2 * kWidth) {
      multiply_columns<2>(left, rows, b, step, depth, result, first, prefetch);
      done = 2 * kWidth;
    }
    if (done < width) {
      multiply_columns<1>(left, rows, b + done, step, depth, result, first + done, prefetch);
    }
  }
}

// Packed right matrix of `depth` rows: panel j starts at j·kPanel·depth. Columns are padded with
// zeros to a multiple of `pad`. Element (k, column) is from[k·k_step + column·column_step].
std::int64_t count_panels(std::int64_t columns, std::int64_t pad) {
  return (round_up(columns, pad) + kPanel - 1) / kPanel;
}

void pack_panel(const float* from, std::int64_t k_step, std::int64_t column_step,
                std::int64_t depth, std::int64_t columns, std::int64_t pad, std::int64_t panel,
                float* packed) {
  const std::int64_t first = panel * kPanel;
  const std::int64_t width = smaller(kPanel, round_up(columns, pad) - first);
  float* to = packed + first * depth;
  for (std::int64_t column = 0; column < width; ++column) {
    const bool real = first + column < columns;
    const float* source = from + (first + column) * column_step;
    for (std::int64_t k = 0; k < depth; ++k) {
      to[k * width + column] = real ? source[k * k_step] : 0.0f;
    }
  }
}

}  // namespace
}  // namespace pnfs
