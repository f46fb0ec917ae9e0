// Runs CUDA kernels on small cases, for ThreadSanitizer: cuda_races CASE, the name of an op,
// "block_sum" or "stuck". Results are not looked at; test_<op>.py compares them.

#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

#include "cuda/launch.h"
#include "cuda/ops.h"

namespace pnfs {
namespace {

template <class T>
Address address(std::vector<T>& values) {
  return reinterpret_cast<Address>(values.data());
}

// What the emulation offers, in one kernel: a block's sum through warps and shared memory.
__global__ void block_sum_kernel(const float* x, float* sums) {
  __shared__ float of_warp[2];
  float sum = x[blockIdx.x * 64 + threadIdx.x];
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
  __syncthreads();  // the test leaves this out
  if (threadIdx.x == 0) sums[blockIdx.x] = of_warp[0] + of_warp[1];
}

void block_sum() {
  std::vector<float> x(3 * 64, 1.0f), sums(3);
  const float* from = x.data();
  float* to = sums.data();
  PNFS_LAUNCH(block_sum_kernel, 3, 64, 0, 0, from, to);
  if (std::getenv("PNFS_EMULATED_SKIP")[0] == '\0' && sums != std::vector<float>(3, 64.0f)) {
    std::puts("wrong sum");
    std::exit(1);
  }
}

// One thread waits for its block, the others for their warp.
__global__ void stuck_kernel() {
  if (threadIdx.x == 0) {
    __syncthreads();
  } else {
    __ballot_sync(~0u, true);
  }
}

void stuck() { PNFS_LAUNCH(stuck_kernel, 1, 32, 0, 0); }

void crop_normalize_case() {
  std::vector<std::uint8_t> pixels(2 * 5 * 7 * 3, 9), flips{0, 1};
  std::vector<std::int64_t> offsets{0, 5 * 7 * 3};
  std::vector<std::int32_t> sizes{5, 7, 5, 7};
  std::vector<float> matrices{1, 0, -1, 0, 1, 0.5f, 0.3f, 0, 0, 0, 0.3f, 0}, out(2 * 20 * 13 * 3);
  for (int dtype = 0; dtype < 3; ++dtype) {
    crop_normalize(address(pixels), static_cast<std::int64_t>(pixels.size()), address(offsets),
                   address(sizes), address(matrices), address(flips), 2, 20, 13, {1, 1, 1},
                   {0, 0, 0}, true, dtype, address(out), 0);
  }
}

void depthwise_fanout_case() {
  constexpr std::int64_t c = 8, h = 9, w = 18;
  const Integers stencils{1, 0, -1, 2};
  std::vector<float> x(h * w * c), gx(x.size()), taps(c * 9, 0.1f), of_channel(c, 1.0f);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 7);
  std::vector<std::vector<float>> maps(4, x), gradients(4, x), taps_to(2, taps),
      small(12, of_channel);
  const auto all = [](std::vector<std::vector<float>>& from, std::size_t first, std::size_t count) {
    Addresses to;
    for (std::size_t i = first; i < first + count; ++i) to.push_back(address(from[i]));
    return to;
  };
  const Address one = address(of_channel);
  const Addresses ones(4, one);
  for (const std::int64_t stride : {1, 2}) {
    const std::array<std::int64_t, 8> size{1, 1, c, h, w, h * w * c, stride, 2};
    const Address given = stride == 1 ? one : 0;  // what normalises
    std::vector<float> forward(depthwise_fanout_scratch(stencils, size, 0, false));
    std::vector<float> backward(depthwise_fanout_scratch(stencils, size, 0, true));
    depthwise_fanout(address(x), stencils, {address(taps), address(taps)}, {given, given, given, given},
                     all(maps, 0, 4), all(small, 0, 4), all(small, 4, 4), size, 1e-5, 0,
                     address(forward), 0);
    depthwise_fanout_backward(address(x), stencils, {address(taps), address(taps)},
                              {given, given, given, given}, all(gradients, 0, 4), all(maps, 0, 4), ones,
                              ones, ones, address(gx), all(taps_to, 0, 2),
                              {address(small[8]), address(small[9]), address(small[10]),
                               address(small[11])},
                              size, 1e-5, 0, address(backward), 0);
  }
}

void oks_nms_case() {
  constexpr std::int64_t n = 80, k = 3, words = 2;
  std::vector<double> points, areas(n, 100.0), sigmas(k, 0.05);
  for (std::int64_t i = 0; i < n * k * 2; ++i) points.push_back(static_cast<double>(i / 30));
  std::vector<std::int64_t> order, ends{45, 46, n};
  for (std::int64_t i = 0; i < n; ++i) order.push_back(i * 7 % n);
  std::vector<std::uint32_t> bits(n * words);
  std::vector<std::uint8_t> keep(n);
  for (const bool skip : {false, true}) {
    oks_nms(address(points), address(areas), address(sigmas), address(order), address(ends), 3, n,
            k, words, 0.3, skip, address(bits), address(keep), 0);
  }
}

}  // namespace
}  // namespace pnfs

int main(int, char** arguments) {
  const std::map<std::string, void (*)()> cases{
      {"block_sum", pnfs::block_sum},
      {"crop_normalize", pnfs::crop_normalize_case},
      {"depthwise_fanout", pnfs::depthwise_fanout_case},
      {"oks_nms", pnfs::oks_nms_case},
      {"stuck", pnfs::stuck},
  };
  cases.at(arguments[1])();
}
