// The operator substitute_mask_tokens on the CPU: the choice of the SIMD level, and how the work is split among
// threads. The kernels are compiled once per level, in substitute_mask_tokens_kernels.cpp.

#include "cpu/substitute_mask_tokens_kernels.h"

#include <torch/csrc/stable/library.h>

#include "cpu/sum_partials.h"

namespace simmim_fast::substitute_mask_tokens {
namespace {

template <typename X, typename Out>
void run_forward(const ForwardArgs<X, Out>& args) {
  const Kernels<X, Out> kernels = choose_kernels<Kernels<X, Out>>();
  torch::stable::parallel_for(0, args.rows, grain(args.channels),
                              [&](int64_t begin, int64_t end) { kernels.forward(args, begin, end); });
}

template <typename X, typename Out>
void run_backward(const BackwardArgs<X, Out>& args) {
  const Kernels<X, Out> kernels = choose_kernels<Kernels<X, Out>>();
  const int64_t chunk_elements = std::min(args.batch, Chunks::kImages) * Chunks::kPositions * args.channels;
  torch::stable::parallel_for(0, args.chunks.count(), grain(chunk_elements),
                              [&](int64_t begin, int64_t end) { kernels.backward(args, begin, end); });
}

Tensor forward_cpu(const Tensor& x, const Tensor& mask, const Tensor& mask_token,
                   const std::optional<Tensor>& pos_embed) {
  return forward(x, mask, mask_token, pos_embed, [](const auto& args) { run_forward(args); });
}

std::tuple<Tensor, Tensor, Tensor> backward_cpu(const Tensor& grad_out, const Tensor& mask,
                                                std::optional<ScalarType> x_dtype,
                                                std::optional<ScalarType> token_dtype,
                                                std::optional<ScalarType> pos_dtype) {
  const auto run = [](const auto& args) { run_backward(args); };
  return backward(grad_out, mask, x_dtype, token_dtype, pos_dtype, run, sum_partials);
}

}  // namespace
}  // namespace simmim_fast::substitute_mask_tokens

STABLE_TORCH_LIBRARY_IMPL(simmim_fast, CPU, m) {
  namespace op = simmim_fast::substitute_mask_tokens;
  m.impl("substitute_mask_tokens_native", TORCH_BOX(&op::forward_cpu));
  m.impl("substitute_mask_tokens_native_backward", TORCH_BOX(&op::backward_cpu));
}
