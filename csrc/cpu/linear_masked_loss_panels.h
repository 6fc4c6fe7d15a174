// Packing for large products in tiles that stay in registers.
// Included inside one file per SIMD level, as vector.h.
//
// C (rows, columns) = A (rows, depth) B (depth, columns). A is packed into panels of kRows rows, B into strips of
// kColumns columns, both depth-major, so that a tile of C reads two streams. Packing converts to the operands of
// tile_product.h. The depth is never split among threads, so a product does not depend on their number.

#pragma once

#include <algorithm>

#include "cpu/convert.h"
#include "cpu/tile_product.h"

namespace simmim_fast::SIMMIM_FAST_LEVEL {
namespace {

constexpr int64_t kRows = 6;
constexpr int64_t kColumns = 64;
constexpr int64_t kTile = kRows * kColumns;

// The bits of a bfloat16. Signs of residuals, which are -1, 0 and 1, come as int8.
template <typename E>
inline __attribute__((always_inline)) uint16_t bfloat16_bits(E value) {
  if constexpr (std::is_same_v<E, int8_t>) return (value & 0x8000) | (-(value & 1) & 0x3f80);
  if constexpr (std::is_same_v<E, BFloat16>) return value.x;
  if constexpr (!std::is_same_v<E, int8_t> && !std::is_same_v<E, BFloat16>) return narrow<BFloat16>(float(value)).x;
}

// One operand of two neighbours in depth, or of the first where an operand holds one number.
template <class Math, typename E>
inline __attribute__((always_inline)) typename Math::Operand operand(E first, E second) {
  if constexpr (Math::kPer == 2)
    return bfloat16_bits(first) | uint32_t(bfloat16_bits(second)) << 16;
  else
    return typename Math::Operand(widen(first));
}

// Operands along a depth.
template <class Math>
int64_t operands(int64_t depth) {
  return ceil_div(depth, Math::kPer);
}

// Packs kWidth vectors along the depth: packed[k * kWidth + i] = vectors[i][k], from operand `begin` to operand `end`.
// Vectors from `count` on are zero.
template <class Math, int64_t kWidth, typename E>
void pack_numbers_along(const E* const* vectors, int64_t count, int64_t depth, int64_t begin, int64_t end,
                        typename Math::Operand* packed) {
  constexpr int64_t kBlock = 16;  // a cache line of a vector at a time
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t last = std::min(first + kBlock, end);
    for (int64_t i = 0; i < kWidth; ++i) {
      const E* vector = i < count ? vectors[i] : nullptr;
      for (int64_t k = first; k < last; ++k) {
        const int64_t at = k * Math::kPer;
        const bool whole = at + Math::kPer <= depth;
        packed[k * kWidth + i] =
            vector ? operand<Math>(vector[at], whole ? vector[at + Math::kPer - 1] : E(0)) : typename Math::Operand{};
      }
    }
  }
}

// As pack_numbers_along() for kColumns vectors whose operands are copies, in squares of whole vectors; returns the
// first operand that is not packed.
template <class Math, typename E>
int64_t pack_copies_along(const E* const* vectors, int64_t depth, typename Math::Operand* packed) {
  using Operand = typename Math::Operand;
  constexpr int64_t kSide = kLanes<Operand>;
  const int64_t whole = depth / Math::kPer / kSide * kSide;
  for (int64_t k = 0; k < whole; k += kSide)
    for (int64_t i = 0; i < kColumns; i += kSide) {
      Vec<Operand> rows[kSide];
#pragma GCC unroll 16
      for (int64_t r = 0; r < kSide; ++r) {
        rows[r] = load(reinterpret_cast<const Operand*>(vectors[i + r] + k * Math::kPer));
        __builtin_prefetch(vectors[i + r] + (k + 2 * kSide) * Math::kPer);
      }
      transpose_square<kSide / 2, Operand>(rows);
#pragma GCC unroll 16
      for (int64_t r = 0; r < kSide; ++r) store(packed + (k + r) * kColumns + i, rows[r]);
    }
  return whole;
}

// Packs kWidth vectors along the whole depth.
template <class Math, int64_t kWidth, typename E>
void pack_along(const E* const* vectors, int64_t count, int64_t depth, typename Math::Operand* packed) {
  constexpr bool kCopies = kWidth == kColumns && sizeof(typename Math::Operand) == Math::kPer * sizeof(E);
  int64_t first = 0;
  if constexpr (kCopies)
    if (count == kWidth) first = pack_copies_along<Math>(vectors, depth, packed);
  pack_numbers_along<Math, kWidth>(vectors, count, depth, first, operands<Math>(depth), packed);
}

// Packs `width` neighbours of every vector: packed[k * width + i] = vectors[k][i]. Neighbours from `count` on are zero.
template <class Math, int64_t kWidth, typename E>
void pack_across(const E* const* vectors, int64_t offset, int64_t count, int64_t depth,
                 typename Math::Operand* packed) {
  using Operand = typename Math::Operand;
  constexpr int64_t kStep = Math::kPer, kAhead = 16;
  const E zeros[kWidth] = {};
  for (int64_t k = 0; k < operands<Math>(depth); ++k) {
    const E* __restrict first = vectors[k * kStep] + offset;
    const E* __restrict second = k * kStep + kStep <= depth ? vectors[k * kStep + kStep - 1] + offset : zeros;
    Operand* __restrict to = packed + k * kWidth;
    if (kWidth == kColumns && (k + kAhead) * kStep < depth)  // each vector lies on a page of its own
      for (int64_t i = 0; i < count; i += 64 / sizeof(E))
        __builtin_prefetch(vectors[(k + kAhead) * kStep] + offset + i);
    if (count == kWidth)
      for (int64_t i = 0; i < kWidth; ++i) to[i] = operand<Math>(first[i], second[i]);
    else
      for (int64_t i = 0; i < kWidth; ++i) to[i] = i < count ? operand<Math>(first[i], second[i]) : Operand{};
  }
}

// One tile: c (kRows, kColumns) = or += panel (depth, kRows)' strip (depth, kColumns).
template <class Math>
void multiply_tile(const typename Math::Operand* panel, const typename Math::Operand* strip, typename Math::Sum* c,
                   int64_t depth, bool add) {
  multiply<Math, true, kRows>(
      {panel, kRows, strip, kColumns, c, kColumns, kRows, kColumns / kLanes<typename Math::Sum>, depth, add});
}

}  // namespace
}  // namespace simmim_fast::SIMMIM_FAST_LEVEL
