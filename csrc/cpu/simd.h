// Vectors of PNFS_LANES float32 lanes: 16 for AVX-512, 8 for AVX2, 4 for whatever the target has.
//
// One source is compiled several times, once per instruction set, and the binaries live in one
// module. So whatever such a source includes has internal linkage: a function with external linkage
// would exist in several copies, of which the linker keeps any one, also one that the CPU cannot
// run. That excludes the standard library's templates and most of csrc/core.
#pragma once

#if !defined(PNFS_LANES)
#error "define PNFS_LANES before including cpu/simd.h"
#endif

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "core/dtypes.h"  // the storage types only

#define PNFS_INLINE_MEMBER inline __attribute__((always_inline))
#define PNFS_INLINE static PNFS_INLINE_MEMBER

namespace pnfs {
namespace {

constexpr int kWidth = PNFS_LANES;

typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef std::int32_t IntVec __attribute__((vector_size(kWidth * 4)));
typedef std::uint32_t WordVec __attribute__((vector_size(kWidth * 4)));
typedef std::uint16_t HalfVec __attribute__((vector_size(kWidth * 2)));

template <class To, class From>
PNFS_INLINE To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

PNFS_INLINE std::int64_t round_up(std::int64_t value, std::int64_t step) {
  return (value + step - 1) / step * step;
}

PNFS_INLINE std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
PNFS_INLINE std::int64_t larger(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

// kWidth adjacent elements of storage; no alignment is needed.
PNFS_INLINE Vec load(const float* from) {
  Vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

PNFS_INLINE Vec load(const BFloat16* from) {
  HalfVec bits;
  std::memcpy(&bits, from, sizeof bits);
  return same_bits<Vec>(__builtin_convertvector(bits, WordVec) << 16);
}

// To storage: rounds to nearest, ties to even; NaN stays NaN.
PNFS_INLINE HalfVec round_to_bfloat16(Vec v) {
  const WordVec bits = same_bits<WordVec>(v);
  const WordVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const WordVec safe = (bits & 0x7fffffffu) > 0x7f800000u ? WordVec{} + 0x7fc0u : rounded;
  return __builtin_convertvector(safe, HalfVec);
}

PNFS_INLINE void store(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }

PNFS_INLINE void store(BFloat16* to, Vec v) {
  const HalfVec half = round_to_bfloat16(v);
  std::memcpy(to, &half, sizeof half);
}

// Store past the caches, for results that are larger than these: the line is not read before it is
// written. `to` is aligned to the vector. After the last one, finish_streams() before other threads
// may read.
#if defined(__AVX512F__) && PNFS_LANES == 16
PNFS_INLINE void stream(float* to, Vec v) { _mm512_stream_ps(to, same_bits<__m512>(v)); }
PNFS_INLINE void stream(BFloat16* to, Vec v) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), same_bits<__m256i>(round_to_bfloat16(v)));
}
PNFS_INLINE void finish_streams() { _mm_sfence(); }
#elif defined(__AVX__) && PNFS_LANES == 8
PNFS_INLINE void stream(float* to, Vec v) { _mm256_stream_ps(to, same_bits<__m256>(v)); }
PNFS_INLINE void stream(BFloat16* to, Vec v) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), same_bits<__m128i>(round_to_bfloat16(v)));
}
PNFS_INLINE void finish_streams() { _mm_sfence(); }
#else
template <class T>
PNFS_INLINE void stream(T* to, Vec v) {
  store(to, v);
}
PNFS_INLINE void finish_streams() {}
#endif

// The first `count` lanes, the others 0; and the first `count` lanes alone are written. None for a
// count below 1.
template <class T>
PNFS_INLINE Vec load_part(const T* from, std::int64_t count) {
  if (count >= kWidth) return load(from);
  T whole[kWidth] = {};
  if (count > 0) std::memcpy(whole, from, static_cast<std::size_t>(count) * sizeof(T));
  return load(whole);
}

template <class T>
PNFS_INLINE void store_part(T* to, Vec v, std::int64_t count) {
  if (count >= kWidth) return store(to, v);
  T whole[kWidth];
  store(whole, v);
  if (count > 0) std::memcpy(to, whole, static_cast<std::size_t>(count) * sizeof(T));
}

PNFS_INLINE Vec fill(float value) { return value - Vec{}; }

// NaN stays NaN, as in torch.
PNFS_INLINE Vec relu(Vec v) { return 0.0f > v ? Vec{} : v; }

}  // namespace
}  // namespace pnfs
