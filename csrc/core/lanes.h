// Sixteen float32 lanes, in the vector extensions of gcc and clang: one AVX-512 register, two AVX
// ones, or whatever the target has. For the CPU.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/dtypes.h"

namespace pnfs {

constexpr std::int64_t kLanes = 16;

typedef float FloatLanes __attribute__((vector_size(kLanes * sizeof(float))));
typedef std::int32_t IntLanes __attribute__((vector_size(kLanes * sizeof(std::int32_t))));
typedef std::uint32_t WordLanes __attribute__((vector_size(kLanes * sizeof(std::uint32_t))));
typedef std::uint16_t HalfWordLanes __attribute__((vector_size(kLanes * sizeof(std::uint16_t))));

inline IntLanes lane_numbers() {
  return IntLanes{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
}

inline FloatLanes reversed(FloatLanes v) {
  return __builtin_shufflevector(v, v, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
}

// Lane i is element index[i] of the 32 in `low` and `high`.
inline FloatLanes select(FloatLanes low, FloatLanes high, IntLanes index) {
#if defined(__clang__)  // has no shuffle by variable indices
  float both[2 * kLanes];
  std::memcpy(both, &low, sizeof low);
  std::memcpy(both + kLanes, &high, sizeof high);
  FloatLanes v;
  for (int lane = 0; lane < kLanes; ++lane) v[lane] = both[index[lane]];
  return v;
#else
  return __builtin_shuffle(low, high, index);
#endif
}

inline FloatLanes as_floats(WordLanes bits) {
  FloatLanes v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

inline WordLanes half_words(const void* address) {
  HalfWordLanes bits;
  std::memcpy(&bits, address, sizeof bits);
  return __builtin_convertvector(bits, WordLanes);
}

// Sixteen adjacent elements of storage; no alignment is needed.
inline FloatLanes load_lanes(const float* address) {
  FloatLanes v;
  std::memcpy(&v, address, sizeof v);
  return v;
}

inline FloatLanes load_lanes(const BFloat16* address) {
  return as_floats(half_words(address) << 16);
}

inline FloatLanes load_lanes(const Float16* address) {
  const WordLanes bits = half_words(address), magnitude = bits & 0x7fffu;
  // In a float's place the exponent is short by 112; the product makes subnormals right as well.
  const FloatLanes finite = as_floats(magnitude << 13) * bits_float(0x77800000u);
  WordLanes result;
  std::memcpy(&result, &finite, sizeof result);
  result = magnitude >= 0x7c00u ? (magnitude << 13) | 0x7f800000u : result;  // infinity and NaN
  return as_floats(result | (bits & 0x8000u) << 16);
}

inline WordLanes as_words(FloatLanes v) {
  WordLanes bits;
  std::memcpy(&bits, &v, sizeof v);
  return bits;
}

// Sixteen adjacent elements of storage, rounded as from_float does.
inline void store_lanes(float* address, FloatLanes v) { std::memcpy(address, &v, sizeof v); }

inline void store_lanes(BFloat16* address, FloatLanes v) {
  const WordLanes bits = as_words(v);
  const WordLanes rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const WordLanes result = (bits & 0x7fffffffu) > 0x7f800000u ? WordLanes{} + 0x7fc0u : rounded;
  const HalfWordLanes words = __builtin_convertvector(result, HalfWordLanes);
  std::memcpy(address, &words, sizeof words);
}

inline void store_lanes(Float16* address, FloatLanes v) {
  for (int lane = 0; lane < kLanes; ++lane) address[lane] = from_float<Float16>(v[lane]);
}

}  // namespace pnfs
