// Matrix products in tiles that stay in registers, for ops that fuse something around them.
//
// C (rows, columns) = A (rows, depth) B (depth, columns). A is packed into panels of kRows rows, B into strips of
// kColumns columns, both depth-major, so that a tile of C reads two streams. Packing converts to what the processor
// multiplies: float32, float64, or with AVX512-BF16 pairs of bfloat16 that are neighbours in depth. The depth is never
// split among threads, so a product does not depend on their number.

#pragma once

#include <algorithm>
#include <cstddef>
#include <new>

#include "cpu/convert.h"
#include "cpu/simd.h"

#if SIMMIM_FAST_HAS_SIMD
#include <immintrin.h>
#endif

namespace simmim_fast::gemm {

#if SIMMIM_FAST_HAS_SIMD
inline bool has_avx512() { return __builtin_cpu_supports("x86-64-v4"); }
inline bool has_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#else
inline bool has_bf16() { return false; }
#endif

constexpr int kRows = 6;
constexpr int kColumns = 64;

// Two neighbours in depth.
struct Pair {
  uint16_t first, second;
};

// Elements of depth in one packed unit, and the type of sums.
template <typename Unit>
constexpr int64_t kElements = 1;
template <>
constexpr int64_t kElements<Pair> = 2;
template <typename Unit>
using Sum = std::conditional_t<std::is_same_v<Unit, Pair>, float, Unit>;

template <typename Unit>
int64_t units(int64_t depth) {
  return (depth + kElements<Unit> - 1) / kElements<Unit>;
}

inline int64_t ceil_div(int64_t value, int64_t by) { return (value + by - 1) / by; }

// Uninitialised memory on a cache line's boundary.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : data_(static_cast<T*>(::operator new(count * sizeof(T), kAlignment))) {}
  ~Buffer() { ::operator delete(data_, kAlignment); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  T* data_;
};

// The bits of a bfloat16. Signs of residuals, which are -1, 0 and 1, come as int8.
template <typename E>
inline __attribute__((always_inline)) uint16_t bfloat16_bits(E value) {
  if constexpr (std::is_same_v<E, int8_t>) return (value & 0x8000) | (-(value & 1) & 0x3f80);
  if constexpr (std::is_same_v<E, BFloat16>) return value.x;
  if constexpr (!std::is_same_v<E, int8_t> && !std::is_same_v<E, BFloat16>) return narrow<BFloat16>(float(value)).x;
}

template <typename Unit, typename E>
inline __attribute__((always_inline)) Unit unit(E first, E second) {
  if constexpr (std::is_same_v<Unit, Pair>)
    return {bfloat16_bits(first), bfloat16_bits(second)};
  else
    return Unit(widen(first));
}

// Packs kWidth vectors along the depth: packed[k * kWidth + i] = vectors[i][k], from unit `begin` to unit `end`.
// Vectors from `count` on are zero.
template <int kWidth, typename Unit, typename E>
SIMMIM_FAST_SIMD void pack_units_along(const E* const* vectors, int64_t count, int64_t depth, int64_t begin,
                                       int64_t end, Unit* packed) {
  constexpr int64_t kBlock = 16, kStep = kElements<Unit>;  // a cache line of a vector at a time
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t last = std::min(first + kBlock, end);
    for (int64_t i = 0; i < kWidth; ++i) {
      const E* vector = i < count ? vectors[i] : nullptr;
      for (int64_t k = first; k < last; ++k) {
        const int64_t at = k * kStep;
        const bool whole = at + kStep <= depth;
        packed[k * kWidth + i] = vector ? unit<Unit>(vector[at], whole ? vector[at + kStep - 1] : E(0)) : Unit{};
      }
    }
  }
}

#if SIMMIM_FAST_HAS_SIMD

// Transposes 16 x 16 words: swaps the off-diagonal blocks of side 8, then 4, 2 and 1.
template <int kHalf = 8, typename Words>
__attribute__((always_inline, target("arch=x86-64-v4"))) inline void transpose(Words (&rows)[16]) {
  Words upper, lower;
  for (int lane = 0; lane < 16; ++lane) {
    upper[lane] = lane & kHalf ? 16 + lane - kHalf : lane;
    lower[lane] = lane & kHalf ? 16 + lane : lane + kHalf;
  }
  for (int r = 0; r < 16; ++r) {
    if (r & kHalf) continue;
    const Words above = rows[r], below = rows[r + kHalf];
    rows[r] = __builtin_shuffle(above, below, upper);
    rows[r + kHalf] = __builtin_shuffle(above, below, lower);
  }
  if constexpr (kHalf > 1) transpose<kHalf / 2>(rows);
}

// As pack_units_along() for kColumns vectors whose units are copies of 32 bits, in blocks of 16 x 16 units; returns the
// first unit that is not packed.
template <typename E>
__attribute__((target("arch=x86-64-v4"))) int64_t pack_words_along(const E* const* vectors, int64_t depth,
                                                                   uint32_t* packed) {
  typedef uint32_t Words __attribute__((vector_size(64), may_alias, aligned(2)));
  constexpr int kSide = 16;
  constexpr int64_t kElementsPerWord = sizeof(uint32_t) / sizeof(E);
  const int64_t whole = depth / kElementsPerWord / kSide * kSide;
  for (int64_t k = 0; k < whole; k += kSide)
    for (int i = 0; i < kColumns; i += kSide) {
      Words rows[kSide];
      for (int r = 0; r < kSide; ++r) {
        rows[r] = *reinterpret_cast<const Words*>(vectors[i + r] + k * kElementsPerWord);
        __builtin_prefetch(vectors[i + r] + (k + 2 * kSide) * kElementsPerWord);
      }
      transpose(rows);
      for (int r = 0; r < kSide; ++r) *reinterpret_cast<Words*>(packed + (k + r) * kColumns + i) = rows[r];
    }
  return whole;
}

#endif

// Packs kWidth vectors along the whole depth.
template <int kWidth, typename Unit, typename E>
void pack_along(const E* const* vectors, int64_t count, int64_t depth, Unit* packed) {
  int64_t first = 0;
#if SIMMIM_FAST_HAS_SIMD
  constexpr bool kCopies = std::is_same_v<Unit, E> || (std::is_same_v<Unit, Pair> && std::is_same_v<E, BFloat16>);
  if constexpr (kCopies && sizeof(Unit) == sizeof(uint32_t) && kWidth == kColumns)
    if (count == kWidth && has_avx512()) first = pack_words_along(vectors, depth, reinterpret_cast<uint32_t*>(packed));
#endif
  pack_units_along<kWidth>(vectors, count, depth, first, units<Unit>(depth), packed);
}

// Packs `width` neighbours of every vector: packed[k * width + i] = vectors[k][i]. Neighbours from `count` on are zero.
template <int kWidth, typename Unit, typename E>
SIMMIM_FAST_SIMD void pack_across(const E* const* vectors, int64_t offset, int64_t count, int64_t depth, Unit* packed) {
  constexpr int64_t kStep = kElements<Unit>, kAhead = 16;
  const E zeros[kWidth] = {};
  for (int64_t k = 0; k < units<Unit>(depth); ++k) {
    const E* __restrict first = vectors[k * kStep] + offset;
    const E* __restrict second = k * kStep + kStep <= depth ? vectors[k * kStep + kStep - 1] + offset : zeros;
    Unit* __restrict to = packed + k * kWidth;
    if (kWidth == kColumns && (k + kAhead) * kStep < depth)  // each vector lies on a page of its own
      for (int64_t i = 0; i < count; i += 64 / sizeof(E))
        __builtin_prefetch(vectors[(k + kAhead) * kStep] + offset + i);
    if (count == kWidth)
      for (int64_t i = 0; i < kWidth; ++i) to[i] = unit<Unit>(first[i], second[i]);
    else
      for (int64_t i = 0; i < kWidth; ++i) to[i] = i < count ? unit<Unit>(first[i], second[i]) : Unit{};
  }
}

// One tile: c (kRows, kColumns) = or += panel (depth, kRows)' strip (depth, kColumns), in passes of as many columns as
// there are registers for.
template <int kBytes, int kVectors, typename T>
inline __attribute__((always_inline)) void multiply(const T* panel, const T* strip, T* c, int64_t depth, bool add) {
  typedef T Lanes __attribute__((vector_size(kBytes), may_alias));
  constexpr int kLanes = kBytes / sizeof(T), kPass = kLanes * kVectors;
  for (int first = 0; first < kColumns; first += kPass) {
    Lanes sums[kRows][kVectors] = {};
    if (add)
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v)
          sums[r][v] = *reinterpret_cast<const Lanes*>(c + r * kColumns + first + v * kLanes);
    for (int64_t k = 0; k < depth; ++k) {
      Lanes columns[kVectors];
      for (int v = 0; v < kVectors; ++v)
        columns[v] = *reinterpret_cast<const Lanes*>(strip + k * kColumns + first + v * kLanes);
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v) sums[r][v] += panel[k * kRows + r] * columns[v];
    }
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) *reinterpret_cast<Lanes*>(c + r * kColumns + first + v * kLanes) = sums[r][v];
  }
}

template <typename Unit>
using Multiply = void (*)(const Unit* panel, const Unit* strip, Sum<Unit>* c, int64_t depth, bool add);

#if SIMMIM_FAST_HAS_SIMD

template <typename T>
__attribute__((target("arch=x86-64-v4"))) void multiply_avx512(const T* panel, const T* strip, T* c, int64_t depth,
                                                               bool add) {
  multiply<64, 4>(panel, strip, c, depth, add);
}

// As multiply(), two elements of depth at a time.
__attribute__((target("arch=x86-64-v4,avx512bf16"))) inline void multiply_avx512_bf16(const Pair* panel,
                                                                                      const Pair* strip, float* c,
                                                                                      int64_t depth, bool add) {
  constexpr int kLanes = 16, kVectors = kColumns / kLanes;
  __m512 sums[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v)
      sums[r][v] = add ? _mm512_load_ps(c + r * kColumns + v * kLanes) : _mm512_setzero_ps();
  for (int64_t k = 0; k < depth; ++k) {
    __m512bh columns[kVectors];
    for (int v = 0; v < kVectors; ++v) columns[v] = (__m512bh)_mm512_load_si512(strip + k * kColumns + v * kLanes);
    for (int r = 0; r < kRows; ++r) {
      int pair;
      std::memcpy(&pair, panel + k * kRows + r, sizeof(pair));
      for (int v = 0; v < kVectors; ++v)
        sums[r][v] = _mm512_dpbf16_ps(sums[r][v], (__m512bh)_mm512_set1_epi32(pair), columns[v]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) _mm512_store_ps(c + r * kColumns + v * kLanes, sums[r][v]);
}

#endif

template <typename T>
SIMMIM_FAST_SIMD void multiply_narrow(const T* panel, const T* strip, T* c, int64_t depth, bool add) {
  multiply<32, 2>(panel, strip, c, depth, add);
}

// The kernel for this processor.
template <typename Unit>
Multiply<Unit> multiply_kernel() {
#if SIMMIM_FAST_HAS_SIMD
  if constexpr (std::is_same_v<Unit, Pair>) return multiply_avx512_bf16;
  if constexpr (!std::is_same_v<Unit, Pair>)
    if (has_avx512()) return multiply_avx512<Unit>;
#endif
  if constexpr (!std::is_same_v<Unit, Pair>) return multiply_narrow<Unit>;
  return nullptr;
}

}  // namespace simmim_fast::gemm
