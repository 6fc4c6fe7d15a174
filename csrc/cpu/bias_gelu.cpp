// The operator bias_gelu on the CPU: checks, allocation, choice of the SIMD level, sums over chunks.
// The kernels are compiled once per level, in bias_gelu_kernels.cpp.

#include "cpu/bias_gelu.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "cpu/sum_partials.h"

namespace simmim_fast::bias_gelu {
namespace {

ScalarType sum_dtype(ScalarType dtype) { return dtype == ScalarType::Double ? dtype : ScalarType::Float; }

int64_t check_inputs(const Tensor& x, const Tensor& bias) {
  check(x.dim() > 0 && x.size(-1) > 0, "x: expected (..., C) with C > 0, got ", shape_text(x.sizes()));
  check_shape(bias, "bias", {x.size(-1)});
  return x.size(-1);
}

Tensor forward_cpu(const Tensor& x, const Tensor& bias) {
  const int64_t channels = check_inputs(x, bias);
  const Tensor from = dense(x), offset = dense(bias, sum_dtype(x.scalar_type()));
  const Tensor out = torch::stable::new_empty(x, x.sizes());
  dispatch_floating(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const ForwardArgs<T> args{from.const_data_ptr<T>(), offset.const_data_ptr<Accumulator<T>>(),
                              out.mutable_data_ptr<T>(), channels};
    torch::stable::parallel_for(0, x.numel() / channels, grain(channels), [&](int64_t begin, int64_t end) {
      choose_kernels<Kernels<T>>().forward(args, begin, end);
    });
  });
  return out;
}

// A result that is not wanted, as a gradient whose dtype is nullopt, comes back with shape (0,).
std::tuple<Tensor, Tensor, Tensor> backward_cpu(const Tensor& grad_out, const Tensor& x, const Tensor& bias,
                                                bool recompute, std::optional<ScalarType> x_dtype,
                                                std::optional<ScalarType> bias_dtype) {
  const int64_t channels = check_inputs(x, bias);
  check(grad_out.sizes().equals(x.sizes()), "grad_out: expected the shape of x, ", shape_text(x.sizes()), ", got ",
        shape_text(grad_out.sizes()));
  check_dtype(grad_out, "grad_out", x.scalar_type());
  const ScalarType sums = sum_dtype(x.scalar_type());
  const Tensor grad = dense(grad_out), from = dense(x), offset = dense(bias, sums);
  const auto nothing = [&] { return torch::stable::new_empty(x, {0}); };
  const Tensor grad_x = x_dtype ? torch::stable::new_empty(x, x.sizes()) : nothing();
  const Tensor out = recompute ? torch::stable::new_empty(x, x.sizes()) : nothing();
  Tensor partials = nothing();
  dispatch_floating(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    BackwardArgs<T> args{grad.const_data_ptr<T>(),
                         from.const_data_ptr<T>(),
                         offset.const_data_ptr<Accumulator<T>>(),
                         x_dtype ? grad_x.mutable_data_ptr<T>() : nullptr,
                         recompute ? out.mutable_data_ptr<T>() : nullptr,
                         nullptr,
                         x.numel() / channels,
                         channels};
    if (bias_dtype) {
      partials = torch::stable::new_empty(x, {args.chunks(), channels}, sums);
      args.partials = partials.mutable_data_ptr<Accumulator<T>>();
    }
    torch::stable::parallel_for(0, args.chunks(), 1, [&](int64_t begin, int64_t end) {
      choose_kernels<Kernels<T>>().backward(args, begin, end);
    });
  });
  return {x_dtype ? dense(grad_x, *x_dtype) : nothing(),
          bias_dtype ? dense(sum_partials(partials), *bias_dtype) : nothing(), out};
}

}  // namespace
}  // namespace simmim_fast::bias_gelu

STABLE_TORCH_LIBRARY_IMPL(simmim_fast, CPU, m) {
  namespace op = simmim_fast::bias_gelu;
  m.impl("bias_gelu_native", TORCH_BOX(&op::forward_cpu));
  m.impl("bias_gelu_native_backward", TORCH_BOX(&op::backward_cpu));
}
