// What the operator bias_gelu and the kernels of each SIMD level share. Formulas: simmim_fast/ops/bias_gelu.

#pragma once

#include <algorithm>

#include "checks.h"
#include "cpu/simd.h"
#include "integers.h"

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
  T* out;                      // (rows, channels) or null: the forward's result
  Accumulator<T>* partials;    // (chunks, channels) or null: sums of grad_x before it is rounded
  int64_t rows;
  int64_t channels;

  // Rows that one unit adds up; by the shape alone, so that sums repeat.
  int64_t chunk_rows() const { return std::clamp<int64_t>(32768 / channels, 16, 256); }
  int64_t chunks() const { return ceil_div(rows, chunk_rows()); }
};

template <typename T>
struct Kernels {
  void (*forward)(const ForwardArgs<T>& args, int64_t begin, int64_t end);    // rows [begin, end)
  void (*backward)(const BackwardArgs<T>& args, int64_t begin, int64_t end);  // chunks

  template <Simd kAt>
  static Kernels at();
};

}  // namespace simmim_fast::bias_gelu
