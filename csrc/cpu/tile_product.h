// Products of small matrices that lie in the first-level cache, one block of the result in registers at a time.
// Included inside one file per SIMD level, as vector.h.
//
// Two kinds of arithmetic. Numbers: operands are float32 or float64. Pairs: operands are pairs of bfloat16 in 32 bits,
// multiplied and added two by two into float32 (VDPBF16PS), so that sums run over half as many operands.

#pragma once

#include "cpu/vector.h"

namespace simmim_fast::SIMMIM_FAST_LEVEL {

template <typename T>
struct Numbers {
  using Sum = Accumulator<T>;
  using Operand = Sum;
  static constexpr int64_t kPer = 1;  // numbers in one operand

  static void multiply_add(Vec<Sum>& sum, Operand a, Vec<Operand> b) { sum += a * b; }
};

#if defined(__AVX512BF16__)
struct Pairs {
  using Sum = float;
  using Operand = uint32_t;
  static constexpr int64_t kPer = 2;

  static void multiply_add(Vec<float>& sum, uint32_t a, Vec<uint32_t> b) {
    sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b);
  }
};
#endif

// c[m][n] = sum over k of a(m, k) b[k][n], with a(m, k) = a[m * a_stride + k], or a[k * a_stride + m] where transposed.
template <class Math>
struct Product {
  const typename Math::Operand* a;
  int64_t a_stride;
  const typename Math::Operand* b;
  int64_t b_stride;
  typename Math::Sum* c;
  int64_t c_stride;
  int64_t rows, vectors, depth;  // rows and vectors of c, operands along k
  bool add = false;              // to what is in c
};

template <class Math, bool kTransposed, int64_t kStride>
struct Multiply {
  using Operand = typename Math::Operand;
  using Sum = typename Math::Sum;

  template <int kRows, int kVectors>
  static void block(const Product<Math>& p, int64_t row, int64_t vector) {
    const int64_t a_stride = kStride ? kStride : p.a_stride;
    const Operand* a = p.a + (kTransposed ? row : row * a_stride);
    const Operand* b = p.b + vector * kLanes<Operand>;
    Sum* c = p.c + row * p.c_stride + vector * kLanes<Sum>;
    Vec<Sum> sums[kRows][kVectors] = {};
    if (p.add)
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[r][v] = load(c + r * p.c_stride + v * kLanes<Sum>);
    for (int64_t k = 0; k < p.depth; ++k, a += kTransposed ? a_stride : 1, b += p.b_stride) {
      Vec<Operand> columns[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) columns[v] = load(b + v * kLanes<Operand>);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Operand factor = a[kTransposed ? r : r * a_stride];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) Math::multiply_add(sums[r][v], factor, columns[v]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) store(c + r * p.c_stride + v * kLanes<Sum>, sums[r][v]);
  }

  template <int kRows, int kVectors>
  static void all_rows(const Product<Math>& p, int64_t row, int64_t vector) {
    for (; row + kRows <= p.rows; row += kRows) block<kRows, kVectors>(p, row, vector);
    if constexpr (kRows > 1)
      if (row < p.rows) all_rows<kRows / 2, kVectors>(p, row, vector);
  }
};

// kStride is a_stride where it is known when compiling, which is faster, else 0. Blocks have as many rows as the
// registers hold beside the vectors of b.
template <class Math, bool kTransposed, int64_t kStride>
void multiply(const Product<Math>& p) {
  using Blocks = Multiply<Math, kTransposed, kStride>;
  constexpr bool kMany = kRegisters == 32;
  constexpr int64_t kWidest = kMany ? 4 : 3;
  for (int64_t vector = 0; vector < p.vectors;) {
    const int64_t left = p.vectors - vector, parts = (left + kWidest - 1) / kWidest, width = (left + parts - 1) / parts;
    if (width == 1) Blocks::template all_rows<kMany ? 12 : 8, 1>(p, 0, vector);
    if (width == 2) Blocks::template all_rows<kMany ? 12 : 6, 2>(p, 0, vector);
    if (width == 3) Blocks::template all_rows<kMany ? 6 : 3, 3>(p, 0, vector);
    if constexpr (kMany)
      if (width == 4) Blocks::template all_rows<6, 4>(p, 0, vector);
    vector += width;
  }
}

}  // namespace simmim_fast::SIMMIM_FAST_LEVEL
