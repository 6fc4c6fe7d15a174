// The second stage of sums over chunks, always in the same order.

#pragma once

#include "cuda/common.cuh"

namespace simmim_fast {
namespace {

constexpr int kThreads = 256;

// Adds up `sums` over threadIdx.y, always in the same order; the result is that of threadIdx.y == 0.
template <int V, typename Sum>
__device__ void sum_over_rows(Sum (&sums)[V]) {
  __shared__ Sum shared[kThreads * V];
  Sum* mine = shared + (threadIdx.y * blockDim.x + threadIdx.x) * V;
#pragma unroll
  for (int i = 0; i < V; ++i) mine[i] = sums[i];
  for (unsigned half = blockDim.y / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.y < half) {
#pragma unroll
      for (int i = 0; i < V; ++i) mine[i] = sums[i] += mine[half * blockDim.x * V + i];
    }
  }
}

// out (width) = partials (count, width) summed over count in float64. One thread: one column, every blockDim.y-th
// chunk.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    sum_partials_kernel(const T* partials, T* out, int64_t count, int64_t width) {
  const int64_t column = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  double sum[1] = {};
  if (column < width)
    for (int64_t chunk = threadIdx.y; chunk < count; chunk += blockDim.y) sum[0] += partials[chunk * width + column];
  sum_over_rows<1>(sum);
  if (threadIdx.y == 0 && column < width) out[column] = T(sum[0]);
}

template <typename T>
void launch_sum(const Stream& stream, const Tensor& partials, const Tensor& out) {
  const int64_t count = partials.size(0), width = out.numel();
  unsigned y = 1;
  while (y < 32 && y < count) y *= 2;
  const dim3 block(kThreads / y, y);
  launch(stream, sum_partials_kernel<T>, dim3(blocks_for(width, block.x)), block, partials.const_data_ptr<T>(),
         out.mutable_data_ptr<T>(), count, width);
}

Tensor sum_partials(const Stream& stream, const Tensor& partials) {
  const Tensor out = torch::stable::new_empty(partials, partials.sizes().slice(1));
  if (out.numel() == 0) return out;
  const bool is_double = partials.scalar_type() == ScalarType::Double;
  is_double ? launch_sum<double>(stream, partials, out) : launch_sum<float>(stream, partials, out);
  return out;
}

}  // namespace
}  // namespace simmim_fast
