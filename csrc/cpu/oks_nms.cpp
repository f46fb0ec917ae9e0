// Greedy suppression by OKS: pnfs/kernels/oks_nms.py has the definition. A similarity is computed
// only when the walk asks for it, so most pairs never are.

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "core/oks.h"
#include "cpu/ops.h"

namespace pnfs {
namespace {

struct Poses {
  const double* points;  // (n, K, 2)
  const double* scores;  // (n), no NaN
  const double* areas;   // (n)
  const double* sigmas;  // (K)
  int64_t k;
  double threshold;

  bool similar(int64_t i, int64_t j) const {
    return oks_exceeds(points + i * k * 2, points + j * k * 2, (areas[i] + areas[j]) / 2, sigmas, k,
                       threshold);
  }
};

// Clears alive[r] of every member r that an earlier one removes; members are in walking order.
void suppress(const Poses& poses, const int64_t* members, int64_t count, bool skip_after_removal,
              char* alive) {
  for (int64_t i = 0; i < count; ++i) {
    if (!alive[i]) continue;
    bool skip = false;
    for (int64_t j = i + 1; j < count; ++j) {
      if (!alive[j]) continue;
      const bool removed = !skip && poses.similar(members[i], members[j]);
      alive[j] = !removed;
      skip = removed && skip_after_removal;
    }
  }
}

}  // namespace

int64_t oks_nms(uintptr_t points, uintptr_t scores, uintptr_t areas, uintptr_t sigmas,
                uintptr_t groups_address, uintptr_t keep_address, int64_t n, int64_t k,
                double threshold, bool skip_after_removal) {
  const Poses poses{reinterpret_cast<const double*>(points),
                    reinterpret_cast<const double*>(scores),
                    reinterpret_cast<const double*>(areas),
                    reinterpret_cast<const double*>(sigmas),
                    k,
                    threshold};
  const auto* groups = reinterpret_cast<const int64_t*>(groups_address);
  auto* keep = reinterpret_cast<int64_t*>(keep_address);

  std::vector<int64_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), int64_t{0});
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    if (groups != nullptr && groups[a] != groups[b]) return groups[a] < groups[b];
    if (poses.scores[a] != poses.scores[b]) return poses.scores[a] > poses.scores[b];
    return a < b;
  });
  std::vector<int64_t> starts{0};  // where each group begins in `order`, and the end
  for (int64_t i = 1; i < n; ++i) {
    if (groups != nullptr && groups[order[i]] != groups[order[i - 1]]) starts.push_back(i);
  }
  starts.push_back(n);

  std::vector<char> alive(static_cast<size_t>(n), 1);
  const int64_t group_count = static_cast<int64_t>(starts.size()) - 1;
#pragma omp parallel for schedule(dynamic, 16) if (group_count > 64)
  for (int64_t g = 0; g < group_count; ++g) {
    suppress(poses, order.data() + starts[g], starts[g + 1] - starts[g], skip_after_removal,
             alive.data() + starts[g]);
  }
  int64_t kept = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (alive[i]) keep[kept++] = order[i];
  }
  return kept;
}

}  // namespace pnfs
