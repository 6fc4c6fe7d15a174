// Vectors of the widest registers that the including file is compiled for, as GCC vector extensions.
// Included inside one file per SIMD level, compiled with that level's flags: everything here lives in its
// namespace.

#pragma once

#include <utility>

#include "checks.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace simmim_fast::SIMMIM_FAST_LEVEL {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kRegisters = 16;
#else
constexpr int kVectorBytes = 16, kRegisters = 16;
#endif

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  typedef T half __attribute__((vector_size(kVectorBytes / 2)));
};
template <typename T>
using Vec = typename VectorOf<T>::type;
template <typename T>
using HalfVec = typename VectorOf<T>::half;
template <typename T>
constexpr int64_t kLanes = kVectorBytes / sizeof(T);

template <typename T>
inline Vec<T> load(const T* from) {
  Vec<T> value;
  __builtin_memcpy(&value, from, sizeof(value));
  return value;
}

template <typename T>
inline void store(T* to, Vec<T> value) {
  __builtin_memcpy(to, &value, sizeof(value));
}

template <typename T>
inline HalfVec<T> load_half(const T* from) {
  HalfVec<T> value;
  __builtin_memcpy(&value, from, sizeof(value));
  return value;
}

template <typename T>
inline void store_half(T* to, HalfVec<T> value) {
  __builtin_memcpy(to, &value, sizeof(value));
}

template <typename T>
inline Vec<T> broadcast(T value) {
  return value - Vec<T>{};
}

template <typename T, size_t... kLane>
inline HalfVec<T> lower_half(Vec<T> value, std::index_sequence<kLane...>) {
  return __builtin_shufflevector(value, value, kLane...);
}

template <typename T>
inline HalfVec<T> lower_half(Vec<T> value) {
  return lower_half<T>(value, std::make_index_sequence<kLanes<T> / 2>{});
}

template <typename T>
inline Vec<T> maximum(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

// Elements of T as a vector of Sum, the dtype that they are computed in.
template <typename Sum, typename T>
inline Vec<Sum> widen(const T* from) {
  if constexpr (std::is_same_v<T, Sum>) {
    return load(from);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    HalfVec<uint16_t> bits;
    __builtin_memcpy(&bits, from, sizeof(bits));
    return (Vec<float>)(__builtin_convertvector(bits, Vec<uint32_t>) << 16);
  } else {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
    Vec<float> value;
    for (int64_t lane = 0; lane < kLanes<float>; ++lane) value[lane] = from[lane];
    return value;
#endif
  }
}

// The nearest bfloat16, in the lower half of each lane.
inline Vec<uint32_t> round_to_bfloat16(Vec<float> value) {
  const Vec<uint32_t> bits = (Vec<uint32_t>)value;
  const Vec<uint32_t> rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return value == value ? rounded : broadcast<uint32_t>(0x7FC0);
}

template <typename T, typename Sum>
inline void narrow(T* to, Vec<Sum> value) {
  if constexpr (std::is_same_v<T, Sum>) {
    store(to, value);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
#if defined(__AVX512BF16__)
    const auto half = _mm512_cvtneps_pbh(value);
#else
    const auto half = __builtin_convertvector(round_to_bfloat16(value), HalfVec<uint16_t>);
#endif
    __builtin_memcpy(to, &half, sizeof(half));
  } else {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int64_t lane = 0; lane < kLanes<float>; ++lane) to[lane] = T(value[lane]);
#endif
  }
}

// x * 2^n for an integer n from -160 to 0, also where the product is subnormal.
inline Vec<float> scale_by_power(Vec<float> x, Vec<float> n) {
#if defined(__AVX512F__)
  return _mm512_scalef_ps(x, n);
#else
  const Vec<int32_t> whole = __builtin_convertvector(n, Vec<int32_t>), half = whole >> 1;
  return x * (Vec<float>)((half + 127) << 23) * (Vec<float>)((whole - half + 127) << 23);
#endif
}

constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23: added, it leaves no fraction

// 2^(f + n) for |f| <= 1/2 and an integer n from -160 to 0, to 1.5 units in the last place. The polynomial is the
// minimax one of 2^f that is 1 at 0 (relative error 9.1e-8).
inline Vec<float> power_of_two(Vec<float> f, Vec<float> n) {
  Vec<float> power = f * 0.00132646524f + 0.00967151132f;
  power = power * f + 0.0555073396f;
  power = power * f + 0.240222421f;
  power = power * f + 0.693146978f;
  power = power * f + 1.0f;
  return scale_by_power(power, n);
}

// 2^x for x <= 0; NaN stays NaN.
inline Vec<float> exp2(Vec<float> x) {
#if defined(__AVX512F__)
  x = _mm512_max_ps(broadcast(-160.0f), x);  // the second operand where one of them is NaN
  const Vec<float> n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT);
#else
  x = x < -160.0f ? broadcast(-160.0f) : x;
  const Vec<float> n = (x + kToInteger) - kToInteger;
#endif
  return power_of_two(x - n, n);
}

inline Vec<double> exp2(Vec<double> x) {
  for (int64_t lane = 0; lane < kLanes<double>; ++lane) x[lane] = __builtin_exp2(x[lane]);
  return x;
}

// Exchanges the off-diagonal blocks of size kStep in each square of rows of size 2 kStep.
template <int kStep, typename T, size_t... kLane>
inline void exchange(Vec<T>* rows, std::index_sequence<kLane...>) {
  constexpr int kCount = sizeof...(kLane);
  for (int r = 0; r < kCount; ++r) {
    if (r & kStep) continue;
    const Vec<T> upper = rows[r], lower = rows[r + kStep];
    rows[r] = __builtin_shufflevector(upper, lower, (kLane & kStep ? kCount + kLane - kStep : kLane)...);
    rows[r + kStep] = __builtin_shufflevector(upper, lower, (kLane & kStep ? kCount + kLane : kLane + kStep)...);
  }
}

template <int kStep, typename T>
inline void transpose_square(Vec<T>* rows) {
  exchange<kStep, T>(rows, std::make_index_sequence<kLanes<T>>{});
  if constexpr (kStep > 1) transpose_square<kStep / 2, T>(rows);
}

// to[c][r] = from[r][c]. Both strides are multiples of the lanes; rows past `rows` count as 0.
template <typename T>
inline void transpose(const T* from, int64_t rows, int64_t from_stride, T* to, int64_t to_stride, int64_t columns) {
  constexpr int kSquare = kLanes<T>;
  for (int64_t row = 0; row < rows; row += kSquare)
    for (int64_t column = 0; column < columns; column += kSquare) {
      Vec<T> square[kSquare];
#pragma GCC unroll 16
      for (int r = 0; r < kSquare; ++r)
        square[r] = row + r < rows ? load(from + (row + r) * from_stride + column) : Vec<T>{};
      transpose_square<kSquare / 2, T>(square);
#pragma GCC unroll 16
      for (int c = 0; c < kSquare; ++c)
        if (column + c < columns) store(to + (column + c) * to_stride + row, square[c]);
    }
}

}  // namespace simmim_fast::SIMMIM_FAST_LEVEL
