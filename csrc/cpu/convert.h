// bfloat16 to float32 and back in integer arithmetic, which the compiler turns into vectors.
// Included inside one file per SIMD level, as vector.h.

#pragma once

#include <cstdint>
#include <cstring>

#include "checks.h"

namespace simmim_fast::SIMMIM_FAST_LEVEL {

// The value in the type in which it is summed: float32, or float64 for float64.
template <typename T>
inline __attribute__((always_inline)) Accumulator<T> widen(T value) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const uint32_t bits = uint32_t(value.x) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof(wide));
    return wide;
  } else {
    return Accumulator<T>(value);
  }
}

// Rounded to nearest even.
template <typename T>
inline __attribute__((always_inline)) T narrow(Accumulator<T> value) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    return BFloat16(uint16_t(is_nan ? 0x7fc0 : rounded), BFloat16::from_bits());
  } else {
    return T(value);
  }
}

}  // namespace simmim_fast::SIMMIM_FAST_LEVEL
