// depthwise_fanout: pnfs/kernels/depthwise_fanout.py has the definition. Forward, a block takes its
// tile of z and the halo around it to shared memory once and applies every stencil. Backward it takes
// the tiles of the results' gradients, one stencil after the other; gradients of a stride of 2 stand
// where the windows' centres are, with zeros between them. Sums over pixels are per block, then added
// in a fixed order: no atomics, equal in every run.

#include <algorithm>
#include <cmath>

#include "cuda/depthwise_fanout.cuh"
#include "cuda/ops.h"

namespace pnfs {
namespace {

constexpr int kSumChannels = 32, kSumSlices = 8;
constexpr std::int64_t kMostBlocks = 2048;  // backward: each has a row of sums
constexpr int kTileRows = 8;                // of x

template <int kRows, int kStride, int kDilation>
__device__ __forceinline__ void convolve(const float4* from, int row_step, int column_step,
                                         const float4* taps, int groups, float (*acc)[4]) {
#pragma unroll
  for (int b = 0; b < 3; ++b) {
    float w[3][4];
#pragma unroll
    for (int a = 0; a < 3; ++a) unpack(taps[(3 * a + b) * groups], w[a]);
#pragma unroll
    for (int row = 0; row <= (kRows - 1) * kStride + 2 * kDilation; ++row) {
      float z[4];
      unpack(from[row * row_step + b * kDilation * column_step], z);
#pragma unroll
      for (int a = 0; a < 3; ++a) {
        const int t = row - a * kDilation;
        if (t < 0 || t % kStride != 0 || t / kStride >= kRows) continue;
#pragma unroll
        for (int k = 0; k < 4; ++k) acc[t / kStride][k] += w[a][k] * z[k];
      }
    }
  }
}

template <class T, int kStride, bool kVector>
__global__ void __launch_bounds__(kThreads, 3) forward_kernel(Fanout f) {
  constexpr int kRows = kTileRows / kStride;
  PNFS_DYNAMIC_SHARED(tile);
  const int rows = (kRows - 1) * kStride + 1 + 2 * f.reach;
  const int columns = (f.columns - 1) * kStride + 1 + 2 * f.reach;
  float4* const constants = tile + rows * columns * f.groups;
  float4* const taps = constants + 3 * f.groups;
  float4* const centre = taps + 9 * f.groups;
  float4* const sums = centre + f.groups;  // (2, columns, groups)

  const std::int64_t place = blockIdx.x / f.chunks;
  const std::int64_t p = place / f.tiles, in_part = place - p * f.tiles;
  const std::int64_t n = in_part / (f.tiles_h * f.tiles_w);
  const int in_image = static_cast<int>(in_part - n * f.tiles_h * f.tiles_w);
  const int i0 = in_image / f.tiles_w * kRows, j0 = in_image % f.tiles_w * f.columns;
  const Channels channels(f, p, static_cast<int>(blockIdx.x % f.chunks), constants);
  const T* x = static_cast<const T*>(f.x) + p * f.x_step + n * f.h * f.w * f.c;
  __syncthreads();  // the constants are there
  fill_tile<T>(tile, rows, columns, f.groups, [&](int row, int column, int channel, float* v) {
    load_z<T, kVector>(f, channels, x, i0 * kStride - f.reach + row,
                       j0 * kStride - f.reach + column, channel, v);
  });

  const int group = threadIdx.x % f.groups, column = threadIdx.x / f.groups, j = j0 + column;
  const bool there = column < f.columns && j < f.out_w && group * 4 < channels.left;
  const int valid = there ? min(kRows, f.out_h - i0) : 0;
  const int row_step = columns * f.groups, step = f.groups;
  for (int s = 0; s < f.count; ++s) {
    const Stencil& stencil = f.stencils[s];
    load_taps(f, stencil, channels, taps);
    __syncthreads();  // the tile and the taps are there
    float acc[kRows][4] = {};
    if (there) {
      const int dilation = stencil.kind == 2 ? 2 : 1, corner = f.reach - dilation;
      const float4* from =
          tile + corner * row_step + (column * kStride + corner) * step + group;
      if (stencil.kind == kMaxPool) {
#pragma unroll
        for (int i = 0; i < 4 * kRows; ++i) acc[i / 4][i % 4] = -INFINITY;
        for (int b = 0; b < 3; ++b) {
          const int at = j * kStride + b - 1;
          if (at < 0 || at >= f.w) continue;
#pragma unroll
          for (int row = 0; row <= (kRows - 1) * kStride + 2; ++row) {
            const int y = i0 * kStride + row - 1;
            if (y < 0 || y >= f.h) continue;
            float z[4];
            unpack(from[row * row_step + b * step], z);
#pragma unroll
            for (int a = 0; a < 3; ++a) {
              const int t = row - a;
              if (t < 0 || t % kStride != 0 || t / kStride >= kRows) continue;
#pragma unroll
              for (int k = 0; k < 4; ++k) {
                float& best = acc[t / kStride][k];
                best = max_wins(z[k], best) ? z[k] : best;
              }
            }
          }
        }
      } else if (dilation == 2) {
        convolve<kRows, kStride, 2>(from, row_step, step, taps + group, f.groups, acc);
      } else {
        convolve<kRows, kStride, 1>(from, row_step, step, taps + group, f.groups, acc);
      }
      T* y = static_cast<T*>(stencil.y) + (p * f.n + n) * f.out_h * f.out_w * f.c;
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        if (row >= valid) continue;
        if (stencil.kind == kAveragePool) {
          const float weight = average_weight(f.h, f.w, (i0 + row) * kStride, j * kStride);
#pragma unroll
          for (int k = 0; k < 4; ++k) acc[row][k] *= weight;
        }
        store_quad<kVector>(
            y + (std::int64_t{i0 + row} * f.out_w + j) * f.c + channels.first + group * 4,
            channels.left - group * 4, acc[row]);
      }
      // Sums are of the distance from one of the values, lest they cancel under a large mean.
      if (column == 0) centre[group] = make_float4(acc[0][0], acc[0][1], acc[0][2], acc[0][3]);
    }
    __syncthreads();  // the taps are used, the centre is there
    if (!f.stats) continue;
    float c[4] = {}, sum[4] = {}, square[4] = {};
    if (there) unpack(centre[group], c);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (row >= valid) continue;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float distance = acc[row][k] - c[k];
        sum[k] += distance;
        square[k] += distance * distance;
      }
    }
    if (column < f.columns) {
      sums[column * f.groups + group] = make_float4(sum[0], sum[1], sum[2], sum[3]);
      sums[(f.columns + column) * f.groups + group] =
          make_float4(square[0], square[1], square[2], square[3]);
    }
    __syncthreads();  // the sums of all columns are there
    const int width = f.groups * 4;
    const float* all = reinterpret_cast<const float*>(sums);
    for (int i = threadIdx.x; i < width && i < channels.left; i += blockDim.x) {
      float total = 0, total_square = 0;
      for (int k = 0; k < f.columns; ++k) {
        total += all[k * width + i];
        total_square += all[(f.columns + k) * width + i];
      }
      float* to = f.scratch + ((s * f.p + p) * f.tiles + in_part) * 3 * f.c + channels.first + i;
      to[0] = reinterpret_cast<const float*>(centre)[i];
      to[f.c] = total;
      to[2 * f.c] = total_square;
    }
  }
}

// Mean and variance from the sums of the tiles, in float64: each slice takes every kSumSlices-th
// tile, then the first slice merges them.
__global__ void __launch_bounds__(kSumChannels* kSumSlices) moments_kernel(Fanout f) {
  __shared__ double counts[kSumSlices][kSumChannels], means[kSumSlices][kSumChannels],
      squares[kSumSlices][kSumChannels];
  const int rows = kTileRows / f.stride, slice = threadIdx.x / kSumChannels;
  const int lane = threadIdx.x % kSumChannels;
  const std::int64_t blocks = (f.c + kSumChannels - 1) / kSumChannels;
  const std::int64_t sp = blockIdx.x / blocks;  // stencil and part
  const std::int64_t channel = blockIdx.x % blocks * kSumChannels + lane;
  double count = 0, mean = 0, square = 0;
  const auto merge = [&](double pixels, double of_mean, double of_square) {
    if (pixels == 0) return;
    const double distance = of_mean - mean, total = count + pixels;
    square += of_square + distance * distance * count * pixels / total;
    mean += distance * pixels / total;
    count = total;
  };
  for (std::int64_t tile = slice; tile < f.tiles && channel < f.c; tile += kSumSlices) {
    const int in_image = static_cast<int>(tile % (f.tiles_h * f.tiles_w));
    const int height = min(rows, f.out_h - in_image / f.tiles_w * rows);
    const int width = min(f.columns, f.out_w - in_image % f.tiles_w * f.columns);
    const float* from = f.scratch + (sp * f.tiles + tile) * 3 * f.c + channel;
    const double pixels = static_cast<double>(height * width), sum = from[f.c];
    merge(pixels, from[0] + sum / pixels, from[2 * f.c] - sum * sum / pixels);
  }
  counts[slice][lane] = count;
  means[slice][lane] = mean;
  squares[slice][lane] = square;
  __syncthreads();
  if (slice != 0 || channel >= f.c) return;
  for (int i = 1; i < kSumSlices; ++i) merge(counts[i][lane], means[i][lane], squares[i][lane]);
  const Stencil& stencil = f.stencils[sp / f.p];
  const std::int64_t at = sp % f.p * f.c + channel;
  stencil.to_mean[at] = static_cast<float>(mean);
  stencil.to_var[at] = static_cast<float>(square > 0 || square != square ? square / count : 0.0);
}

// gz and the taps' gradients of one thread's column through a convolution or an average pool.
template <int kDilation>
__device__ __forceinline__ void gather(const float4* from, int row_step, int step,
                                       const float4* taps, const float (*z)[4], float (*gz)[4],
                                       float (*g_taps)[4]) {
#pragma unroll
  for (int b = 0; b < 3; ++b) {
    float w[3][4];
#pragma unroll
    for (int a = 0; a < 3; ++a) unpack(taps[(3 * a + b) * step], w[a]);
#pragma unroll
    for (int row = 0; row < kTileRows + 2 * kDilation; ++row) {
      float g[4];
      unpack(from[row * row_step + (2 - b) * kDilation * step], g);
#pragma unroll
      for (int a = 0; a < 3; ++a) {
        const int r = row + (a - 2) * kDilation;
        if (r < 0 || r >= kTileRows) continue;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          gz[r][k] += w[a][k] * g[k];
          g_taps[3 * a + b][k] += z[r][k] * g[k];
        }
      }
    }
  }
}

// Adds the sums of all columns, `count` rows of them, to the block's totals.
__device__ __forceinline__ void add_columns(const float4* memory, int columns, int groups, int count,
                                            float* totals) {
  const float* all = reinterpret_cast<const float*>(memory);
  const int width = groups * 4;
  for (int i = threadIdx.x; i < count * width; i += blockDim.x) {
    const int row = i / width, channel = i - row * width;
    float sum = 0;
    for (int k = 0; k < columns; ++k) sum += all[(row * columns + k) * width + channel];
    totals[i] += sum;
  }
}

template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads) backward_kernel(Fanout f) {
  PNFS_DYNAMIC_SHARED(tile);
  const int halo = f.max_pool ? 2 : f.reach, step = f.groups;
  const int rows = kTileRows + 2 * halo, columns = f.columns + 2 * halo, row_step = columns * step;
  float4* const constants = tile + rows * row_step;
  float4* const taps = constants + 3 * f.groups;
  float* const slopes = reinterpret_cast<float*>(taps + 9 * f.groups);  // add, times: (2, 4 groups)
  float* const totals = slopes + 8 * f.groups;
  const int width = f.groups * 4, sums = (2 + 9 * f.convolutions) * width;
  auto* const winners = reinterpret_cast<std::uint32_t*>(totals + sums);

  const std::int64_t of_part = f.blocks * f.chunks;
  const std::int64_t p = blockIdx.x / of_part, in_part = blockIdx.x - p * of_part;
  const std::int64_t block = in_part / f.chunks;
  const Channels channels(f, p, static_cast<int>(in_part % f.chunks), constants);
  for (int i = threadIdx.x; i < sums; i += blockDim.x) totals[i] = 0;
  const int group = threadIdx.x % f.groups, column = threadIdx.x / f.groups;
  const bool works = column < f.columns;
  const float pixels = static_cast<float>(f.n * f.out_h * f.out_w);

  const std::int64_t last = min(f.tiles, (block + 1) * f.per_block);
  for (std::int64_t t = block * f.per_block; t < last; ++t) {
    const std::int64_t n = t / (f.tiles_h * f.tiles_w);
    const int in_image = static_cast<int>(t - n * f.tiles_h * f.tiles_w);
    const int y0 = in_image / f.tiles_w * kTileRows, x0 = in_image % f.tiles_w * f.columns;
    const int own_x = x0 + column;
    const bool there = works && own_x < f.w && group * 4 < channels.left;
    const T* x = static_cast<const T*>(f.x) + p * f.x_step + n * f.h * f.w * f.c;
    const std::int64_t result = (p * f.n + n) * f.out_h * f.out_w * f.c;
    __syncthreads();  // constants and totals are there, the tile before is done with
    fill_tile<T>(tile, rows, columns, f.groups, [&](int row, int at, int channel, float* v) {
      load_z<T, kVector>(f, channels, x, y0 - halo + row, x0 - halo + at, channel, v);
    });
    __syncthreads();  // z is there
    const float4* corner = tile + column * step + group;
    float z[kTileRows][4], gz[kTileRows][4] = {};
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
      const float4 none = make_float4(0, 0, 0, 0);
      unpack(there ? corner[(r + halo) * row_step + halo * step] : none, z[r]);
    }
    if (f.max_pool) {  // the tap that has the maximum of every window, a byte per channel
      const int across = f.columns + 2;
      for (int i = threadIdx.x; i < (kTileRows + 2) * across * f.groups; i += blockDim.x) {
        const int pixel = i / f.groups, row = pixel / across, at = pixel - row * across;
        const int y = y0 - 1 + row, xx = x0 - 1 + at;
        std::uint32_t winner = 0;
        float best[4] = {};
        bool first = true;
        for (int tap = 0; tap < 9; ++tap) {
          const int ty = y + tap / 3 - 1, tx = xx + tap % 3 - 1;
          if (ty < 0 || ty >= f.h || tx < 0 || tx >= f.w) continue;
          float v[4];
          unpack(tile[(ty - y0 + halo) * row_step + (tx - x0 + halo) * step + i % f.groups], v);
          for (int k = 0; k < 4; ++k) {
            if (!first && !max_wins(v[k], best[k])) continue;
            best[k] = v[k];
            winner = (winner & ~(0xffu << 8 * k)) | static_cast<std::uint32_t>(tap) << 8 * k;
          }
          first = false;
        }
        winners[i] = winner;
      }
    }
    float* total = totals + 2 * width;
    for (int s = 0; s < f.count; ++s) {
      const Stencil& stencil = f.stencils[s];
      if (f.stats) {
        for (int i = threadIdx.x; i < width && i < channels.left; i += blockDim.x) {
          const float slope = 2.0f * stencil.g_var[channels.at + i] / pixels;
          slopes[width + i] = slope;
          slopes[i] =
              stencil.g_mean[channels.at + i] / pixels - slope * stencil.mean[channels.at + i];
        }
      }
      __syncthreads();  // the slopes are there, the tile's last contents are done with
      load_taps(f, stencil, channels, taps);
      const T* gy = static_cast<const T*>(stencil.gy) + result;
      const T* value = static_cast<const T*>(stencil.y) + result;
      fill_tile<T>(tile, rows, columns, f.groups, [&](int row, int at, int channel, float* v) {
        const int y = y0 - halo + row, xx = x0 - halo + at;
        const bool centre = y >= 0 && y < f.h && xx >= 0 && xx < f.w && y % f.stride == 0 &&
                            xx % f.stride == 0 && channel < channels.left;
        if (!centre) {
#pragma unroll
          for (int i = 0; i < kPacket<T>; ++i) v[i] = 0.0f;
          return;
        }
        const std::int64_t from = (std::int64_t{y / f.stride} * f.out_w + xx / f.stride) * f.c +
                                  channels.first + channel;
        load_channels<kPacket<T>, kVector>(gy + from, channels.left - channel, v);
        if (f.stats) {
          float of_value[kPacket<T>];
          load_channels<kPacket<T>, kVector>(value + from, channels.left - channel, of_value);
#pragma unroll
          for (int i = 0; i < kPacket<T>; ++i) {
            if (channel + i >= channels.left) continue;
            v[i] += slopes[channel + i] + slopes[width + channel + i] * of_value[i];
          }
        }
        if (stencil.kind == kAveragePool) {
          const float weight = average_weight(f.h, f.w, y, xx);
#pragma unroll
          for (int i = 0; i < kPacket<T>; ++i) v[i] *= weight;
        }
      });
      __syncthreads();  // the gradients and the taps are there
      float g_taps[9][4] = {};
      if (there && stencil.kind == kMaxPool) {
        for (int b = 0; b < 3; ++b) {
          const int at = column + 2 - b;  // of the window, among those of the tile
#pragma unroll
          for (int row = 0; row < kTileRows + 2; ++row) {
            const std::uint32_t winner = winners[(row * (f.columns + 2) + at) * step + group];
            float g[4];
            unpack(tile[(row - 1 + halo) * row_step + (at - 1 + halo) * step + group], g);
#pragma unroll
            for (int a = 0; a < 3; ++a) {
              const int r = row + a - 2;
              if (r < 0 || r >= kTileRows) continue;
#pragma unroll
              for (int k = 0; k < 4; ++k) {
                const bool won = (winner >> 8 * k & 0xffu) == static_cast<unsigned>(3 * a + b);
                gz[r][k] += won ? g[k] : 0.0f;
              }
            }
          }
        }
      } else if (there && stencil.kind == 2) {
        gather<2>(corner + (halo - 2) * (row_step + step), row_step, step, taps + group, z, gz,
                  g_taps);
      } else if (there) {
        gather<1>(corner + (halo - 1) * (row_step + step), row_step, step, taps + group, z, gz,
                  g_taps);
      }
      if (stencil.kind <= 0) continue;
      __syncthreads();  // the gradients are used
      if (works) {
#pragma unroll
        for (int tap = 0; tap < 9; ++tap) {
          tile[(tap * f.columns + column) * step + group] =
              make_float4(g_taps[tap][0], g_taps[tap][1], g_taps[tap][2], g_taps[tap][3]);
        }
      }
      __syncthreads();  // the sums of all columns are there
      add_columns(tile, f.columns, f.groups, 9, total);
      total += 9 * width;
    }

    float sum[4] = {}, dot[4] = {};
    const std::int64_t image = (p * f.n + n) * f.h * f.w * f.c;
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
      if (!there || y0 + r >= f.h) continue;
      const std::int64_t at =
          (std::int64_t{y0 + r} * f.w + own_x) * f.c + channels.first + group * 4;
      float v[4];
      load_channels<4, kVector>(x + at, channels.left - group * 4, v);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int channel = group * 4 + k;
        const float before = f.mean == nullptr ? v[k] : channels.before(channel, v[k]);
        float& g = gz[r][k];
        if (f.activation != 0) g = before > 0.0f ? g : 0.0f;
        if (f.activation == 2) g = before < 6.0f ? g : 0.0f;
        if (f.mean == nullptr) continue;
        sum[k] += g;
        dot[k] += g * (v[k] - channels.constants[channel]);
        g *= channels.constants[width + channel];
      }
      store_quad<kVector>(static_cast<T*>(f.gx) + image + at, channels.left - group * 4, gz[r]);
    }
    if (f.mean == nullptr) continue;
    __syncthreads();  // the tile is used
    if (works) {
      tile[column * step + group] = make_float4(sum[0], sum[1], sum[2], sum[3]);
      tile[(f.columns + column) * step + group] = make_float4(dot[0], dot[1], dot[2], dot[3]);
    }
    __syncthreads();  // the sums of all columns are there
    add_columns(tile, f.columns, f.groups, 2, totals);
  }
  __syncthreads();  // all of the totals are there
  for (int i = threadIdx.x; i < sums; i += blockDim.x) {
    f.scratch[std::int64_t{blockIdx.x} * sums + i] = totals[i];
  }
}

// The gradients of taps and normalisation from the blocks' sums.
__global__ void __launch_bounds__(kSumChannels* kSumSlices) gradients_kernel(Fanout f) {
  __shared__ double slices[kSumSlices][kSumChannels];
  const int width = f.groups * 4, sums = (2 + 9 * f.convolutions) * width;
  const int slice = threadIdx.x / kSumChannels, lane = threadIdx.x % kSumChannels;
  const std::int64_t pieces = (sums + kSumChannels - 1) / kSumChannels;
  const std::int64_t place = blockIdx.x / pieces;  // part and chunk
  const std::int64_t p = place / f.chunks, chunk = place % f.chunks;
  const std::int64_t i = blockIdx.x % pieces * kSumChannels + lane;
  double sum = 0;
  for (std::int64_t block = slice; block < f.blocks && i < sums; block += kSumSlices) {
    sum += f.scratch[((p * f.blocks + block) * f.chunks + chunk) * sums + i];
  }
  slices[slice][lane] = sum;
  __syncthreads();
  const std::int64_t row = i / width, channel = chunk * width + i % width;
  if (slice != 0 || i >= sums || channel >= f.c) return;
  for (int k = 1; k < kSumSlices; ++k) sum += slices[k][lane];
  const float total = static_cast<float>(sum);
  const std::int64_t at = p * f.c + channel;
  if (row < 2) {
    if (f.mean == nullptr) return;
    const float rstd = 1.0f / sqrtf(f.var[at] + f.eps);
    const float scale = f.gamma == nullptr ? rstd : rstd * f.gamma[at];
    if (row == 0) {
      f.g_mean[at] = -scale * total;
      if (f.g_beta != nullptr) f.g_beta[at] = total;
    } else {
      f.g_var[at] = -0.5f * rstd * rstd * scale * total;
      if (f.g_gamma != nullptr) f.g_gamma[at] = rstd * total;
    }
    return;
  }
  std::int64_t convolution = (row - 2) / 9;
  int s = 0;
  while (f.stencils[s].kind <= 0 || convolution-- > 0) ++s;
  f.stencils[s].g_taps[at * 9 + (row - 2) % 9] = total;
}

using Size = std::array<std::int64_t, 8>;  // as csrc/cpu/ops.h

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// How the work is cut; `results`: tiles cover the results, else x.
Fanout plan(const Size& size, const Integers& stencils, double eps, int dtype, bool results) {
  Fanout f{};
  f.p = size[0], f.n = size[1], f.c = size[2], f.x_step = size[5];
  f.h = static_cast<int>(size[3]), f.w = static_cast<int>(size[4]);
  f.stride = static_cast<int>(size[6]), f.activation = static_cast<int>(size[7]);
  f.out_h = (f.h - 1) / f.stride + 1, f.out_w = (f.w - 1) / f.stride + 1;
  f.eps = static_cast<float>(eps);
  f.reach = 1;
  for (const std::int64_t kind : stencils) {
    f.stencils[f.count++].kind = static_cast<int>(kind);
    f.convolutions += kind > 0;
    f.max_pool |= kind == kMaxPool;
    f.reach = std::max(f.reach, static_cast<int>(kind));
  }
  // Whole packets of 16 bytes, in chunks of equal size.
  const std::int64_t quads = dtype == 0 ? 1 : 2, packets = ceil_div(f.c, 4 * quads);
  f.chunks = static_cast<int>(ceil_div(packets * quads, kMostGroups));
  f.groups = static_cast<int>(ceil_div(packets, f.chunks) * quads);
  const int height = results ? f.out_h : f.h, width = results ? f.out_w : f.w;
  const int rows = results ? kTileRows / f.stride : kTileRows;
  f.tiles_w = static_cast<int>(ceil_div(width, results && f.stride == 2 ? 12 : 16));
  f.columns = static_cast<int>(ceil_div(width, f.tiles_w));
  f.tiles_h = static_cast<int>(ceil_div(height, rows));
  f.tiles = f.n * f.tiles_h * f.tiles_w;
  f.per_block = ceil_div(f.tiles, std::max<std::int64_t>(1, kMostBlocks / (f.p * f.chunks)));
  f.blocks = ceil_div(f.tiles, f.per_block);
  return f;
}

int threads_of(const Fanout& f) { return static_cast<int>(ceil_div(f.columns * f.groups, 32)) * 32; }

// Whether 16-byte accesses fall on their boundaries.
bool aligned(const Fanout& f, int dtype) {
  const std::int64_t packet = dtype == 0 ? 4 : 8;
  auto all = reinterpret_cast<Address>(f.x) | reinterpret_cast<Address>(f.gx);
  for (int s = 0; s < f.count; ++s) {
    all |= reinterpret_cast<Address>(f.stencils[s].y) | reinterpret_cast<Address>(f.stencils[s].gy);
  }
  return all % 16 == 0 && f.c % packet == 0 && f.x_step % packet == 0;
}

void set_inputs(Fanout& f, Address x, const Addresses& weights, const std::array<Address, 4>& norm,
                Address scratch) {
  f.x = reinterpret_cast<const void*>(x);
  const float** to[] = {&f.mean, &f.var, &f.gamma, &f.beta};
  for (int i = 0; i < 4; ++i) *to[i] = reinterpret_cast<const float*>(norm[i]);
  std::size_t weight = 0;
  for (int s = 0; s < f.count; ++s) {
    if (f.stencils[s].kind > 0) {
      f.stencils[s].taps = reinterpret_cast<const float*>(weights[weight++]);
    }
  }
  f.scratch = reinterpret_cast<float*>(scratch);
}

}  // namespace

std::int64_t depthwise_fanout_scratch(const Integers& stencils, const Size& size, int dtype,
                                      bool backward) {
  const Fanout f = plan(size, stencils, 0, dtype, !backward);
  return backward ? f.p * f.blocks * f.chunks * (2 + 9 * f.convolutions) * f.groups * 4
                  : f.count * f.p * f.tiles * 3 * f.c;
}

void depthwise_fanout(Address x, const Integers& stencils, const Addresses& weights,
                      const std::array<Address, 4>& norm, const Addresses& ys,
                      const Addresses& means, const Addresses& variances, const Size& size,
                      double eps, int dtype, Address scratch, Address stream) {
  Fanout f = plan(size, stencils, eps, dtype, true);
  set_inputs(f, x, weights, norm, scratch);
  f.stats = !means.empty();
  for (int s = 0; s < f.count; ++s) {
    f.stencils[s].y = reinterpret_cast<void*>(ys[s]);
    if (!f.stats) continue;
    f.stencils[s].to_mean = reinterpret_cast<float*>(means[s]);
    f.stencils[s].to_var = reinterpret_cast<float*>(variances[s]);
  }
  const unsigned blocks = blocks_for(f.p * f.tiles * f.chunks, 1);
  const std::size_t across = (f.columns - 1) * f.stride + 1 + 2 * f.reach;
  const std::size_t down = (kTileRows / f.stride - 1) * f.stride + 1 + 2 * f.reach;
  const std::size_t shared = (across * down + 13 + 2 * f.columns) * f.groups * sizeof(float4);
  const bool vector = aligned(f, dtype);
  dispatch_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const auto launch = [&](auto forward_kernel) {
      PNFS_LAUNCH(forward_kernel, blocks, threads_of(f), shared, stream, f);
    };
    if (f.stride == 1) {
      launch(vector ? forward_kernel<T, 1, true> : forward_kernel<T, 1, false>);
    } else {
      launch(vector ? forward_kernel<T, 2, true> : forward_kernel<T, 2, false>);
    }
  });
  if (!f.stats) return;
  PNFS_LAUNCH(moments_kernel, blocks_for(f.count * f.p * ceil_div(f.c, kSumChannels), 1),
              kSumChannels * kSumSlices, 0, stream, f);
}

void depthwise_fanout_backward(Address x, const Integers& stencils, const Addresses& weights,
                               const std::array<Address, 4>& norm, const Addresses& gys,
                               const Addresses& ys, const Addresses& means,
                               const Addresses& g_means, const Addresses& g_variances, Address gx,
                               const Addresses& g_weights, const std::array<Address, 4>& g_norm,
                               const Size& size, double eps, int dtype, Address scratch,
                               Address stream) {
  Fanout f = plan(size, stencils, eps, dtype, false);
  set_inputs(f, x, weights, norm, scratch);
  f.stats = !ys.empty();
  f.gx = reinterpret_cast<void*>(gx);
  float** to[] = {&f.g_mean, &f.g_var, &f.g_gamma, &f.g_beta};
  for (int i = 0; i < 4; ++i) *to[i] = reinterpret_cast<float*>(g_norm[i]);
  std::size_t weight = 0;
  for (int s = 0; s < f.count; ++s) {
    Stencil& stencil = f.stencils[s];
    stencil.gy = reinterpret_cast<const void*>(gys[s]);
    if (stencil.kind > 0) stencil.g_taps = reinterpret_cast<float*>(g_weights[weight++]);
    if (!f.stats) continue;
    stencil.y = reinterpret_cast<void*>(ys[s]);
    stencil.mean = reinterpret_cast<const float*>(means[s]);
    stencil.g_mean = reinterpret_cast<const float*>(g_means[s]);
    stencil.g_var = reinterpret_cast<const float*>(g_variances[s]);
  }
  const std::size_t halo = f.max_pool ? 2 : f.reach, sums = 2 + 9 * f.convolutions;
  const std::size_t tile = (kTileRows + 2 * halo) * (f.columns + 2 * halo);
  std::size_t shared = (tile + 3 + 9 + 2 + sums) * f.groups * sizeof(float4);
  if (f.max_pool) shared += (kTileRows + 2) * (f.columns + 2) * f.groups * sizeof(std::uint32_t);
  const bool vector = aligned(f, dtype);
  dispatch_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const auto launch = [&](auto backward_kernel) {
      PNFS_LAUNCH(backward_kernel, blocks_for(f.p * f.blocks * f.chunks, 1), threads_of(f), shared,
                  stream, f);
    };
    launch(vector ? backward_kernel<T, true> : backward_kernel<T, false>);
  });
  const std::int64_t pieces = ceil_div(static_cast<std::int64_t>(sums) * f.groups * 4, kSumChannels);
  PNFS_LAUNCH(gradients_kernel, blocks_for(f.p * f.chunks * pieces, 1), kSumChannels * kSumSlices, 0,
              stream, f);
}

}  // namespace pnfs
