// masked_l1_loss on the GPU: memory-bound, so visible pixels are not read, and pixels move 16 bytes at a time.

#include "cuda/common.cuh"
#include "masked_loss.h"

namespace simmim_fast::masked_loss {
namespace {

constexpr int kThreads = 256;
constexpr int kSigns = 16;  // bytes of signs that one thread of the backward takes

struct Partial {
  double sum = 0;
  int64_t count = 0;
};

// Adds up what the threads of a block hand in, always in the same order; the result is that of thread 0.
__device__ Partial sum_over_block(Partial mine) {
  __shared__ double sums[kThreads];
  __shared__ int64_t counts[kThreads];
  const unsigned thread = threadIdx.x;
  sums[thread] = mine.sum;
  counts[thread] = mine.count;
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) {
      sums[thread] = mine.sum += sums[thread + half];
      counts[thread] = mine.count += counts[thread + half];
    }
  }
  __syncthreads();
  return mine;
}

// Absolute residuals and signs of one chunk of rows. One block: every gridDim.x-th chunk; one thread: V neighbouring
// pixels of a row at a time. Reads mask, and prediction and target where masked; writes signs, a sum and a count.
template <typename P, typename T, int V>
__global__ void __launch_bounds__(kThreads) masked_l1_loss_fwd_kernel(const ForwardArgs<P, T> args) {
  using Compute = Accumulator<P>;
  const int64_t chunks = args.chunks();
  const int vectors = static_cast<int>(args.width / V), patch = static_cast<int>(args.patch);
  for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    const int64_t first = chunk * kChunkRows;
    const int items = static_cast<int>(min(kChunkRows, args.rows - first)) * vectors;
    Compute sum = 0;
    int64_t count = 0;
    for (int item = threadIdx.x; item < items; item += kThreads) {
      const int x = item % vectors * V;
      const int64_t row = first + item / vectors, channel = args.channel(row);
      const bool* mask = args.mask_row(row);
      bool hidden[V], any = false;
#pragma unroll
      for (int i = 0; i < V; ++i) any |= hidden[i] = mask[(x + i) / patch];
      Vector<int8_t, V> sign = {};
      if (any) {
        const Level<Compute> level = masked_loss::level(args.mean, args.std, channel);
        const Vector<P, V> prediction = load<V>(args.prediction + row * args.width + x);
        const Vector<T, V> target = load<V>(args.target + row * args.width + x);
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const Compute apart = Compute(prediction.values[i]) - (Compute(target.values[i]) * level.scale + level.shift);
          const Compute residual = hidden[i] ? apart : 0;  // a branch would split the loads on 10.0
          sum += residual < 0 ? -residual : residual;
          count += hidden[i] && channel == 0;
          sign.values[i] = static_cast<int8_t>((residual > 0) - (residual < 0));
        }
      }
      if (args.sign) store<V>(args.sign + row * args.width + x, sign);
    }
    const Partial total = sum_over_block({double(sum), count});
    if (threadIdx.x == 0) {
      args.sums[chunk] = total.sum;
      args.counts[chunk] = total.count;
    }
  }
}

// Adds the chunks up. One block; one thread: every kThreads-th chunk.
template <typename Compute>
__global__ void __launch_bounds__(kThreads)
    masked_l1_loss_sum_kernel(const double* sums, const int64_t* counts, int64_t chunks, int64_t channels,
                              Compute* loss, Compute* scale) {
  Partial mine;
  for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += kThreads) {
    mine.sum += sums[chunk];
    mine.count += counts[chunk];
  }
  const Partial total = sum_over_block(mine);
  if (threadIdx.x > 0) return;
  *scale = loss_scale<Compute>(total.count, channels);
  *loss = Compute(total.sum * *scale);
}

// grad_prediction = sign * grad_loss * scale. One thread: kSigns pixels, or one at a time behind the last whole vector.
template <typename P, int V>
__global__ void __launch_bounds__(kThreads) masked_l1_loss_bwd_kernel(const BackwardArgs<P> args) {
  constexpr int kStore = V == 1 ? 1 : 16 / sizeof(P);
  const typename BackwardArgs<P>::Compute factor = *args.grad_loss * *args.scale;
  const int64_t step = int64_t(gridDim.x) * kThreads * V;
  int64_t pixel = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * V;
  for (; pixel < args.pixels; pixel += step) {
    const Vector<int8_t, V> sign = load<V>(args.sign + pixel);
#pragma unroll
    for (int first = 0; first < V; first += kStore) {
      Vector<P, kStore> grad;
#pragma unroll
      for (int i = 0; i < kStore; ++i) grad.values[i] = P(sign.values[first + i] * factor);
      store<kStore>(args.grad_prediction + pixel + first, grad);
    }
  }
}

template <int V, typename P, typename T>
void launch_forward(const Stream& stream, const ForwardArgs<P, T>& args) {
  launch(stream, masked_l1_loss_fwd_kernel<P, T, V>, dim3(blocks_for(args.chunks(), 1)), dim3(kThreads), args);
}

template <int V, typename P>
void launch_backward(const Stream& stream, const BackwardArgs<P>& args) {
  const dim3 grid(blocks_for(args.pixels, kThreads * V));
  launch(stream, masked_l1_loss_bwd_kernel<P, V>, grid, dim3(kThreads), args);
}

std::tuple<Tensor, Tensor, Tensor> forward_cuda(const Tensor& prediction, const Tensor& target, const Tensor& mask,
                                                const std::optional<Tensor>& mean, const std::optional<Tensor>& std,
                                                int64_t patch_size, bool keep_sign) {
  const Stream stream(prediction);
  const auto run = [&](const auto& args) {
    constexpr int kVector = 16 / sizeof(*args.prediction);
    if (args.rows == 0 || args.width == 0) return;
    const bool aligned = is_aligned<kVector>(args.width, args.prediction, args.target, args.sign);
    aligned ? launch_forward<kVector>(stream, args) : launch_forward<1>(stream, args);
  };
  const auto finish = [&](const double* sums, const int64_t* counts, int64_t chunks, int64_t channels, auto* loss,
                          auto* scale) {
    using Compute = std::remove_pointer_t<decltype(loss)>;
    const int64_t used = prediction.numel() > 0 ? chunks : 0;
    launch(stream, masked_l1_loss_sum_kernel<Compute>, dim3(1), dim3(kThreads), sums, counts, used, channels, loss,
           scale);
  };
  return forward(prediction, target, mask, mean, std, patch_size, keep_sign, run, finish);
}

Tensor backward_cuda(const Tensor& grad_loss, const Tensor& sign, const Tensor& scale, ScalarType prediction_dtype) {
  const Stream stream(grad_loss);
  return backward(grad_loss, sign, scale, prediction_dtype, [&](const auto& args) {
    if (args.pixels == 0) return;
    const bool aligned = is_aligned<kSigns>(args.pixels, args.sign);
    aligned ? launch_backward<kSigns>(stream, args) : launch_backward<1>(stream, args);
  });
}

}  // namespace
}  // namespace simmim_fast::masked_loss

SIMMIM_FAST_CUDA_LIBRARY(m) {
  namespace op = simmim_fast::masked_loss;
  m.impl("masked_l1_loss_native", TORCH_BOX(&op::forward_cuda));
  m.impl("masked_l1_loss_native_backward", TORCH_BOX(&op::backward_cuda));
}
