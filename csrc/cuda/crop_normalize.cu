// Affine crop, flip, channel order and normalisation of uint8 images: pnfs/kernels/crop_normalize.py
// has the definition. One thread makes the three channels of one output pixel.

#include "core/bilinear.h"
#include "core/dtypes.h"
#include "cuda/launch.h"
#include "cuda/ops.h"

namespace pnfs {
namespace {

constexpr int kThreads = 256;

struct Job {
  const std::uint8_t* pixels;
  const std::int64_t* offsets;
  const std::int32_t* sizes;
  const float* matrices;
  const std::uint8_t* flips;
  float scale[3], bias[3];  // value = grey·scale + bias, by output channel
  std::int64_t bytes, total;
  int height, width;
  bool rgb;
};

template <class T>
__global__ void __launch_bounds__(kThreads) crop_normalize_kernel(Job job, T* out) {
  const std::int64_t pixel = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (pixel >= job.total) return;
  const std::int64_t row = pixel / job.width;
  const int x = static_cast<int>(pixel - row * job.width);
  const std::int64_t n = row / job.height;
  const int y = static_cast<int>(row - n * job.height);

  const ByteImage image{job.pixels + job.offsets[n], job.sizes[2 * n], job.sizes[2 * n + 1]};
  const std::int64_t end = job.offsets[n] + std::int64_t{image.height} * image.width * 3;
  const float nan = bits_float(0x7fc00000u);
  float value[3] = {nan, nan, nan};
  if (job.offsets[n] >= 0 && image.height > 0 && image.width > 0 && end <= job.bytes) {
    const Affine map = load_affine(job.matrices + 6 * n, job.flips[n] != 0, job.width);
    bilinear(image, map.a * x + (map.b * y + map.c), map.d * x + (map.e * y + map.f), value);
  }
#pragma unroll
  for (int c = 0; c < 3; ++c) {
    const float grey = job.rgb ? value[2 - c] : value[c];
    out[pixel * 3 + c] = from_float<T>(grey * job.scale[c] + job.bias[c]);
  }
}

}  // namespace

void crop_normalize(Address pixels, std::int64_t bytes, Address offsets, Address sizes,
                    Address matrices, Address flips, std::int64_t count, int height, int width,
                    std::array<float, 3> scale, std::array<float, 3> bias, bool rgb, int dtype,
                    Address out, Address stream) {
  const Job job{reinterpret_cast<const std::uint8_t*>(pixels),
                reinterpret_cast<const std::int64_t*>(offsets),
                reinterpret_cast<const std::int32_t*>(sizes),
                reinterpret_cast<const float*>(matrices),
                reinterpret_cast<const std::uint8_t*>(flips),
                {scale[0], scale[1], scale[2]},
                {bias[0], bias[1], bias[2]},
                bytes,
                count * height * width,
                height,
                width,
                rgb};
  if (job.total == 0) return;
  dispatch_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    PNFS_LAUNCH(crop_normalize_kernel<T>, blocks_for(job.total, kThreads), kThreads, 0, stream, job,
                reinterpret_cast<T*>(out));
  });
}

}  // namespace pnfs
