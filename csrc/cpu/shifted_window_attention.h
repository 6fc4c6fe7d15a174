// What the operator and the kernels of each SIMD level share. Formulas: simmim_fast/ops/shifted_window_attention.
// Shapes: tokens N of a window, queries M of a window (N, or the chosen ones), head size D, C = heads * D.

#pragma once

#include "checks.h"
#include "cpu/simd.h"
#include "integers.h"
#include "window.h"

namespace simmim_fast::shifted_window_attention {

constexpr int64_t kHeadsPerUnit = 4;  // heads that one unit of work covers
constexpr double kLog2E = 1.4426950408889634;
constexpr int64_t kChunkWindows = 8;  // windows, of any images, whose sums one unit of the backward adds up

template <typename T>
struct Args {
  using Sum = Accumulator<T>;

  WindowGrid grid;
  int64_t images, heads, head_size;
  const T* qkv;                // (images, height * width, 3C)
  const T* pad_row;            // (3C) what padding holds
  const Sum* bias;             // (heads, N, bias_stride) by key and query, times log2(e)
  int64_t bias_stride;         // N rounded up to whole vectors
  const Sum* factors;          // (heads) of the logits
  bool cosine;                 // whether queries and keys are normalised
  const int32_t* query_slots;  // (images, queries) or null: all
  int64_t queries;             // M

  int64_t windows() const { return images * grid.windows(); }
  int64_t head_units() const { return ceil_div(heads, kHeadsPerUnit); }
};

template <typename T>
struct ForwardArgs : Args<T> {
  T* out;  // (images, height * width or M, C)

  int64_t units() const { return this->windows() * this->head_units(); }
};

// Sums over windows are kept per chunk: (chunks, ...), 0 at first. Null where they are not wanted.
template <typename T>
struct BackwardArgs : Args<T> {
  using Sum = Accumulator<T>;

  const T* grad_out;           // as out
  T* grad_qkv;                 // as qkv
  Sum* table_sums = nullptr;   // (chunks, heads, table rows)
  Sum* factor_sums = nullptr;  // (chunks, heads): gradients of log(factor)
  Sum* pad_sums = nullptr;     // (chunks, 3C)

  int64_t chunks() const { return ceil_div(this->windows(), kChunkWindows); }
  int64_t units() const { return chunks() * this->head_units(); }
};

template <typename T>
struct Kernels {
  int64_t lanes;                                                            // of a vector of Sum
  void (*forward)(const ForwardArgs<T>& args, int64_t begin, int64_t end);  // units [begin, end)
  void (*backward)(const BackwardArgs<T>& args, int64_t begin, int64_t end);

  template <Simd kAt>
  static Kernels at();
};

}  // namespace simmim_fast::shifted_window_attention
