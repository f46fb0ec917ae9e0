// How kernels walk the channels of a pixel, vector by vector: what those of one instruction set share,
// with internal linkage, see simd.h.
#pragma once

#include "cpu/mix.h"  // kGroup
#include "cpu/simd.h"

namespace pnfs {
namespace {

template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};

// The lanes of a vector that are channels: all of them, or `count` at the end of a pixel.
struct AllLanes {
  template <class T>
  PNFS_INLINE_MEMBER Vec get(const T* from) const { return load(from); }
  template <class T>
  PNFS_INLINE_MEMBER void put(T* to, Vec v) const { store(to, v); }
  template <bool kStream, class T>
  PNFS_INLINE_MEMBER void put_out(T* to, Vec v) const {
    if constexpr (kStream) {
      stream(to, v);
    } else {
      store(to, v);
    }
  }
};

struct SomeLanes {
  std::int64_t count;
  template <class T>
  PNFS_INLINE_MEMBER Vec get(const T* from) const { return load_part(from, count); }
  template <class T>
  PNFS_INLINE_MEMBER void put(T* to, Vec v) const { store_part(to, v, count); }
  template <bool kStream, class T>
  PNFS_INLINE_MEMBER void put_out(T* to, Vec v) const { store_part(to, v, count); }
};

// Calls visit(c, group, lane, lanes) for vectors of channels that cover a pixel: from channel c, lane
// `lane` of the group that begins at `group`.
template <class Visit>
PNFS_INLINE void for_lanes(std::int64_t channels, const Visit& visit) {
  std::int64_t group = 0;
  for (; group + kGroup <= channels; group += kGroup) {
    for (std::int64_t lane = 0; lane < kGroup; lane += kWidth) {
      visit(group + lane, group, lane, AllLanes{});
    }
  }
  for (std::int64_t lane = 0; group + lane < channels; lane += kWidth) {
    visit(group + lane, group, lane, SomeLanes{channels - group - lane});
  }
}

}  // namespace
}  // namespace pnfs
