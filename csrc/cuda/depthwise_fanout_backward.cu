// depthwise_fanout backward. A block takes tiles of z and then those of the results' gradients, one
// stencil after the other; gradients of a stride of 2 stand where the windows' centres are, with zeros
// between them. Sums over pixels are per block, then added in a fixed order: no atomics, equal in every
// run.

#include <cmath>

#include "cuda/depthwise_fanout.cuh"

namespace pnfs {
namespace {

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

}  // namespace

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
