// Greedy suppression by OKS: pnfs/kernels/oks_nms.py has the definition. Poses stand in walking
// order, the groups (images) one after the other. First a row of bits per pose, whom of the later
// members of its group it resembles; then one block walks each group through those bits.

#include "core/oks.h"
#include "cuda/launch.h"
#include "cuda/ops.h"

namespace pnfs {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 128;

struct Problem {
  const double* points;  // (n, K, 2)
  const double* areas;   // (n)
  const double* sigmas;  // (K)
  const std::int64_t* order;  // (n) the pose at each place of the walk
  const std::int64_t* ends;   // (groups) place after the last member
  std::int64_t groups, n, k, words;
  double threshold;
};

// The group that holds `place`: the first whose end lies beyond it.
__device__ std::int64_t group_of(const Problem& p, std::int64_t place) {
  std::int64_t low = 0, high = p.groups - 1;
  while (low < high) {
    const std::int64_t middle = (low + high) / 2;
    if (p.ends[middle] > place) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

__device__ std::int64_t group_start(const Problem& p, std::int64_t group) {
  return group == 0 ? 0 : p.ends[group - 1];
}

// A warp makes one word of one row: bit b of word v is the member 32v + b of the row's group. Words
// that hold no later member are never read and stay unwritten.
__global__ void __launch_bounds__(kThreads) similar_kernel(Problem p, std::uint32_t* bits) {
  const std::int64_t item = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarp;
  if (item >= p.n * p.words) return;
  const int lane = threadIdx.x % kWarp;
  const std::int64_t row = item / p.words, word = item - row * p.words;
  const std::int64_t group = group_of(p, row);
  const std::int64_t first = group_start(p, group) + word * kWarp;
  if (first >= p.ends[group] || first + kWarp <= row + 1) return;
  const std::int64_t other = first + lane;
  bool similar = false;
  if (other > row && other < p.ends[group]) {
    const std::int64_t i = p.order[row], j = p.order[other];
    similar = oks_exceeds(p.points + i * p.k * 2, p.points + j * p.k * 2,
                          (p.areas[i] + p.areas[j]) / 2, p.sigmas, p.k, p.threshold);
  }
  const std::uint32_t ballot = __ballot_sync(0xffffffffu, similar);
  if (lane == 0) bits[item] = ballot;
}

// A block (one warp) walks one group.
__global__ void __launch_bounds__(kWarp) walk_kernel(Problem p, const std::uint32_t* bits,
                                                     bool skip_after_removal, bool* keep) {
  const std::int64_t start = group_start(p, blockIdx.x), end = p.ends[blockIdx.x];
  for (std::int64_t i = start + threadIdx.x; i < end; i += kWarp) keep[i] = true;
  __syncthreads();
  for (std::int64_t i = start; i < end; ++i) {
    if (keep[i]) {  // every thread reads the same
      const std::uint32_t* row = bits + i * p.words;
      const auto similar = [&](std::int64_t j) {
        return (row[(j - start) / kWarp] >> ((j - start) % kWarp) & 1u) != 0;
      };
      if (!skip_after_removal) {
        for (std::int64_t j = i + 1 + threadIdx.x; j < end; j += kWarp) {
          if (similar(j)) keep[j] = false;
        }
      } else if (threadIdx.x == 0) {
        bool skip = false;
        for (std::int64_t j = i + 1; j < end; ++j) {
          if (!keep[j]) continue;
          skip = !skip && similar(j);
          keep[j] = !skip;
        }
      }
    }
    __syncthreads();
  }
}

}  // namespace

void oks_nms(Address points, Address areas, Address sigmas, Address order, Address ends,
             std::int64_t groups, std::int64_t n, std::int64_t k, std::int64_t words,
             double threshold, bool skip_after_removal, Address bits, Address keep,
             Address stream) {
  if (n == 0) return;
  const Problem p{reinterpret_cast<const double*>(points),
                  reinterpret_cast<const double*>(areas),
                  reinterpret_cast<const double*>(sigmas),
                  reinterpret_cast<const std::int64_t*>(order),
                  reinterpret_cast<const std::int64_t*>(ends),
                  groups,
                  n,
                  k,
                  words,
                  threshold};
  auto* bit_rows = reinterpret_cast<std::uint32_t*>(bits);
  const unsigned blocks = blocks_for(n * words * kWarp, kThreads);
  PNFS_LAUNCH(similar_kernel, blocks, kThreads, 0, stream, p, bit_rows);
  PNFS_LAUNCH(walk_kernel, blocks_for(groups, 1), kWarp, 0, stream, p, bit_rows, skip_after_removal,
              reinterpret_cast<bool*>(keep));
}

}  // namespace pnfs
