// How rows of activations and matrices of float32 become the operands of tile_product.h.
// Included inside one file per SIMD level, as vector.h.
//
// Each function fills `to` and returns where the operands lie: for Numbers often where they lay before.

#pragma once

#include "cpu/buffer.h"
#include "cpu/tile_product.h"

namespace simmim_fast::SIMMIM_FAST_LEVEL {

template <class Math>
struct Operands;

template <typename T>
struct Operands<Numbers<T>> {
  using Sum = Accumulator<T>;

  // One row of `size` elements, 0 from there to `stride`, the next whole vector.
  static void load_row(const T* from, int64_t size, Sum* to, int64_t stride) {
    const int64_t whole = size / kLanes<Sum> * kLanes<Sum>;
    for (int64_t c = 0; c < whole; c += kLanes<Sum>) store(to + c, widen<Sum>(from + c));
    if (whole == stride) return;
    store(to + whole, Vec<Sum>{});
    for (int64_t c = 0; c < size % kLanes<Sum>; ++c) to[whole + c] = Sum(from[whole + c]);
  }

  // (count, stride) rows of operands as the right-hand side of a product along the rows.
  static const Sum* along_rows(const Sum* rows, int64_t, int64_t, Sum*, int64_t) { return rows; }

  // (rows, stride) numbers, times a factor for each row where given, as the left-hand side of a product along the rows.
  static const Sum* sum_over_rows(const Sum* from, int64_t rows, int64_t stride, const Sum* factors, Sum* to) {
    if (!factors) return from;
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t c = row * stride; c < (row + 1) * stride; c += kLanes<Sum>)
        store(to + c, load(from + c) * factors[row]);
    return to;
  }

  // The same along the columns, with a factor for each column.
  static const Sum* sum_over_columns(const Sum* from, int64_t rows, int64_t stride, const Sum* factors, Sum* to) {
    if (!factors) return from;
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t c = 0; c < stride; c += kLanes<Sum>)
        store(to + row * stride + c, load(from + row * stride + c) * load(factors + c));
    return to;
  }
};

#if defined(__AVX512BF16__)
// Elements kFirst.. and kSecond.. of a and b, joined, two by two.
template <int kFirst, int kSecond, size_t... kLane>
inline Vec<uint32_t> zip(Vec<uint32_t> a, Vec<uint32_t> b, std::index_sequence<kLane...>) {
  const auto first = (Vec<uint16_t>)a, second = (Vec<uint16_t>)b;
  return (Vec<uint32_t>)__builtin_shufflevector(first, second, ((kLane % 2 ? kSecond : kFirst) + kLane / 2)...);
}

template <int kFirst, int kSecond>
inline Vec<uint32_t> zip(Vec<uint32_t> a, Vec<uint32_t> b) {
  return zip<kFirst, kSecond>(a, b, std::make_index_sequence<kLanes<uint16_t>>{});
}

template <>
struct Operands<Pairs> {
  // One row of `size` elements, an even number, as size / 2 operands; 0 from there to `stride`, the next whole vector.
  static void load_row(const BFloat16* from, int64_t size, uint32_t* to, int64_t stride) {
    constexpr int64_t kBlock = kLanes<BFloat16>;
    const int64_t whole = size / kBlock * kBlock;
    for (int64_t c = 0; c < whole; c += kBlock) __builtin_memcpy(to + c / 2, from + c, kVectorBytes);
    if (whole / 2 == stride) return;
    store(to + whole / 2, Vec<uint32_t>{});
    __builtin_memcpy(to + whole / 2, from + whole, size % kBlock * sizeof(BFloat16));
  }

  // (count, stride) rows of operands -> (count / 2, to_stride): rows 2r and 2r + 1 side by side in each operand.
  static const uint32_t* along_rows(const uint32_t* rows, int64_t count, int64_t stride, uint32_t* to,
                                    int64_t to_stride) {
    for (int64_t row = 0; row < count; row += 2, to += to_stride)
      for (int64_t c = 0; c < to_stride; c += 2 * kLanes<uint32_t>) {
        const auto upper = load(rows + row * stride + c / 2);
        const auto lower = row + 1 < count ? load(rows + (row + 1) * stride + c / 2) : Vec<uint32_t>{};
        store(to + c, zip<0, 32>(upper, lower));
        if (c + kLanes<uint32_t> < to_stride) store(to + c + kLanes<uint32_t>, zip<16, 48>(upper, lower));
      }
    return to - (count + 1) / 2 * to_stride;
  }

  static const uint32_t* sum_over_rows(const float* from, int64_t rows, int64_t stride, const float* factors,
                                       uint32_t* to) {
    for (int64_t row = 0; row < rows; row += 2)
      for (int64_t c = 0; c < stride; c += kLanes<float>) {
        const auto number = [&](int64_t r) {
          if (r >= rows) return Vec<float>{};
          return factors ? load(from + r * stride + c) * factors[r] : load(from + r * stride + c);
        };
        const auto pair = (Vec<uint32_t>)_mm512_cvtne2ps_pbh(number(row + 1), number(row));
        store(to + row / 2 * stride + c, zip<0, 16>(pair, pair));
      }
    return to;
  }

  static const uint32_t* sum_over_columns(const float* from, int64_t rows, int64_t stride, const float* factors,
                                          uint32_t* to) {
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t c = 0; c < stride; c += kLanes<float>) {
        const Vec<float> number = load(from + row * stride + c);
        narrow<BFloat16, float>(reinterpret_cast<BFloat16*>(to) + row * stride + c,
                                factors ? number * load(factors + c) : number);
      }
    return to;
  }
};
#endif

}  // namespace simmim_fast::SIMMIM_FAST_LEVEL
