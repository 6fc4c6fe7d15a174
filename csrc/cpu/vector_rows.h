// Rows of any length as vectors, the last of which may be a part.
// Included inside one file per SIMD level, as vector.h.

#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/vector.h"

namespace simmim_fast::SIMMIM_FAST_LEVEL {
namespace {

// Up to a vector of the n elements that are left, 0 past them.
template <typename T>
inline Vec<Accumulator<T>> widen_part(const T* from, int64_t n) {
  using Sum = Accumulator<T>;
  if (n >= kLanes<Sum>) return widen<Sum>(from);
  T part[kLanes<Sum>] = {};
  std::copy_n(from, n, part);
  return widen<Sum>(static_cast<const T*>(part));
}

template <typename T>
inline void narrow_part(T* to, Vec<Accumulator<T>> value, int64_t n) {
  using Sum = Accumulator<T>;
  if (n >= kLanes<Sum>) return narrow<T, Sum>(to, value);
  T part[kLanes<Sum>];
  narrow<T, Sum>(part, value);
  std::copy_n(part, n, to);
}

template <typename Sum>
inline Sum sum_lanes(Vec<Sum> value) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<Sum, float>)
    return _mm512_reduce_add_ps(value);
  else
    return _mm512_reduce_add_pd(value);
#else
  Sum sum = 0;
  for (int64_t lane = 0; lane < kLanes<Sum>; ++lane) sum += value[lane];
  return sum;
#endif
}

// Calls f(c, n) for each vector of a row of `count` elements: from element c on, n of them. n is a constant but in the
// last call, so that whole vectors are loaded and stored without a branch.
template <typename Sum, typename F>
inline void over_row(int64_t count, F&& f) {
  constexpr int64_t kWhole = kLanes<Sum>;
  const int64_t whole = count / kWhole * kWhole;
  for (int64_t c = 0; c < whole; c += kWhole) f(c, std::integral_constant<int64_t, kWhole>{});
  if (whole < count) f(whole, count - whole);
}

}  // namespace
}  // namespace simmim_fast::SIMMIM_FAST_LEVEL
