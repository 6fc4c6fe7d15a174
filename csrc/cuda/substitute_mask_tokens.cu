// substitute_mask_tokens on the GPU: memory-bound, so a masked token's x is never read, and rows move 16 bytes at a
// time.

#include "substitute_mask_tokens.h"

#include "cuda/sum_partials.cuh"

namespace simmim_fast::substitute_mask_tokens {
namespace {

// A block of (x, y) threads: x along the vectors of a row, y along the rows.
dim3 block_shape(int64_t vectors) {
  unsigned x = 1;
  while (x < 32 && x < vectors) x *= 2;
  return dim3(x, kThreads / x);
}

// out = token where masked, else x, plus the position. One thread: V channels of every (gridDim.x * blockDim.y)-th row.
// Reads mask, visible x, positions; writes out. Rounds once, to Out.
template <typename X, typename Out, int V>
__global__ void __launch_bounds__(kThreads) substitute_mask_tokens_fwd_kernel(const ForwardArgs<X, Out> args) {
  using Compute = Accumulator<Out>;
  const int64_t step = int64_t(gridDim.x) * blockDim.y;
  const int64_t channel = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * V;
  if (channel >= args.channels) return;
  const Vector<Out, V> token = load<V>(args.token + channel);
  const int64_t first = int64_t(blockIdx.x) * blockDim.y + threadIdx.y, position_step = step % args.positions;
  int64_t position = first % args.positions;
  for (int64_t row = first; row < args.rows; row += step) {
    Vector<Out, V> out = token;
    if (!args.mask[row]) {
      const Vector<X, V> x = load<V>(args.x + row * args.channels + channel);
#pragma unroll
      for (int i = 0; i < V; ++i) out.values[i] = Out(x.values[i]);
    }
    if (args.pos_embed) {
      const Vector<Out, V> pos = load<V>(args.pos_embed + position * args.channels + channel);
#pragma unroll
      for (int i = 0; i < V; ++i) out.values[i] = Out(Compute(out.values[i]) + Compute(pos.values[i]));
    }
    store<V>(args.out + row * args.channels + channel, out);
    position += position_step;
    if (position >= args.positions) position -= args.positions;
  }
}

// grad_x, and the partial sums of the gradients of token and positions, in one pass over grad_out. One block: one chunk
// (blockIdx.x) and blockDim.x vectors of V channels (blockIdx.y); threadIdx.y along the positions. Sums in float32
// (float64 for float64), images innermost.
template <typename X, typename Out, int V>
__global__ void __launch_bounds__(kThreads) substitute_mask_tokens_bwd_kernel(const BackwardArgs<X, Out> args) {
  using Sum = Accumulator<Out>;
  const Chunks& chunks = args.chunks;
  const int64_t channel = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * V;
  const unsigned of_positions = static_cast<unsigned>(chunks.of_positions);  // no more than blocks
  const int64_t image_chunk = blockIdx.x / of_positions, position_chunk = blockIdx.x % of_positions;
  const int64_t first_image = image_chunk * Chunks::kImages, first = position_chunk * Chunks::kPositions;
  const int64_t last_image = min(first_image + Chunks::kImages, args.batch);
  const int64_t last = channel < args.channels ? min(first + Chunks::kPositions, args.positions) : first;
  Sum token_sum[V] = {};
  for (int64_t position = first + threadIdx.y; position < last; position += blockDim.y) {
    Vector<Sum, V> pos_sum = {};
    int64_t row = first_image * args.positions + position, offset = row * args.channels + channel;
    for (int64_t image = first_image; image < last_image; ++image) {
      const bool masked = args.mask[row];
      Vector<X, V> grad_x = {};
      if (args.pos_partials || (masked ? args.token_partials != nullptr : args.grad_x != nullptr)) {
        const Vector<Out, V> grad = load<V>(args.grad_out + offset);
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const Sum value = Sum(grad.values[i]);
          pos_sum.values[i] += value;
          if (masked) token_sum[i] += value;
          if (!masked) grad_x.values[i] = X(grad.values[i]);
        }
      }
      if (args.grad_x) store<V>(args.grad_x + offset, grad_x);
      row += args.positions;
      offset += args.positions * args.channels;
    }
    if (args.pos_partials) {
      const int64_t sum_row = image_chunk * args.positions + position;
      store<V>(args.pos_partials + sum_row * args.channels + channel, pos_sum);
    }
  }
  if (!args.token_partials) return;
  sum_over_rows<V>(token_sum);
  if (threadIdx.y == 0 && channel < args.channels) {
    Vector<Sum, V> sums;
#pragma unroll
    for (int i = 0; i < V; ++i) sums.values[i] = token_sum[i];
    store<V>(args.token_partials + int64_t(blockIdx.x) * args.channels + channel, sums);
  }
}

template <int V, typename X, typename Out>
void launch_forward(const Stream& stream, const ForwardArgs<X, Out>& args) {
  constexpr int64_t kRowsPerThread = 4;
  const int64_t vectors = args.channels / V;
  const dim3 block = block_shape(vectors);
  const dim3 grid(blocks_for(args.rows, block.y * kRowsPerThread), blocks_for(vectors, block.x));
  launch(stream, substitute_mask_tokens_fwd_kernel<X, Out, V>, grid, block, args);
}

template <int V, typename X, typename Out>
void launch_backward(const Stream& stream, const BackwardArgs<X, Out>& args) {
  const int64_t vectors = args.channels / V;
  const dim3 block = block_shape(vectors);
  const dim3 grid(blocks_for(args.chunks.count(), 1), blocks_for(vectors, block.x));
  launch(stream, substitute_mask_tokens_bwd_kernel<X, Out, V>, grid, block, args);
}

Tensor forward_cuda(const Tensor& x, const Tensor& mask, const Tensor& mask_token,
                    const std::optional<Tensor>& pos_embed) {
  const Stream stream(x);
  return forward(x, mask, mask_token, pos_embed, [&](const auto& args) {
    constexpr int kVector = 16 / sizeof(*args.out);
    if (args.rows == 0 || args.channels == 0) return;
    const bool aligned = is_aligned<kVector>(args.channels, args.x, args.token, args.pos_embed, args.out);
    aligned ? launch_forward<kVector>(stream, args) : launch_forward<1>(stream, args);
  });
}

std::tuple<Tensor, Tensor, Tensor> backward_cuda(const Tensor& grad_out, const Tensor& mask,
                                                 std::optional<ScalarType> x_dtype,
                                                 std::optional<ScalarType> token_dtype,
                                                 std::optional<ScalarType> pos_dtype) {
  const Stream stream(grad_out);
  const auto run = [&](const auto& args) {
    constexpr int kVector = 16 / sizeof(*args.grad_out);
    if (args.chunks.count() == 0 || args.channels == 0) return;
    const bool aligned =
        is_aligned<kVector>(args.channels, args.grad_out, args.grad_x, args.token_partials, args.pos_partials);
    aligned ? launch_backward<kVector>(stream, args) : launch_backward<1>(stream, args);
  };
  return backward(grad_out, mask, x_dtype, token_dtype, pos_dtype, run,
                  [&](const Tensor& partials) { return sum_partials(stream, partials); });
}

}  // namespace
}  // namespace simmim_fast::substitute_mask_tokens

SIMMIM_FAST_CUDA_LIBRARY(m) {
  namespace op = simmim_fast::substitute_mask_tokens;
  m.impl("substitute_mask_tokens_native", TORCH_BOX(&op::forward_cuda));
  m.impl("substitute_mask_tokens_native_backward", TORCH_BOX(&op::backward_cuda));
}
