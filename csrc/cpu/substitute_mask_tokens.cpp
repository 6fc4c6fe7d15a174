// substitute_mask_tokens on the CPU: rows of channels, split among threads; memory-bound.

#include "substitute_mask_tokens.h"

#include <torch/csrc/stable/library.h>

#include "cpu/sum_partials.h"

namespace simmim_fast::substitute_mask_tokens {
namespace {

template <typename From, typename To>
SIMMIM_FAST_INLINE void copy(const From* __restrict from, To* __restrict to, int64_t count) {
  if constexpr (std::is_same_v<From, To>) {
    std::copy_n(from, count, to);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = To(from[i]);
  }
}

// Half types are added in float32 and rounded once.
template <typename From, typename To>
SIMMIM_FAST_INLINE void add_rows(const From* __restrict a, const To* __restrict b, To* __restrict to,
                                 int64_t channels) {
  using Compute = Accumulator<To>;
  for (int64_t c = 0; c < channels; ++c) to[c] = To(Compute(a[c]) + Compute(b[c]));
}

template <typename From, typename Sum>
SIMMIM_FAST_INLINE void accumulate_row(const From* __restrict from, Sum* __restrict sum, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) sum[c] += Sum(from[c]);
}

template <typename X, typename Out>
SIMMIM_FAST_SIMD void add_positions(const ForwardArgs<X, Out>& args, int64_t begin, int64_t end) {
  const int64_t channels = args.channels;
  for (int64_t row = begin; row < end; ++row) {
    const Out* pos = args.pos_embed + row % args.positions * channels;
    Out* out = args.out + row * channels;
    args.mask[row] ? add_rows(args.token, pos, out, channels) : add_rows(args.x + row * channels, pos, out, channels);
  }
}

// SimMIM hides whole cells, so neighbours are alike: visible ones are copied in one go.
template <typename X, typename Out>
SIMMIM_FAST_SIMD void select(const ForwardArgs<X, Out>& args, int64_t begin, int64_t end) {
  const int64_t channels = args.channels;
  for (int64_t row = begin, next; row < end; row = next) {
    next = row + 1;
    const bool masked = args.mask[row];
    while (next < end && args.mask[next] == masked) ++next;
    if (!masked) copy(args.x + row * channels, args.out + row * channels, (next - row) * channels);
    for (int64_t hidden = row; masked && hidden < next; ++hidden)
      copy(args.token, args.out + hidden * channels, channels);
  }
}

template <typename X, typename Out>
SIMMIM_FAST_SIMD void backward_chunk(const BackwardArgs<X, Out>& args, int64_t chunk) {
  using Sum = Accumulator<Out>;
  const Chunks& chunks = args.chunks;
  const int64_t channels = args.channels;
  const int64_t image_chunk = chunk / chunks.of_positions;
  const int64_t first_image = image_chunk * Chunks::kImages, first = chunk % chunks.of_positions * Chunks::kPositions;
  const int64_t last_image = std::min(first_image + Chunks::kImages, args.batch);
  const int64_t last = std::min(first + Chunks::kPositions, args.positions);
  Sum* token_sum = args.token_partials ? args.token_partials + chunk * channels : nullptr;
  Sum* pos_sums = args.pos_partials ? args.pos_partials + image_chunk * args.positions * channels : nullptr;
  if (token_sum) std::fill_n(token_sum, channels, Sum(0));
  if (pos_sums) std::fill_n(pos_sums + first * channels, (last - first) * channels, Sum(0));
  for (int64_t image = first_image; image < last_image; ++image) {
    for (int64_t position = first; position < last; ++position) {
      const int64_t row = image * args.positions + position;
      const Out* grad = args.grad_out + row * channels;
      X* grad_x = args.grad_x ? args.grad_x + row * channels : nullptr;
      const bool masked = args.mask[row];
      if (grad_x && masked) std::fill_n(grad_x, channels, X(0));
      if (grad_x && !masked) copy(grad, grad_x, channels);
      if (token_sum && masked) accumulate_row(grad, token_sum, channels);
      if (pos_sums) accumulate_row(grad, pos_sums + position * channels, channels);
    }
  }
}

Tensor forward_cpu(const Tensor& x, const Tensor& mask, const Tensor& mask_token,
                   const std::optional<Tensor>& pos_embed) {
  return forward(x, mask, mask_token, pos_embed, [](const auto& args) {
    torch::stable::parallel_for(0, args.rows, grain(args.channels), [&](int64_t begin, int64_t end) {
      args.pos_embed ? add_positions(args, begin, end) : select(args, begin, end);
    });
  });
}

std::tuple<Tensor, Tensor, Tensor> backward_cpu(const Tensor& grad_out, const Tensor& mask,
                                                std::optional<ScalarType> x_dtype,
                                                std::optional<ScalarType> token_dtype,
                                                std::optional<ScalarType> pos_dtype) {
  const auto run = [](const auto& args) {
    const int64_t chunk_elements = std::min(args.batch, Chunks::kImages) * Chunks::kPositions * args.channels;
    torch::stable::parallel_for(0, args.chunks.count(), grain(chunk_elements), [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) backward_chunk(args, chunk);
    });
  };
  return backward(grad_out, mask, x_dtype, token_dtype, pos_dtype, run, sum_partials);
}

}  // namespace
}  // namespace simmim_fast::substitute_mask_tokens

STABLE_TORCH_LIBRARY_IMPL(simmim_fast, CPU, m) {
  namespace op = simmim_fast::substitute_mask_tokens;
  m.impl("substitute_mask_tokens_native", TORCH_BOX(&op::forward_cpu));
  m.impl("substitute_mask_tokens_native_backward", TORCH_BOX(&op::backward_cpu));
}
