// How rows of activations and rows of logits become the operands of tile_product.h, for biased_attention.
// Included inside one file per SIMD level, as vector.h.
//
// Each `pack_` function fills `to` and returns where the operands lie: for Numbers that is where they lay before.

#pragma once

#include "cpu/buffer.h"
#include "cpu/tile_product.h"

namespace simmim_fast::SIMMIM_FAST_LEVEL {
namespace {

template <class Math>
struct Operands;

template <typename T>
struct Operands<Numbers<T>> {
  using Sum = Accumulator<T>;

  // One row of `size` elements, 0 from there to `stride`.
  static void load_row(const T* from, int64_t size, Sum* to, int64_t stride) {
    int64_t c = 0;
    for (; c + kLanes<Sum> <= size; c += kLanes<Sum>) store(to + c, widen<Sum>(from + c));
    for (; c < size; ++c) to[c] = Sum(from[c]);
    for (; c < stride; ++c) to[c] = 0;
  }

  // (count, stride) loaded rows as the right-hand side of a sum over them: (operands of count, to_stride).
  static const Sum* pack_rows(const Sum* rows, int64_t, int64_t, Sum*, int64_t) { return rows; }

  // (rows, stride) logits as the left-hand side of a sum over the columns.
  static const Sum* pack_columns(const Sum* logits, int64_t, int64_t, Sum*) { return logits; }

  // (rows, stride) logits as the transposed left-hand side of a sum over the rows: (operands of rows, stride).
  static const Sum* pack_transposed(const Sum* logits, int64_t, int64_t, Sum*) { return logits; }
};

#if defined(__AVX512BF16__)
template <>
struct Operands<Pairs> {
  using Bits = typename VectorOf<uint16_t>::half;

  static Vec<uint32_t> join(Bits even, Bits odd) {
    return __builtin_convertvector(even, Vec<uint32_t>) | __builtin_convertvector(odd, Vec<uint32_t>) << 16;
  }

  static Bits load_bits(const uint32_t* row, int64_t c) {
    Bits bits;
    __builtin_memcpy(&bits, reinterpret_cast<const uint16_t*>(row) + c, sizeof(bits));
    return bits;
  }

  static Bits round_to_bits(const float* from) { return (Bits)_mm512_cvtneps_pbh(load(from)); }

  // `size` is even.
  static void load_row(const BFloat16* from, int64_t size, uint32_t* to, int64_t stride) {
    __builtin_memcpy(to, from, size * sizeof(BFloat16));
    __builtin_memset(to + size / 2, 0, (stride - size / 2) * sizeof(uint32_t));
  }

  static const uint32_t* pack_rows(const uint32_t* rows, int64_t count, int64_t stride, uint32_t* to,
                                   int64_t to_stride) {
    for (int64_t row = 0; row < count; row += 2)
      for (int64_t c = 0; c < to_stride; c += kLanes<uint32_t>) {
        const Bits odd = row + 1 < count ? load_bits(rows + (row + 1) * stride, c) : Bits{};
        store(to + row / 2 * to_stride + c, join(load_bits(rows + row * stride, c), odd));
      }
    return to;
  }

  static const uint32_t* pack_columns(const float* logits, int64_t rows, int64_t stride, uint32_t* to) {
    for (int64_t i = 0; i < rows * stride; i += kLanes<float>) {
      const Bits bits = round_to_bits(logits + i);
      __builtin_memcpy(reinterpret_cast<uint16_t*>(to) + i, &bits, sizeof(bits));
    }
    return to;
  }

  static const uint32_t* pack_transposed(const float* logits, int64_t rows, int64_t stride, uint32_t* to) {
    for (int64_t row = 0; row < rows; row += 2)
      for (int64_t c = 0; c < stride; c += kLanes<float>) {
        const float* even = logits + row * stride + c;
        const Bits odd = row + 1 < rows ? round_to_bits(even + stride) : Bits{};
        store(to + row / 2 * stride + c, join(round_to_bits(even), odd));
      }
    return to;
  }
};
#endif

}  // namespace
}  // namespace simmim_fast::SIMMIM_FAST_LEVEL
