// Forward and backward of substitute_mask_tokens over ranges of work: rows of channels, memory-bound.
// Compiled once per SIMD level.

#include "cpu/substitute_mask_tokens_kernels.h"

#include "cpu/buffer.h"

namespace simmim_fast::SIMMIM_FAST_LEVEL {
namespace {

using substitute_mask_tokens::BackwardArgs;
using substitute_mask_tokens::Chunks;
using substitute_mask_tokens::ForwardArgs;

template <typename From, typename To>
inline __attribute__((always_inline)) void copy(const From* __restrict from, To* __restrict to, int64_t count) {
  if constexpr (std::is_same_v<From, To>) {
    std::copy_n(from, count, to);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = To(from[i]);
  }
}

// Half types are added in float32 and rounded once.
template <typename From, typename To>
inline __attribute__((always_inline)) void add_rows(const From* __restrict a, const To* __restrict b, To* __restrict to,
                                                    int64_t channels) {
  using Compute = Accumulator<To>;
  for (int64_t c = 0; c < channels; ++c) to[c] = To(Compute(a[c]) + Compute(b[c]));
}

template <typename From, typename Sum>
inline __attribute__((always_inline)) void accumulate_row(const From* __restrict from, Sum* __restrict sum,
                                                          int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) sum[c] += Sum(from[c]);
}

template <typename X, typename Out>
void add_positions(const ForwardArgs<X, Out>& args, int64_t begin, int64_t end) {
  const int64_t channels = args.channels;
  for (int64_t row = begin; row < end; ++row) {
    const Out* pos = args.pos_embed + row % args.positions * channels;
    Out* out = args.out + row * channels;
    args.mask[row] ? add_rows(args.token, pos, out, channels) : add_rows(args.x + row * channels, pos, out, channels);
  }
}

// SimMIM hides whole cells, so neighbours are alike: visible ones are copied in one go.
template <typename X, typename Out>
void select(const ForwardArgs<X, Out>& args, int64_t begin, int64_t end) {
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
void backward_chunk(const BackwardArgs<X, Out>& args, int64_t chunk) {
  using Sum = Accumulator<Out>;
  const Chunks& chunks = args.chunks;
  const int64_t channels = args.channels;
  const int64_t image_chunk = chunk / chunks.of_positions;
  const int64_t first_image = image_chunk * Chunks::kImages, first = chunk % chunks.of_positions * Chunks::kPositions;
  const int64_t last_image = std::min(first_image + Chunks::kImages, args.batch);
  const int64_t last = std::min(first + Chunks::kPositions, args.positions);
  Sum* token_sum = args.token_partials ? args.token_partials + chunk * channels : nullptr;
  Sum* pos_sums = args.pos_partials ? args.pos_partials + image_chunk * args.positions * channels : nullptr;
  // An image's rows are added up by themselves: 256 in one chain would round too often.
  const Buffer<Sum> image_sum(token_sum ? channels : 0);
  if (token_sum) std::fill_n(token_sum, channels, Sum(0));
  if (pos_sums) std::fill_n(pos_sums + first * channels, (last - first) * channels, Sum(0));
  for (int64_t image = first_image; image < last_image; ++image) {
    if (token_sum) std::fill_n(image_sum.get(), channels, Sum(0));
    for (int64_t position = first; position < last; ++position) {
      const int64_t row = image * args.positions + position;
      const Out* grad = args.grad_out + row * channels;
      X* grad_x = args.grad_x ? args.grad_x + row * channels : nullptr;
      const bool masked = args.mask[row];
      if (grad_x && masked) std::fill_n(grad_x, channels, X(0));
      if (grad_x && !masked) copy(grad, grad_x, channels);
      if (token_sum && masked) accumulate_row(grad, image_sum.get(), channels);
      if (pos_sums) accumulate_row(grad, pos_sums + position * channels, channels);
    }
    if (token_sum) accumulate_row(image_sum.get(), token_sum, channels);
  }
}

template <typename X, typename Out>
void forward(const ForwardArgs<X, Out>& args, int64_t begin, int64_t end) {
  args.pos_embed ? add_positions(args, begin, end) : select(args, begin, end);
}

template <typename X, typename Out>
void backward(const BackwardArgs<X, Out>& args, int64_t begin, int64_t end) {
  for (int64_t chunk = begin; chunk < end; ++chunk) backward_chunk(args, chunk);
}

}  // namespace
}  // namespace simmim_fast::SIMMIM_FAST_LEVEL

namespace simmim_fast::substitute_mask_tokens {

template <typename X, typename Out>
template <Simd kAt>
Kernels<X, Out> Kernels<X, Out>::at() {
  namespace level = SIMMIM_FAST_LEVEL;
  return {&level::forward<X, Out>, &level::backward<X, Out>};
}

template Kernels<float, float> Kernels<float, float>::at<kLevel>();
template Kernels<double, double> Kernels<double, double>::at<kLevel>();
template Kernels<BFloat16, BFloat16> Kernels<BFloat16, BFloat16>::at<kLevel>();
template Kernels<Half, Half> Kernels<Half, Half>::at<kLevel>();
template Kernels<BFloat16, float> Kernels<BFloat16, float>::at<kLevel>();
template Kernels<Half, float> Kernels<Half, float>::at<kLevel>();

}  // namespace simmim_fast::substitute_mask_tokens
