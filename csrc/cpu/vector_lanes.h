// Four, eight or sixteen float32 at a time, from and to storage; squared lengths of vectors whose
// components are adjacent. For vector_maps.h.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "core/dtypes.h"
#include "core/lanes.h"

namespace pnfs {
namespace {

typedef float Quad __attribute__((vector_size(16)));
typedef float Octet __attribute__((vector_size(32)));

constexpr std::int64_t kQuad = 4;
constexpr std::int64_t kOctet = 8;

// Integers as wide as the floats of a vector type, and half as wide.
template <class Floats>
struct Bits {
  typedef std::uint32_t Words __attribute__((vector_size(sizeof(Floats))));
  typedef std::uint16_t Halves __attribute__((vector_size(sizeof(Floats) / 2)));
};

// A Quad, an Octet or FloatLanes from adjacent elements; no alignment is needed.
template <class Floats>
inline Floats load_floats(const float* address) {
  Floats v;
  std::memcpy(&v, address, sizeof v);
  return v;
}

template <class Floats>
inline Floats load_floats(const BFloat16* address) {
  typename Bits<Floats>::Halves half;
  std::memcpy(&half, address, sizeof half);
  const auto bits = __builtin_convertvector(half, typename Bits<Floats>::Words) << 16;
  Floats v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

// Rounds as from_float<BFloat16> does.
template <class Floats>
inline typename Bits<Floats>::Halves rounded_to_bfloat16(Floats v) {
  typename Bits<Floats>::Words bits;
  std::memcpy(&bits, &v, sizeof bits);
  const auto is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  bits = is_nan ? bits | 0x7fc00000u : bits + 0x7fffu + ((bits >> 16) & 1u);
  return __builtin_convertvector(bits >> 16, typename Bits<Floats>::Halves);
}

template <class Floats>
inline void store_floats(float* address, Floats v) {
  std::memcpy(address, &v, sizeof v);
}

template <class Floats>
inline void store_floats(BFloat16* address, Floats v) {
  const auto half = rounded_to_bfloat16(v);
  std::memcpy(address, &half, sizeof half);
}

// Past the caches, where the processor can; the address is a multiple of the size of what is stored.
inline void stream_octet(float* address, Octet v) {
#if defined(__AVX__)
  _mm256_stream_ps(address, (__m256)v);
#else
  store_floats(address, v);
#endif
}

inline void stream_octet(BFloat16* address, Octet v) {
#if defined(__SSE2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(address), (__m128i)rounded_to_bfloat16(v));
#else
  store_floats(address, v);
#endif
}

template <bool kStream, class T>
inline void store_octet(T* address, Octet v) {
  kStream ? stream_octet(address, v) : store_floats(address, v);
}

template <bool kStream, class T>
inline void store_lanes(T* address, FloatLanes v) {
  if (!kStream) return store_floats(address, v);
  stream_octet(address, __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7));
  stream_octet(address + kOctet, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
}

inline void finish_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Sums of adjacent pairs: of `a` and then of `b` within each half of the lanes.
inline Octet pair_sums(Octet a, Octet b) {
  return __builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14) +
         __builtin_shufflevector(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
}

// Squared lengths of eight vectors of d components, `step` elements apart. kDepth is d, or 0.
template <int kDepth, class T>
inline Octet squared_lengths(const T* first, std::int64_t step, std::int64_t d) {
  Octet sums[kOctet];
  if constexpr (kDepth == 4) {  // two vectors in one octet: pixel i and pixel i + 4
    for (int i = 0; i < 4; ++i) {
      const Quad a = load_floats<Quad>(first + i * step);
      const Quad b = load_floats<Quad>(first + (i + 4) * step);
      const Octet v = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7);
      sums[i] = v * v;
    }
    return pair_sums(pair_sums(sums[0], sums[1]), pair_sums(sums[2], sums[3]));
  } else {
    const std::int64_t depth = kDepth == 0 ? d : kDepth, whole = depth / kOctet * kOctet;
    const T* v = first;
    for (int i = 0; i < kOctet; ++i, v += step) {
      sums[i] = Octet{};
      for (std::int64_t c = 0; c < whole; c += kOctet) {
        const Octet part = load_floats<Octet>(v + c);
        sums[i] += part * part;
      }
      if (kDepth == 0 && whole < depth) {
        T rest[kOctet] = {};
        std::memcpy(rest, v + whole, static_cast<std::size_t>(depth - whole) * sizeof(T));
        const Octet part = load_floats<Octet>(rest);
        sums[i] += part * part;
      }
    }
    const Octet low = pair_sums(pair_sums(sums[0], sums[1]), pair_sums(sums[2], sums[3]));
    const Octet high = pair_sums(pair_sums(sums[4], sums[5]), pair_sums(sums[6], sums[7]));
    return __builtin_shufflevector(low, high, 0, 1, 2, 3, 8, 9, 10, 11) +
           __builtin_shufflevector(low, high, 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

}  // namespace
}  // namespace pnfs
