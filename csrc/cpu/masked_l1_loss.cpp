// The operator masked_l1_loss on the CPU: the choice of the SIMD level, and the sum over chunks.
// The kernels are compiled once per level, in masked_l1_loss_kernels.cpp.

#include "cpu/masked_l1_loss.h"

#include <torch/csrc/stable/library.h>

#include "cpu/grain.h"

namespace simmim_fast::masked_loss {
namespace {

template <typename P, typename T>
void run_forward(const ForwardArgs<P, T>& args) {
  const Kernels<P, T> kernels = choose_kernels<Kernels<P, T>>();
  torch::stable::parallel_for(0, args.chunks(), grain(kChunkRows * args.width),
                              [&](int64_t begin, int64_t end) { kernels.forward(args, begin, end); });
}

template <typename P>
void run_backward(const BackwardArgs<P>& args) {
  const Kernels<P, P> kernels = choose_kernels<Kernels<P, P>>();
  torch::stable::parallel_for(0, args.pixels, grain(1),
                              [&](int64_t begin, int64_t end) { kernels.backward(args, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor> forward_cpu(const Tensor& prediction, const Tensor& target, const Tensor& mask,
                                               const std::optional<Tensor>& mean, const std::optional<Tensor>& std,
                                               int64_t patch_size, bool keep_sign) {
  const auto run = [](const auto& args) { run_forward(args); };
  const auto finish = [](const double* sums, const int64_t* counts, int64_t chunks, int64_t channels, auto* loss,
                         auto* scale) {
    double sum = 0;
    int64_t count = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      sum += sums[chunk];
      count += counts[chunk];
    }
    using Compute = std::remove_pointer_t<decltype(loss)>;
    *scale = loss_scale<Compute>(count, channels);
    *loss = Compute(sum * *scale);
  };
  return forward(prediction, target, mask, mean, std, patch_size, keep_sign, run, finish);
}

Tensor backward_cpu(const Tensor& grad_loss, const Tensor& sign, const Tensor& scale, ScalarType prediction_dtype) {
  return backward(grad_loss, sign, scale, prediction_dtype, [](const auto& args) { run_backward(args); });
}

}  // namespace
}  // namespace simmim_fast::masked_loss

STABLE_TORCH_LIBRARY_IMPL(simmim_fast, CPU, m) {
  namespace op = simmim_fast::masked_loss;
  m.impl("masked_l1_loss_native", TORCH_BOX(&op::forward_cpu));
  m.impl("masked_l1_loss_native_backward", TORCH_BOX(&op::backward_cpu));
}
