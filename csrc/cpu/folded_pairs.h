// The product of folded_network with operands in bfloat16 and sums in float32: by AMX, by AVX-512's
// instruction for bfloat16, or by float32 arithmetic on rounded operands, as this source is compiled.
//
// A row of a panel holds two of B's: each of its 32-bit words is a pair, the earlier element low.
#pragma once

#include "cpu/folded_product.h"

namespace pnfs {
namespace {

constexpr std::int64_t kPairedDepth = 32;  // B's rows are padded to a multiple of this

PNFS_INLINE std::int64_t paired_depth(std::int64_t depth) { return round_up(depth, kPairedDepth); }

// Elements from row to row of A in bfloat16: a vector may be written past the end, and a power of
// two would crowd into a few sets of the cache.
PNFS_INLINE std::int64_t paired_step(std::int64_t depth) {
  return paired_depth(depth) + kPairedDepth;
}

// Floats of memory for kBlock rows of A. Rows that no pixel has are multiplied, too.
PNFS_INLINE std::int64_t paired_floats(std::int64_t depth) {
  return kBlock * paired_step(depth) / 2;
}

PNFS_INLINE void store_rounded(float* to, Vec v) { store(to, v); }

PNFS_INLINE void store_rounded(BFloat16* to, Vec v) {
#if defined(__AVX512BF16__) && PNFS_LANES == 16
  const __m256bh half = _mm512_cvtneps_pbh(same_bits<__m512>(v));
  std::memcpy(to, &half, sizeof half);
#else
  store(to, v);
#endif
}

// A of a product in bfloat16, zeros behind its depth.
struct Pairs {
  BFloat16* a;
  std::int64_t depth, step, words;  // words: 32-bit ones of a row, its padding included

  Pairs(float* memory, std::int64_t of_row)
      : a(reinterpret_cast<BFloat16*>(memory)),
        depth(of_row),
        step(paired_step(of_row)),
        words(paired_depth(of_row) / 2) {}

  void pack(const Product& p) const {
    BFloat16* to = a;
    for (std::int64_t row = 0; row < p.pixels; ++row, to += step) {
      for (std::int64_t s = 0; s < p.segments; ++s) {
        const float* from = p.a[row] + p.segment_at[s];
        for (std::int64_t k = 0; k < p.depth; k += kWidth) {
          store_rounded(to + s * p.depth + k, load(from + k));
        }
      }
    }
    pad(p.pixels);
  }

  void pad(std::int64_t rows) const {
    for (std::int64_t row = 0; row < rows; ++row) {
      std::memset(a + row * step + depth, 0, static_cast<std::size_t>(2 * words - depth) * sizeof *a);
    }
  }

  std::int64_t panel_rows() const { return words; }

  template <int kRows, int kVecs>
  PNFS_INLINE_MEMBER void multiply_add(std::int64_t row, const float* b, std::int64_t b_step,
                                       Vec (&sum)[kRows][kVecs]) const {
    const BFloat16* rows = a + row * step;
    for (std::int64_t k = 0; k < words; ++k, b += b_step) {
      Vec columns[kVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) columns[v] = load(b + v * kWidth);
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        std::uint32_t pair;
        std::memcpy(&pair, rows + r * step + 2 * k, sizeof pair);
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) sum[r][v] = add_products(sum[r][v], pair, columns[v]);
      }
    }
  }

  static PNFS_INLINE_MEMBER Vec add_products(Vec sum, std::uint32_t pair, Vec columns) {
#if defined(__AVX512BF16__) && PNFS_LANES == 16
    return same_bits<Vec>(_mm512_dpbf16_ps(
        same_bits<__m512>(sum),
        same_bits<__m512bh>(_mm512_set1_epi32(static_cast<std::int32_t>(pair))),
        same_bits<__m512bh>(columns)));
#else
    const WordVec words = same_bits<WordVec>(columns);
    sum += same_bits<float>(pair << 16) * same_bits<Vec>(words << 16);
    return sum + same_bits<float>(pair & 0xffff0000u) * same_bits<Vec>(words & 0xffff0000u);
#endif
  }
};

#if defined(__AMX_BF16__)

// What was stored before is there for tile instructions, of which older compilers know only the
// address that they read.
PNFS_INLINE void in_memory() { __asm__ volatile("" ::: "memory"); }

// The shape of this thread's tile registers while it lives: all of 16 rows of 64 bytes.
class Tiles {
 public:
  Tiles() {
    alignas(64) struct {
      std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
      std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    in_memory();
    _tile_loadconfig(&shape);
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  ~Tiles() { _tile_release(); }
};

constexpr std::int64_t kSumStep = 64 + 16;  // a panel's width; rows start in different sets

// kTiles tiles of 16 pixels, 16 columns of b: tile registers 0 to 2 are the sums.
template <int kTiles>
void tile_columns(const Pairs& pairs, const float* b, std::int64_t b_step, float* sums) {
  const BFloat16* a = pairs.a;
  const std::int64_t a_bytes = pairs.step * 2, b_bytes = b_step * 4, sum_bytes = kSumStep * 4;
  in_memory();
  _tile_zero(0);
  if (kTiles > 1) _tile_zero(1);
  if (kTiles > 2) _tile_zero(2);
  for (std::int64_t k = 0; k < pairs.words; k += 16, a += kPairedDepth, b += 16 * b_step) {
    _tile_loadd(6, b, b_bytes);
    _tile_loadd(3, a, a_bytes);
    _tile_dpbf16ps(0, 3, 6);
    if (kTiles > 1) {
      _tile_loadd(4, a + 16 * pairs.step, a_bytes);
      _tile_dpbf16ps(1, 4, 6);
    }
    if (kTiles > 2) {
      _tile_loadd(5, a + 32 * pairs.step, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
    }
  }
  _tile_stored(0, sums, sum_bytes);
  if (kTiles > 1) _tile_stored(1, sums + 16 * kSumStep, sum_bytes);
  if (kTiles > 2) _tile_stored(2, sums + 32 * kSumStep, sum_bytes);
}

// What the sums of a panel become, as `finish` has it; here the cases are told apart once.
template <int kVecs, int kAct>
void finish_panel(const Product& p, const float* sums, std::int64_t column) {
  const bool has_post = p.has_post;
  for (std::int64_t row = 0; row < p.pixels; ++row, sums += kSumStep) {
    const float* start = p.start[row] + column;
    const float* post = p.post[row] + column;
    float* out = p.out[row] + column;
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      Vec value = activate(load(start + v * kWidth) + load(sums + v * kWidth), kAct);
      if (has_post) value += p.post_scale * load(post + v * kWidth);
      store(out + v * kWidth, value);
    }
  }
}

template <int kVecs>
void finish_panel(const Product& p, const float* sums, std::int64_t column) {
  switch (p.act) {
    case kLinear: return finish_panel<kVecs, kLinear>(p, sums, column);
    case kRelu: return finish_panel<kVecs, kRelu>(p, sums, column);
    default: return finish_panel<kVecs, kRelu6>(p, sums, column);
  }
}

void multiply_pairs(const Product& p, const Pairs& pairs) {
  static_assert(kBlock == 48 && kWidth == 16, "three tiles of 16 pixels");
  alignas(64) float sums[kBlock * kSumStep];
  const float* b = p.weight;
  for (std::int64_t column = 0; column < p.columns;) {
    const std::int64_t width = panel_width(p.columns - column);
    for (std::int64_t at = 0; at < width; at += 16) {
      if (p.pixels > 32) {
        tile_columns<3>(pairs, b + at, width, sums + at);
      } else if (p.pixels > 16) {
        tile_columns<2>(pairs, b + at, width, sums + at);
      } else {
        tile_columns<1>(pairs, b + at, width, sums + at);
      }
    }
    switch (width) {
      case 64: finish_panel<4>(p, sums, column); break;
      case 48: finish_panel<3>(p, sums, column); break;
      case 32: finish_panel<2>(p, sums, column); break;
      default: finish_panel<1>(p, sums, column); break;
    }
    b += width * pairs.words;
    column += width;
  }
}

#else

struct Tiles {
  Tiles() {}  // not trivial: one that is not used otherwise is no mistake
};

void multiply_pairs(const Product& p, const Pairs& pairs) { multiply_panels(p, pairs); }

#endif

// `memory`: paired_floats(), for operands in bfloat16; null for float32. It holds A already where
// `packed`.
void multiply(const Product& p, float* memory, bool packed = false) {
  if (memory == nullptr) return multiply_panels(p, Floats{p});
  const Pairs pairs(memory, p.segments * p.depth);
  if (!packed) pairs.pack(p);
  multiply_pairs(p, pairs);
}

}  // namespace
}  // namespace pnfs
