// depthwise_fanout forward: pnfs/kernels/depthwise_fanout.py has the definition. A block takes its tile
// of z and the halo around it to shared memory once and applies every stencil. Sums over pixels are
// per tile, then added in a fixed order: no atomics, equal in every run.

#include <cmath>

#include "cuda/depthwise_fanout.cuh"

namespace pnfs {
namespace {

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

}  // namespace pnfs
