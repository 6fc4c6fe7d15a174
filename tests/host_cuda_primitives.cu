// Kernels that use each primitive of csrc/testing/host_cuda.h, called by test_host_cuda.py through ctypes.

#include "cuda/common.cuh"

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
