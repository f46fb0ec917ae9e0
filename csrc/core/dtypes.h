// Storage types. Everything is computed in float32; these convert on load and store.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "core/macros.h"

namespace pnfs {

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

PNFS_HOST_DEVICE inline std::uint32_t float_bits(float value) {
  std::uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

PNFS_HOST_DEVICE inline float bits_float(std::uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// To storage: round to nearest, ties to even, as torch does. NaN stays NaN.
template <class T>
PNFS_HOST_DEVICE inline T from_float(float value);

template <>
PNFS_HOST_DEVICE inline float from_float<float>(float value) {
  return value;
}

template <>
PNFS_HOST_DEVICE inline BFloat16 from_float<BFloat16>(float value) {
  const std::uint32_t bits = float_bits(value);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<std::uint16_t>(is_nan ? 0x7fc0u : rounded)};
}

template <>
PNFS_HOST_DEVICE inline Float16 from_float<Float16>(float value) {
  const std::uint32_t bits = float_bits(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  // Normal half: move the exponent's bias from 127 to 15 and round the 13 dropped bits.
  const std::uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 0.5 lets the float unit align and round to a multiple of 2^-24.
  const std::uint32_t tiny = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  std::uint32_t half = magnitude < 0x38800000u ? tiny : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and above round to infinity
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return {static_cast<std::uint16_t>(sign | half)};
}

template <class T>
PNFS_HOST_DEVICE inline float to_float(T value);

template <>
PNFS_HOST_DEVICE inline float to_float<float>(float value) {
  return value;
}

template <>
PNFS_HOST_DEVICE inline float to_float<BFloat16>(BFloat16 value) {
  return bits_float(static_cast<std::uint32_t>(value.bits) << 16);
}

template <>
PNFS_HOST_DEVICE inline float to_float<Float16>(Float16 value) {
  const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude >= 0x400u) return bits_float(sign | ((magnitude << 13) + 0x38000000u));
  // Subnormal: a multiple of 2^-24.
  return bits_float(sign | float_bits(static_cast<float>(magnitude) * 5.9604644775390625e-8f));
}

template <class T>
PNFS_HOST_DEVICE inline float load(const T* address) {
  return to_float(*address);
}

// Calls `visit` with a value of the storage type that `code` names (see DTYPE_CODES in
// pnfs/kernels/checks.py); its type is what counts.
template <class Visit>
void dispatch_dtype(int code, Visit visit) {
  switch (code) {
    case 0: return visit(float{});
    case 1: return visit(BFloat16{});
    case 2: return visit(Float16{});
    default: throw std::invalid_argument("unknown dtype code");
  }
}

}  // namespace pnfs
