// Products of small matrices that lie in the first-level cache, one block of the result in registers at a time.
// Included inside one file per SIMD level, as vector.h.
//
// Two kinds of arithmetic. Numbers: operands are float32 or float64. Pairs: operands are pairs of bfloat16 in 32 bits,
// multiplied and added two by two into float32 (VDPBF16PS), so that sums run over half as many operands.

#pragma once

#include "cpu/fetch.h"
#include "cpu/vector.h"

namespace simmim_fast::SIMMIM_FAST_LEVEL {

template <typename T>
struct Numbers {
  using Sum = Accumulator<T>;
  using Operand = Sum;
  static constexpr int64_t kPer = 1;  // numbers in one operand

  template <typename V>
  static void multiply_add(V& sum, V a, V b) {
    sum += a * b;
  }
};

#if defined(__AVX512BF16__)
struct Pairs {
  using Sum = float;
  using Operand = uint32_t;
  static constexpr int64_t kPer = 2;

  static void multiply_add(Vec<float>& sum, Vec<uint32_t> a, Vec<uint32_t> b) {
    sum = _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }

  static void multiply_add(HalfVec<float>& sum, HalfVec<uint32_t> a, HalfVec<uint32_t> b) {
    sum = _mm256_dpbf16_ps(sum, (__m256bh)a, (__m256bh)b);
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
  FetchList* fetch = nullptr;    // lines to fetch, one a step
};

// kHalf: of the last vector of c only the lower half is wanted; the upper half stays as it is. Not together with add.
template <class Math, bool kTransposed, int64_t kStride, bool kFetch, bool kHalf>
struct Multiply {
  using Operand = typename Math::Operand;
  using Sum = typename Math::Sum;

  template <int kRows, int kVectors, bool kTail>
  static void block(const Product<Math>& p, int64_t row, int64_t vector) {
    constexpr int kWhole = kVectors - kTail;
    const int64_t a_stride = kStride ? kStride : p.a_stride;
    const Operand* a = p.a + (kTransposed ? row : row * a_stride);
    const Operand* b = p.b + vector * kLanes<Operand>;
    Sum* c = p.c + row * p.c_stride + vector * kLanes<Sum>;
    Vec<Sum> sums[kRows][kVectors] = {};
    HalfVec<Sum> tails[kRows] = {};
    if (!kTail && p.add)
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[r][v] = load(c + r * p.c_stride + v * kLanes<Sum>);
    const char* const* lines = kFetch ? p.fetch->take(p.depth) : nullptr;
    const int64_t offset = kFetch ? p.fetch->offset() : 0;
    for (int64_t k = 0; k < p.depth; ++k, a += kTransposed ? a_stride : 1, b += p.b_stride) {
      if constexpr (kFetch) __builtin_prefetch(lines[k] + offset, 0, 2);
      Vec<Operand> columns[kVectors];
      HalfVec<Operand> tail = {};
#pragma GCC unroll 4
      for (int v = 0; v < kWhole; ++v) columns[v] = load(b + v * kLanes<Operand>);
      if constexpr (kTail) tail = load_half(b + kWhole * kLanes<Operand>);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Vec<Operand> factor = broadcast(a[kTransposed ? r : r * a_stride]);
#pragma GCC unroll 4
        for (int v = 0; v < kWhole; ++v) Math::multiply_add(sums[r][v], factor, columns[v]);
        if constexpr (kTail) Math::multiply_add(tails[r], lower_half<Operand>(factor), tail);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kWhole; ++v) store(c + r * p.c_stride + v * kLanes<Sum>, sums[r][v]);
      if constexpr (kTail) store_half(c + r * p.c_stride + kWhole * kLanes<Sum>, tails[r]);
    }
  }

  template <int kRows, int kVectors, bool kTail>
  static void all_rows(const Product<Math>& p, int64_t row, int64_t vector) {
    for (; row + kRows <= p.rows; row += kRows) block<kRows, kVectors, kTail>(p, row, vector);
    if constexpr (kRows > 1)
      if (row < p.rows) all_rows<kRows / 2, kVectors, kTail>(p, row, vector);
  }

  template <int kRows, int kVectors>
  static void columns(const Product<Math>& p, int64_t vector) {
    if (kHalf && vector + kVectors == p.vectors)
      all_rows<kRows, kVectors, kHalf>(p, 0, vector);
    else
      all_rows<kRows, kVectors, false>(p, 0, vector);
  }
};

// kStride is a_stride where it is known when compiling, which is faster, else 0. Blocks have as many rows as the
// registers hold beside the vectors of b.
template <class Math, bool kTransposed, int64_t kStride, bool kFetch = false, bool kHalf = false>
void multiply(const Product<Math>& p) {
  using Blocks = Multiply<Math, kTransposed, kStride, kFetch, kHalf>;
  constexpr bool kMany = kRegisters == 32;
  constexpr int64_t kWidest = kMany ? 4 : 3;
  for (int64_t vector = 0; vector < p.vectors;) {
    const int64_t left = p.vectors - vector, parts = (left + kWidest - 1) / kWidest, width = (left + parts - 1) / parts;
    if (width == 1) Blocks::template columns<kMany ? 12 : 8, 1>(p, vector);
    if (width == 2) Blocks::template columns<kMany ? 12 : 6, 2>(p, vector);
    if (width == 3) Blocks::template columns<kMany ? 6 : 3, 3>(p, vector);
    if constexpr (kMany)
      if (width == 4) Blocks::template columns<6, 4>(p, vector);
    vector += width;
  }
}

}  // namespace simmim_fast::SIMMIM_FAST_LEVEL
