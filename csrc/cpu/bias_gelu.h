// What the operator bias_gelu and the kernels of each SIMD level share. Formulas: simmim_fast/ops/bias_gelu.

#pragma once

#include <algorithm>

#include "checks.h"
#include "cpu/simd.h"

namespace simmim_fast::bias_gelu {

template <typename T>
struct ForwardArgs {
  const T* x;                  // (rows, channels)
  const Accumulator<T>* bias;  // (channels)
  T* out;                      // (rows, channels)
  int64_t channels;
};

template <typename T>
struct BackwardArgs {
  const T* grad_out;           // (rows, channels)
  const T* x;                  // (rows, channels)
  const Accumulator<T>* bias;  // (channels)
  T* grad_x;                   // (rows, channels) or null
  Accumulator<T>* partials;    // (chunks, channels) or null: sums of grad_x before it is rounded
  int64_t rows;
  int64_t channels;

  // Rows that one unit adds up; by the shape alone, so that sums repeat.
  int64_t chunk_rows() const { return std::clamp<int64_t>(32768 / channels, 16, 256); }
  int64_t chunks() const { return (rows + chunk_rows() - 1) / chunk_rows(); }
};

template <typename T>
struct Kernels {
  void (*forward)(const ForwardArgs<T>& args, int64_t begin, int64_t end);    // rows [begin, end)
  void (*backward)(const BackwardArgs<T>& args, int64_t begin, int64_t end);  // chunks
};

}  // namespace simmim_fast::bias_gelu

// Compiled once per level, in files of their own.
#define SIMMIM_FAST_DECLARE_LEVEL(level)     \
  namespace simmim_fast::level {             \
  template <typename T>                      \
  bias_gelu::Kernels<T> bias_gelu_kernels(); \
  }
SIMMIM_FAST_DECLARE_LEVEL(baseline)
#if SIMMIM_FAST_HAS_SIMD
SIMMIM_FAST_DECLARE_LEVEL(avx2)
SIMMIM_FAST_DECLARE_LEVEL(avx512)
SIMMIM_FAST_DECLARE_LEVEL(avx512_bf16)
#endif
#undef SIMMIM_FAST_DECLARE_LEVEL
