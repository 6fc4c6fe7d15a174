// What the operator biased_attention and the kernels of each SIMD level share. Formulas:
// simmim_fast/ops/biased_attention. Shapes: N tokens of an image, R rows (its tokens, or its queries), head size D,
// C = heads * D.

#pragma once

#include "checks.h"
#include "cpu/simd.h"
#include "integers.h"

namespace simmim_fast::biased_attention {

constexpr int64_t kChunkImages = 4;  // images whose gradients of the bias one unit of the backward adds up
constexpr double kLog2E = 1.4426950408889634;

template <typename T>
struct Args {
  using Sum = Accumulator<T>;

  int64_t images, tokens, rows, heads, head_size;
  Sum scale;
  const T* qkv;     // (images, N, 3C)
  const Sum* bias;  // (heads, N, key_stride), times log2(e), -inf past the last key; (key_stride) without a bias
  bool has_bias;
  int64_t key_stride;      // N rounded up to whole vectors
  const int32_t* queries;  // (images, R) or null: all

  int64_t channels() const { return heads * head_size; }
};

template <typename T>
struct ForwardArgs : Args<T> {
  T* out;                             // (images, R, C)
  typename ForwardArgs<T>::Sum* lse;  // (images, heads, R), natural logarithms

  int64_t units() const { return this->images * this->heads; }
};

template <typename T>
struct BackwardArgs : Args<T> {
  const T* grad_out;                         // (images, R, C)
  const T* out;                              // (images, R, C)
  const typename BackwardArgs<T>::Sum* lse;  // (images, heads, R)
  T* grad_qkv;                               // (images, N, 3C)
  typename BackwardArgs<T>::Sum* bias_sums;  // (chunks, heads, N, key_stride) or null

  int64_t chunks() const { return ceil_div(this->images, kChunkImages); }
  int64_t units() const { return chunks() * this->heads; }
};

template <typename T>
struct Kernels {
  int64_t lanes;                                                            // of a vector of Sum
  void (*forward)(const ForwardArgs<T>& args, int64_t begin, int64_t end);  // units [begin, end)
  void (*backward)(const BackwardArgs<T>& args, int64_t begin, int64_t end);

  template <Simd kAt>
  static Kernels at();
};

}  // namespace simmim_fast::biased_attention
