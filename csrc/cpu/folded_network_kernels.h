// The kernels of folded_network for one instruction set: rows of one step's output, a block of
// pixels at a time in cache. folded_network.h has the interface.
#pragma once

#include "cpu/folded_pairs.h"

namespace pnfs {
namespace {

// Pixels first, first + 1, ... of a map in rows of w, split where a row ends.
template <class Visit>
PNFS_INLINE void visit_runs(std::int64_t first, std::int64_t count, std::int64_t w,
                            const Visit& visit) {
  std::int64_t y = first / w, x = first % w;
  for (std::int64_t done = 0; done < count; ++y, x = 0) {
    const std::int64_t run = smaller(w - x, count - done);
    visit(y, x, run, done);
    done += run;
  }
}

// Zeros around rows [first, last) of a map.
void clear_border(const FoldedMap& map, std::int64_t first, std::int64_t last) {
  if (map.pad == 0) return;
  const std::int64_t width =
      map.step < kFoldedLanes ? map.step : round_up(map.channels, kFoldedLanes);
  const auto clear = [&](std::int64_t y, std::int64_t x, std::int64_t pixels) {
    float* to = map.at(y, x);
    if (width == map.step) {
      std::memset(to, 0, static_cast<std::size_t>(pixels * width) * sizeof(float));
      return;
    }
    for (std::int64_t i = 0; i < pixels; ++i, to += map.step) {
      std::memset(to, 0, static_cast<std::size_t>(width) * sizeof(float));
    }
  };
  for (std::int64_t y = first; y < last; ++y) {
    clear(y, -map.pad, map.pad);
    clear(y, map.w, map.pad);
  }
  for (std::int64_t i = 1; i <= map.pad; ++i) {
    if (first == 0) clear(-i, -map.pad, map.w + 2 * map.pad);
    if (last == map.h) clear(map.h - 1 + i, -map.pad, map.w + 2 * map.pad);
  }
}

// Cuts scratch memory into pieces; with no memory it counts.
struct Cutter {
  float* memory;
  std::size_t used = 0;

  float* take(std::int64_t floats) {
    float* piece = memory == nullptr ? nullptr : memory + used;
    used += static_cast<std::size_t>(round_up(floats, kFoldedLanes));
    return piece;
  }
};

// Depthwise 3×3 of `pixels` pixels, x_step floats apart; rows point to the first one's left taps,
// which are `side` floats apart.
template <int kPixels, class Out>
PNFS_INLINE void depthwise_pixels(const float* const* rows, std::int64_t x_step, std::int64_t side,
                                  const Vec* taps, Vec bias, int act, Out* out,
                                  std::int64_t out_step) {
  Vec sum[kPixels];
#pragma GCC unroll 4
  for (int q = 0; q < kPixels; ++q) sum[q] = bias;
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) {
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) {
#pragma GCC unroll 4
      for (int q = 0; q < kPixels; ++q) {
        sum[q] += taps[3 * i + j] * load(rows[i] + q * x_step + j * side);
      }
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < kPixels; ++q) store_rounded(out + q * out_step, activate(sum[q], act));
}

template <class Out>
void depthwise_run(const FoldedConv& s, const float* const* rows, std::int64_t x_step,
                   std::int64_t side, std::int64_t pixels, Out* out, std::int64_t out_step) {
  const std::int64_t padded = round_up(s.channels, kFoldedLanes);
  for (std::int64_t channel = 0; channel < padded; channel += kWidth) {
    Vec taps[9];
#pragma GCC unroll 9
    for (int tap = 0; tap < 9; ++tap) taps[tap] = load(s.taps + tap * padded + channel);
    const Vec bias = load(s.taps_bias + channel);
    const float* at[3] = {rows[0] + channel, rows[1] + channel, rows[2] + channel};
    Out* to = out + channel;
    std::int64_t x = 0;
    for (; x + 4 <= pixels; x += 4) {
      depthwise_pixels<4>(at, x_step, side, taps, bias, s.taps_act, to, out_step);
      for (const float*& row : at) row += 4 * x_step;
      to += 4 * out_step;
    }
    for (; x < pixels; ++x) {
      depthwise_pixels<1>(at, x_step, side, taps, bias, s.taps_act, to, out_step);
      for (const float*& row : at) row += x_step;
      to += out_step;
    }
  }
}

// Position i of n along an axis twice as long as `half`: the pixel before it and how far it is past.
struct Between {
  std::int64_t first, second;
  float second_share;

  Between(std::int64_t i, std::int64_t half) {
    const float scale = static_cast<float>(half - 1) / static_cast<float>(2 * half - 1);
    const float at = scale * static_cast<float>(i);
    first = smaller(static_cast<std::int64_t>(at), half - 1);
    second = smaller(first + 1, half - 1);
    second_share = at - static_cast<float>(first);
  }
};

// What one step of the kind Conv keeps in scratch memory.
struct ConvScratch {
  std::int64_t t_step, s_step, e_step, ring_rows, ring_row;
  float *t, *start, *between, *ring, *zeros, *pairs;
  std::size_t floats;

  ConvScratch(const FoldedConv& s, float* memory) {
    Cutter cutter{memory};
    const std::int64_t channels = round_up(s.channels, kFoldedLanes);
    const std::int64_t outputs = round_up(s.outputs, kFoldedLanes);
    t_step = channels + kFoldedLanes;  // a power of two would crowd into a few sets of the cache
    s_step = outputs + kFoldedLanes;
    e_step = channels;
    t = s.taps == nullptr || s.pairs ? nullptr : cutter.take(kBlock * t_step);
    start = cutter.take(kBlock * s_step);
    between = s.up.data == nullptr ? nullptr : cutter.take((s.up.w + 1) * outputs);
    ring_row = (s.source.w + 2) * e_step;
    ring_rows = (kBlock / s.out.w + 1) * s.stride + 3;
    ring = zeros = nullptr;
    if (s.expand != nullptr) {
      ring = cutter.take(ring_rows * ring_row);
      zeros = cutter.take(ring_row);
    }
    pairs = nullptr;
    if (s.pairs && s.weight != nullptr) {
      const std::int64_t depth = s.kernel * s.kernel * s.channels;
      pairs = cutter.take(paired_floats(s.expand == nullptr ? depth
                                                            : larger(depth, s.source.channels)));
    }
    floats = cutter.used;
  }
};

// start = bias + pre_scale·pre + upsampled(up) for a run of pixels of one row.
void start_run(const FoldedConv& s, std::int64_t y, std::int64_t x, std::int64_t pixels,
               const ConvScratch& scratch, float* start) {
  const std::int64_t outputs = round_up(s.outputs, kFoldedLanes);
  float* between = scratch.between;
  if (s.up.data != nullptr) {  // the row of `up` that lies at y
    const Between row(y, s.up.h);
    const std::int64_t left = Between(x, s.up.w).first;
    const std::int64_t right = Between(x + pixels - 1, s.up.w).second;
    for (std::int64_t i = left; i <= right; ++i) {
      const float *above = s.up.at(row.first, i), *below = s.up.at(row.second, i);
      for (std::int64_t c = 0; c < outputs; c += kWidth) {
        const Vec a = load(above + c), b = load(below + c);
        store(between + i * outputs + c, a + row.second_share * (b - a));
      }
    }
  }
  for (std::int64_t i = 0; i < pixels; ++i, start += scratch.s_step) {
    const float* bias = s.bias;
    if (s.borders) bias += ((y == 0 ? 2 : 0) + (x + i == 0 ? 1 : 0)) * outputs;
    const float* pre = s.pre.data == nullptr ? nullptr : s.pre.at(y, x + i);
    if (between == nullptr) {
      for (std::int64_t c = 0; c < outputs; c += kWidth) {
        Vec sum = load(bias + c);
        if (pre != nullptr) sum += s.pre_scale * load(pre + c);
        store(start + c, sum);
      }
      continue;
    }
    const Between column(x + i, s.up.w);
    const float* left = between + column.first * outputs;
    const float* right = between + column.second * outputs;
    for (std::int64_t c = 0; c < outputs; c += kWidth) {
      const Vec a = load(left + c), b = load(right + c);
      Vec sum = load(bias + c) + (a + column.second_share * (b - a));
      if (pre != nullptr) sum += s.pre_scale * load(pre + c);
      store(start + c, sum);
    }
  }
}

// Rows of the expanded map, of which the latest are kept; rows outside it are zeros.
struct Ring {
  const FoldedConv& s;
  const ConvScratch& scratch;
  std::int64_t made;  // the next row to make
  Product product;

  Ring(const FoldedConv& step, const ConvScratch& memory, std::int64_t first)
      : s(step), scratch(memory), made(first) {
    const auto bytes = [](std::int64_t floats) {
      return static_cast<std::size_t>(floats) * sizeof(float);
    };
    std::memset(scratch.zeros, 0, bytes(scratch.ring_row));
    for (std::int64_t i = 0; i < scratch.ring_rows; ++i) {
      std::memset(scratch.ring + i * scratch.ring_row, 0, bytes(scratch.e_step));
      std::memset(scratch.ring + (i + 1) * scratch.ring_row - scratch.e_step, 0,
                  bytes(scratch.e_step));
    }
    product.segments = 1;
    product.segment_at[0] = 0;
    product.depth = s.source.channels;
    product.columns = round_up(s.channels, kFoldedLanes);
    product.weight = s.expand;
    product.act = s.expand_act;
    product.has_post = false;
  }

  const float* row(std::int64_t y) const {  // from the pixel left of it on
    if (y < 0 || y >= s.source.h) return scratch.zeros;
    return scratch.ring + y % scratch.ring_rows * scratch.ring_row;
  }

  // Makes the rows before `end`.
  void make(std::int64_t end) {
    const std::int64_t w = s.source.w, last = smaller(end, s.source.h) * w;
    for (std::int64_t first = made * w; first < last; first += kBlock) {
      product.pixels = smaller(kBlock, last - first);
      visit_runs(first, product.pixels, w, [&](auto y, auto x, auto run, auto done) {
        const float* from = s.source.at(y, x);
        float* to = const_cast<float*>(row(y)) + (x + 1) * scratch.e_step;
        for (std::int64_t i = 0; i < run; ++i) {
          product.a[done + i] = from + i * s.source.step;
          product.start[done + i] = s.expand_bias;
          product.post[done + i] = product.out[done + i] = to + i * scratch.e_step;
        }
      });
      multiply(product, scratch.pairs);
    }
    made = larger(made, smaller(end, s.source.h));
  }
};

// Without a product: out = act(start) + post_scale·post.
void sum_run(const FoldedConv& s, const float* start, std::int64_t start_step, std::int64_t y,
             std::int64_t x, std::int64_t pixels) {
  const std::int64_t outputs = round_up(s.outputs, kFoldedLanes);
  for (std::int64_t i = 0; i < pixels; ++i, start += start_step) {
    float* out = s.out.at(y, x + i);
    const float* post = s.post.data == nullptr ? nullptr : s.post.at(y, x + i);
    for (std::int64_t c = 0; c < outputs; c += kWidth) {
      Vec value = activate(load(start + c), s.act);
      if (post != nullptr) value += s.post_scale * load(post + c);
      store(out + c, value);
    }
  }
}

void conv_rows(const FoldedConv& s, std::int64_t first, std::int64_t last, float* memory) {
  const ConvScratch scratch(s, memory);
  const Tiles tiles;
  const std::int64_t w = s.out.w;
  const bool starts = s.borders || s.pre.data != nullptr || s.up.data != nullptr;
  Product product;
  product.depth = s.channels;
  product.columns = round_up(s.outputs, kFoldedLanes);
  product.weight = s.weight;
  product.act = s.act;
  product.has_post = s.post.data != nullptr;
  product.post_scale = s.post_scale;
  product.segments = 1;
  product.segment_at[0] = 0;
  if (s.kernel == 3) {  // three adjacent pixels are one run where nothing lies between them
    const bool dense = s.source.step == s.channels;
    product.segments = dense ? 3 : 9;
    product.depth = dense ? 3 * s.channels : s.channels;
    for (std::int64_t i = 0; i < product.segments; ++i) {
      product.segment_at[i] =
          dense ? i * s.source.row() : i / 3 * s.source.row() + i % 3 * s.source.step;
    }
  }
  const bool packed = s.pairs && s.taps != nullptr;  // the taps write into the product's A
  const Pairs pairs(scratch.pairs, s.channels);
  const std::int64_t reach = s.kernel / 2;
  const bool expands = s.expand != nullptr;
  alignas(Ring) unsigned char ring_memory[sizeof(Ring)];
  Ring* ring = expands ? new (ring_memory) Ring(s, scratch, larger(0, first * s.stride - 1))
                       : nullptr;
  for (std::int64_t pixel = first * w; pixel < last * w; pixel += kBlock) {
    product.pixels = smaller(kBlock, last * w - pixel);
    if (expands) ring->make((pixel + product.pixels - 1) / w * s.stride + 2);
    visit_runs(pixel, product.pixels, w, [&](auto y, auto x, auto run, auto done) {
      const float* from = nullptr;
      std::int64_t from_step = s.source.step * s.stride;
      if (s.taps != nullptr) {
        const float* rows[3];
        for (int i = 0; i < 3; ++i) {
          const std::int64_t at = y * s.stride + (i - 1) * s.dilation;
          rows[i] = expands ? ring->row(at) + x * s.stride * scratch.e_step
                            : s.source.at(at, x * s.stride - s.dilation);
        }
        const std::int64_t step = expands ? scratch.e_step : s.source.step;
        const auto make = [&](auto* out, std::int64_t out_step) {
          out += done * out_step;
          depthwise_run(s, rows, step * s.stride, step * s.dilation, run, out, out_step);
        };
        if (packed) {
          make(pairs.a, pairs.step);
        } else {
          make(scratch.t, scratch.t_step);
          from = scratch.t + done * scratch.t_step;
          from_step = scratch.t_step;
        }
      } else if (s.weight != nullptr) {
        from = s.source.at(y * s.stride - reach, x * s.stride - reach);
      }
      float* start = scratch.start + done * scratch.s_step;
      if (starts || s.weight == nullptr) start_run(s, y, x, run, scratch, start);
      if (s.weight == nullptr) return sum_run(s, start, scratch.s_step, y, x, run);
      float* out = s.out.at(y, x);
      const float* post = product.has_post ? s.post.at(y, x) : out;
      const std::int64_t post_step = product.has_post ? s.post.step : s.out.step;
      for (std::int64_t i = 0; i < run; ++i) {
        if (!packed) product.a[done + i] = from + i * from_step;
        product.start[done + i] = starts ? start + i * scratch.s_step : s.bias;
        product.post[done + i] = post + i * post_step;
        product.out[done + i] = out + i * s.out.step;
      }
    });
    if (packed) pairs.pad(product.pixels);
    if (s.weight != nullptr) multiply(product, scratch.pairs, packed);
  }
  clear_border(s.out, first, last);
}

std::size_t conv_scratch(const FoldedConv& s) { return ConvScratch(s, nullptr).floats; }

void load_rows(const FoldedLoad& s, std::int64_t first, std::int64_t last) {
  const std::int64_t padded =
      s.out.step < kFoldedLanes ? s.out.step : round_up(s.out.channels, kFoldedLanes);
  for (std::int64_t y = first; y < last; ++y) {
    float* out = s.out.at(y, 0);
    const float* from = s.image + y * s.strides[1];
    for (std::int64_t c = 0; c < padded; ++c) {
      const bool real = c < s.out.channels;
      const float* plane = from + (real ? c * s.strides[0] : 0);
      for (std::int64_t x = 0; x < s.out.w; ++x) {
        out[x * s.out.step + c] = real ? plane[x * s.strides[2]] : 0.0f;
      }
    }
  }
  clear_border(s.out, first, last);
}

void pool_rows(const FoldedPool& s, std::int64_t first, std::int64_t last) {
  const std::int64_t channels = round_up(s.source.channels, kFoldedLanes);
  for (std::int64_t y = first; y < last; ++y) {
    const std::int64_t top = larger(0, y - 1), bottom = smaller(s.out.h - 1, y + 1);
    for (std::int64_t x = 0; x < s.out.w; ++x) {
      const std::int64_t left = larger(0, x - 1), right = smaller(s.out.w - 1, x + 1);
      const float share = 1.0f / static_cast<float>((bottom - top + 1) * (right - left + 1));
      for (std::int64_t c = 0; c < channels; c += kWidth) {
        Vec total = s.largest ? load(s.source.at(top, left) + c) : Vec{};
        for (std::int64_t i = top; i <= bottom; ++i) {
          for (std::int64_t j = left; j <= right; ++j) {
            const Vec v = load(s.source.at(i, j) + c);
            if (!s.largest) {
              total += v;
            } else {
              total = total >= v ? total : v;
              total = v != v ? v : total;  // NaN stays NaN, as in torch
            }
          }
        }
        if (!s.largest) total *= share;
        Vec value = load(s.scale + c) * total + load(s.shift + c);
        if (s.post.data != nullptr) value += s.post_scale * load(s.post.at(y, x) + c);
        store(s.out.at(y, x) + c, value);
      }
    }
  }
  clear_border(s.out, first, last);
}

struct HeadScratch {
  std::int64_t v_step;
  float *vectors, *scores, *pairs;
  std::size_t floats;

  HeadScratch(const FoldedHead& s, float* memory) {
    Cutter cutter{memory};
    std::int64_t columns = 0;
    for (std::int64_t p = 0; p < s.parts; ++p) columns = larger(columns, s.counts[p] * s.depth);
    v_step = round_up(columns, kFoldedLanes) + kFoldedLanes;
    vectors = cutter.take(kBlock * v_step);
    scores = cutter.take(s.keypoints * kBlock);
    std::int64_t depth = 0;
    for (std::int64_t p = 0; p < s.parts; ++p) depth = larger(depth, s.sources[p].channels);
    pairs = s.pairs ? cutter.take(paired_floats(depth)) : nullptr;
    floats = cutter.used;
  }
};

PNFS_INLINE float squash(const float* v, std::int64_t depth) {
  if (depth == 1) return v[0];
  float squared = 0.0f;
  for (std::int64_t c = 0; c < depth; ++c) squared += v[c] * v[c];
  return squared / (1.0f + squared);
}

void head_rows(const FoldedHead& s, std::int64_t first, std::int64_t last, float* memory) {
  const HeadScratch scratch(s, memory);
  const Tiles tiles;
  const std::int64_t w = s.sources[0].w, plane = s.sources[0].h * w;
  Product product;
  product.segments = 1;
  product.segment_at[0] = 0;
  product.act = kLinear;
  product.has_post = false;
  for (std::int64_t pixel = first * w; pixel < last * w; pixel += kBlock) {
    product.pixels = smaller(kBlock, last * w - pixel);
    const std::int64_t pixels = product.pixels;
    std::memset(scratch.scores, 0, static_cast<std::size_t>(s.keypoints * kBlock) * sizeof(float));
    for (std::int64_t p = 0; p < s.parts; ++p) {
      const FoldedMap& source = s.sources[p];
      product.depth = source.channels;
      product.columns = round_up(s.counts[p] * s.depth, kFoldedLanes);
      product.weight = s.weights[p];
      visit_runs(pixel, pixels, w, [&](auto y, auto x, auto run, auto done) {
        for (std::int64_t i = 0; i < run; ++i) {
          product.a[done + i] = source.at(y, x + i);
          product.start[done + i] = s.biases[p];
          product.out[done + i] = scratch.vectors + (done + i) * scratch.v_step;
          product.post[done + i] = product.out[done + i];
        }
      });
      multiply(product, scratch.pairs);
      for (std::int64_t k = 0; k < s.counts[p]; ++k) {
        float* to = scratch.scores + s.of_part[p][k] * kBlock;
        const float* v = scratch.vectors + k * s.depth;
        if (s.depth == 8) {  // known lengths are unrolled
          for (std::int64_t i = 0; i < pixels; ++i) to[i] += squash(v + i * scratch.v_step, 8);
        } else {
          for (std::int64_t i = 0; i < pixels; ++i) {
            to[i] += squash(v + i * scratch.v_step, s.depth);
          }
        }
      }
    }
    for (std::int64_t k = 0; k < s.keypoints; ++k) {
      std::memcpy(s.scores + k * plane + pixel, scratch.scores + k * kBlock,
                  static_cast<std::size_t>(pixels) * sizeof(float));
    }
  }
}

std::size_t head_scratch(const FoldedHead& s) { return HeadScratch(s, nullptr).floats; }

const FoldedKernels kKernels = {load_rows, conv_rows,    pool_rows,
                                head_rows, conv_scratch, head_scratch};

}  // namespace
}  // namespace pnfs
