// Products of small matrices in shared memory by one warp: tensor cores for bf16 and fp16, multiply-adds for float32.
//
// A result of 16 rows and 8 J columns is spread over the warp as mma.sync leaves it, float[J][4] in each lane: lane
// 4 g + t has row g in [j][0] and [j][1], row g + 8 in [j][2] and [j][3], of columns 8 j + 2 t and 8 j + 2 t + 1.

#pragma once

#include "cuda/common.cuh"

namespace simmim_fast {

constexpr unsigned kFullWarp = 0xffffffffu;

__device__ __forceinline__ int lane() { return threadIdx.x % 32; }

// How a matrix lies in shared memory: its rows, or its columns, are `stride` values apart.
enum class Order { kRows, kColumns };

// Values that a row in shared memory is longer than what it holds. Eight rows then touch all banks once, whether
// they are 16 or 64 values long.
template <typename T>
constexpr int kPadding = 16 / sizeof(T);

#ifdef SIMMIM_FAST_HOST_CUDA

template <bool kTransposed>
void load_matrices(uint32_t (&to)[4], const void* row) {
  host_cuda::load_matrices(to, row, kTransposed);
}

template <typename T>
void mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  host_cuda::mma<T>(sum, a, b0, b1);
}

template <typename T>
Vector<T, 2> round_pair(float x, float y) {
  return {T(x), T(y)};
}

inline float power_of_two(float x) { return exp2f(x); }

using host_cuda::copy_async;
using host_cuda::wait_for_copies;

#else

// Four matrices of 8 rows of 16 bytes; lane 8 i + r names row r of matrix i.
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}

// sum (16, 8) += a (16, 16) b (16, 8).
template <typename T>
__device__ __forceinline__ void mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, BFloat16>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// To T, both by one instruction.
template <typename T>
__device__ __forceinline__ Vector<T, 2> round_pair(float x, float y) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
    return reinterpret_cast<const Vector<T, 2>&>(pair);
  } else if constexpr (std::is_same_v<T, Half>) {
    const __half2 pair = __floats2half2_rn(x, y);
    return reinterpret_cast<const Vector<T, 2>&>(pair);
  } else {
    return {x, y};
  }
}

// 2^x by one instruction; relative error 2^-22, 0 for results below 2^-126.
__device__ __forceinline__ float power_of_two(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Begins to copy 16 bytes into shared memory, or zeros where they do not exist.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool exists) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(address), "l"(__cvta_generic_to_global(from)), "r"(exists ? 16 : 0)
               : "memory");
}

// Waits for the copies that this thread has begun.
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

#endif

// A matrix in shared memory, from its first value.
template <typename T, Order kOrder, int kStride>
struct Operand {
  const T* first;

  __device__ const T* at(int row, int column) const {
    return first + (kOrder == Order::kRows ? row * kStride + column : column * kStride + row);
  }

  // Four values from (row, column) on, along the columns (to the right) or the rows (down).
  template <Order kAlong>
  __device__ void load_four(float (&to)[4], int row, int column) const {
    if constexpr (kAlong == kOrder) {
      const Vector<T, 4> values = load<4>(at(row, column));
#pragma unroll
      for (int i = 0; i < 4; ++i) to[i] = values.values[i];
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) to[i] = kAlong == Order::kRows ? *at(row, column + i) : *at(row + i, column);
    }
  }
};

template <Order kOrder, int kStride, typename T>
__device__ __forceinline__ Operand<T, kOrder, kStride> operand(const T* first) {
  return {first};
}

// sum (16, 8 J) += a (16, 16) b (16, 8 J), where J is even and b begins at row k of the operand.
template <int J, typename T, Order kOrder, int kStride>
__device__ __forceinline__ void multiply_step(float (&sum)[J][4], const uint32_t (&a)[4],
                                              const Operand<T, kOrder, kStride>& b, int k) {
  const int row = lane() % 8, second = lane() / 8 % 2, third = lane() / 16;
#pragma unroll
  for (int j = 0; j < J; j += 2) {
    uint32_t right[4];
    load_matrices<kOrder == Order::kRows>(right, kOrder == Order::kRows ? b.at(k + 8 * second + row, 8 * (j + third))
                                                                        : b.at(k + 8 * second, 8 * (j + third) + row));
    mma<T>(sum[j], a, right[0], right[1]);
    mma<T>(sum[j + 1], a, right[2], right[3]);
  }
}

// sum (16, 8 J) += a (16, K) b (K, 8 J), where J is even and K a multiple of 16.
template <int K, int J, typename T, Order kOrderA, int kStrideA, Order kOrderB, int kStrideB>
__device__ __forceinline__ void multiply(float (&sum)[J][4], const Operand<T, kOrderA, kStrideA>& a,
                                         const Operand<T, kOrderB, kStrideB>& b) {
  if constexpr (std::is_same_v<T, float>) {
    const int g = lane() / 4, t = lane() % 4;
#pragma unroll 2
    for (int k = 0; k < K; k += 4) {
      float left[2][4];
      a.template load_four<Order::kRows>(left[0], g, k);
      a.template load_four<Order::kRows>(left[1], g + 8, k);
#pragma unroll
      for (int j = 0; j < J; ++j) {
        float right[2][4];
        b.template load_four<Order::kColumns>(right[0], k, 8 * j + 2 * t);
        b.template load_four<Order::kColumns>(right[1], k, 8 * j + 2 * t + 1);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int at = 0; at < 4; ++at) sum[j][at] += left[at / 2][i] * right[at % 2][i];
        }
      }
    }
  } else {
    const int row = lane() % 8, second = lane() / 8 % 2, third = lane() / 16;
#pragma unroll
    for (int k = 0; k < K; k += 16) {
      uint32_t left[4];
      load_matrices<kOrderA == Order::kColumns>(left, kOrderA == Order::kRows ? a.at(8 * second + row, k + 8 * third)
                                                                              : a.at(8 * second, k + 8 * third + row));
      multiply_step(sum, left, b, k);
    }
  }
}

// sum (16, 8 J) += left (16, K) b (K, 8 J), where `left` is a result, rounded to 16-bit T.
template <int K, int J, typename T, Order kOrder, int kStride>
__device__ __forceinline__ void multiply(float (&sum)[J][4], const float (&left)[K / 8][4],
                                         const Operand<T, kOrder, kStride>& b) {
#pragma unroll
  for (int k = 0; k < K; k += 16) {
    uint32_t a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float (&from)[4] = left[k / 8 + i / 2];
      const Vector<T, 2> pair = round_pair<T>(from[i % 2 * 2], from[i % 2 * 2 + 1]);
      a[i] = reinterpret_cast<const uint32_t&>(pair);
    }
    multiply_step(sum, a, b, k);
  }
}

// Stores a result, two neighbours at a time, as rows kStride values apart.
template <int kStride, int J, typename T>
__device__ __forceinline__ void store_result(T* to, const float (&values)[J][4]) {
  const int g = lane() / 4, t = lane() % 4;
#pragma unroll
  for (int j = 0; j < J; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      store<2>(to + (g + 8 * half) * kStride + 8 * j + 2 * t,
               round_pair<T>(values[j][2 * half], values[j][2 * half + 1]));
  }
}

// Over the four lanes that share a row of a result.
__device__ __forceinline__ float sum_over_row(float value) {
  value += __shfl_xor_sync(kFullWarp, value, 1);
  return value + __shfl_xor_sync(kFullWarp, value, 2);
}

__device__ __forceinline__ float max_over_row(float value) {
  value = max(value, __shfl_xor_sync(kFullWarp, value, 1));
  return max(value, __shfl_xor_sync(kFullWarp, value, 2));
}

}  // namespace simmim_fast
