// Kernels that use each primitive of csrc/testing/host_cuda.h, called by test_host_cuda.py through ctypes.

#include "cuda/mma.cuh"

namespace {

constexpr int kThreads = 128;

// out[block] = sum of the block's 128 values, through shuffles in a warp and shared memory between warps.
__global__ void block_sums(const int* values, int* out) {
  __shared__ int sums[kThreads / 32];
  int sum = values[blockIdx.x * blockDim.x + threadIdx.x];
  for (int delta = 16; delta > 0; delta /= 2) sum += __shfl_down_sync(0xffffffffu, sum, delta);
  if (threadIdx.x % warpSize == 0) sums[threadIdx.x / warpSize] = sum;
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = sums[0] + sums[1] + sums[2] + sums[3];
}

// Of every lane: the lane before it, the lane with the lowest bit flipped, lane 5; then the block's threads together.
__global__ void lanes(int* out) {
  const int lane = threadIdx.x % warpSize;
  int* mine = out + 4 * threadIdx.x;
  mine[0] = __shfl_up_sync(0xffffffffu, lane, 1);
  mine[1] = __shfl_xor_sync(0xffffffffu, lane, 1);
  mine[2] = __shfl_sync(0xffffffffu, lane, 5);
  atomicAdd(out + 3, 1);
}

// Each thread reads what its neighbour writes: upwards or downwards, with the barrier between, or wrongly without.
__global__ void read_neighbour(int* out, int direction, bool with_barrier) {
  __shared__ int shared[kThreads];
  __syncthreads();
  shared[threadIdx.x] = -1;
  __syncthreads();
  shared[threadIdx.x] = threadIdx.x;
  if (with_barrier) __syncthreads();
  const unsigned neighbour = (threadIdx.x + kThreads + direction) % kThreads;
  out[blockIdx.x * kThreads + threadIdx.x] = shared[neighbour];
}

// Half of each warp waits for the warp, the other half for the block.
__global__ void deadlock() {
  if (threadIdx.x % warpSize < warpSize / 2)
    __syncwarp();
  else
    __syncthreads();
}

__global__ void partial_mask() { __syncwarp(0x0000ffffu); }

// A quarter of the threads returns early; a barrier waits for the others only.
__global__ void early_exit(int* out) {
  if (threadIdx.x < kThreads / 4) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

// sum (16, 8) = a (16, 16) b (16, 8), from fragments as the PTX manual lays them out (mma.m16n8k16).
template <typename T>
__global__ void mma(const T* a, const T* b, float* sum) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  T left[8], right[4];
  for (int i = 0; i < 8; ++i) {
    const int row = i < 2 || (4 <= i && i < 6) ? g : g + 8, column = 2 * t + i % 2 + (i < 4 ? 0 : 8);
    left[i] = a[row * 16 + column];
  }
  for (int i = 0; i < 4; ++i) right[i] = b[(2 * t + i % 2 + (i < 2 ? 0 : 8)) * 8 + g];
  uint32_t left_words[4], right_words[2];
  std::memcpy(left_words, left, sizeof(left));
  std::memcpy(right_words, right, sizeof(right));
  float mine[4] = {};
  simmim_fast::mma<T>(mine, left_words, right_words[0], right_words[1]);
  for (int i = 0; i < 4; ++i) sum[(i < 2 ? g : g + 8) * 8 + 2 * t + i % 2] = mine[i];
}

// Four 8 x 8 matrices, row by row, -> what each lane gets of each.
template <bool kTransposed>
__global__ void load_matrices(const uint16_t* matrices, uint32_t* out) {
  uint32_t mine[4];
  simmim_fast::load_matrices<kTransposed>(mine, matrices + threadIdx.x * 8);
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = mine[i];
}

// sum (16, 16) = a (16, 32) b (32, 16); each operand lies by rows or by columns, which are padded to `stride`.
template <typename T, simmim_fast::Order kOrderA, simmim_fast::Order kOrderB, int kStrideA, int kStrideB>
__global__ void multiply(const T* a, const T* b, float* out) {
  float sum[2][4] = {};
  simmim_fast::multiply<32>(sum, simmim_fast::operand<kOrderA, kStrideA>(a),
                            simmim_fast::operand<kOrderB, kStrideB>(b));
  simmim_fast::store_result<16>(out, sum);
}

// Copies rows of 16 bytes, every second one being zeros, and reads the neighbour's with or without waiting.
__global__ void copy(const unsigned char* from, unsigned char* to, bool wait) {
  struct Row {
    alignas(16) unsigned char bytes[16];
  };
  Row* rows = &simmim_fast::dynamic_shared<Row>();
  simmim_fast::copy_async(rows + threadIdx.x, from + 16 * threadIdx.x, threadIdx.x % 2 == 0);
  if (wait) simmim_fast::wait_for_copies();
  __syncthreads();
  std::memcpy(to + 16 * threadIdx.x, rows + threadIdx.x, sizeof(Row));
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void run_block_sums(const int* values, int* out, int blocks) {
  host_cuda::launch(dim3(blocks), dim3(kThreads), [=] { block_sums(values, out); });
}

EXPORT void run_lanes(int* out) {
  host_cuda::launch(dim3(1), dim3(kThreads), [=] { lanes(out); });
}

EXPORT void run_read_neighbour(int* out, int direction, bool with_barrier) {
  host_cuda::launch(dim3(2), dim3(kThreads), [=] { read_neighbour(out, direction, with_barrier); });
}

// The error's message, or "".
std::string error_of(void (*kernel)()) {
  try {
    host_cuda::launch(dim3(1), dim3(kThreads), kernel);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

EXPORT const char* run_deadlock() {
  static const std::string message = error_of(deadlock);
  return message.c_str();
}

EXPORT const char* run_partial_mask() {
  static const std::string message = error_of(partial_mask);
  return message.c_str();
}

EXPORT void run_early_exit(int* out) {
  host_cuda::launch(dim3(1), dim3(kThreads), [=] { early_exit(out); });
}

EXPORT void run_mma(const void* a, const void* b, float* sum, bool bf16) {
  using simmim_fast::BFloat16, simmim_fast::Half;
  const auto run = [=](auto type) {
    using T = decltype(type);
    host_cuda::launch(dim3(1), dim3(32), [=] { mma(static_cast<const T*>(a), static_cast<const T*>(b), sum); });
  };
  bf16 ? run(BFloat16()) : run(Half());
}

EXPORT void run_load_matrices(const uint16_t* matrices, uint32_t* out, bool transposed) {
  host_cuda::launch(dim3(1), dim3(32),
                    [=] { transposed ? load_matrices<true>(matrices, out) : load_matrices<false>(matrices, out); });
}

template <typename T, simmim_fast::Order kOrderA, simmim_fast::Order kOrderB>
void launch_multiply(const void* a, const void* b, float* out) {
  using simmim_fast::kPadding, simmim_fast::Order;
  constexpr int kStrideA = (kOrderA == Order::kRows ? 32 : 16) + kPadding<T>;
  constexpr int kStrideB = (kOrderB == Order::kRows ? 16 : 32) + kPadding<T>;
  host_cuda::launch(dim3(1), dim3(32), [=] {
    multiply<T, kOrderA, kOrderB, kStrideA, kStrideB>(static_cast<const T*>(a), static_cast<const T*>(b), out);
  });
}

EXPORT void run_multiply(const void* a, const void* b, float* out, bool bf16, bool a_by_rows, bool b_by_rows) {
  using simmim_fast::Order;
  const auto run = [=](auto type) {
    using T = decltype(type);
    if (a_by_rows && b_by_rows) return launch_multiply<T, Order::kRows, Order::kRows>(a, b, out);
    if (a_by_rows) return launch_multiply<T, Order::kRows, Order::kColumns>(a, b, out);
    if (b_by_rows) return launch_multiply<T, Order::kColumns, Order::kRows>(a, b, out);
    launch_multiply<T, Order::kColumns, Order::kColumns>(a, b, out);
  };
  bf16 ? run(simmim_fast::BFloat16()) : run(float());
}

EXPORT void run_copy(const unsigned char* from, unsigned char* to, bool wait) {
  host_cuda::launch(dim3(1), dim3(kThreads), [=] { copy(from, to, wait); }, kThreads * 16);
}
