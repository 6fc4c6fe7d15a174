// The operator linear_masked_loss on the CPU: checks, allocation, choice of the SIMD level.
// The kernels are compiled once per level, in linear_masked_loss_kernels.cpp.

#include "cpu/linear_masked_loss.h"

#include <torch/csrc/stable/library.h>

namespace simmim_fast::linear_masked_loss {
namespace {

Loss loss_of(int64_t number) {
  check(number >= 0 && number <= 2, "loss: expected 0, 1 or 2, got ", number);
  return static_cast<Loss>(number);
}

// Of the slopes that the forward keeps, for features of `dtype`.
ScalarType slope_dtype(Loss loss, ScalarType dtype) { return loss == Loss::kL1 ? ScalarType::Char : dtype; }

// Rows of the gradient of tokens that were not computed: 0.
template <typename F>
void clear_rows(const std::vector<Row>& rows, int64_t tokens, int64_t depth, F* grad_features) {
  std::vector<bool> computed(tokens);
  for (const Row& row : rows) computed[row.token] = true;
  for (int64_t token = 0; token < tokens; ++token)
    if (!computed[token]) std::fill_n(grad_features + token * depth, depth, F(0));
}

// Returns loss (), slope (batch, slots, outputs) or (0), and scale (): what the gradient of the loss is multiplied by.
std::tuple<Tensor, Tensor, Tensor> forward_cpu(const Tensor& features, const Tensor& weight, const Tensor& bias,
                                               const Tensor& target, const Tensor& mask,
                                               const std::optional<Tensor>& tokens, const std::optional<Tensor>& mean,
                                               const std::optional<Tensor>& std, int64_t patch_size, int64_t loss_kind,
                                               bool keep_slope) {
  masked_loss::check_arguments(target, mask, patch_size, mean, std);
  const Sizes sizes = check_sizes(features, weight, mask, tokens, target.size(1), patch_size);
  check_shape(bias, "bias", {sizes.outputs});
  const ScalarType dtype = features.scalar_type();
  const ScalarType compute = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const bool bytes = target.scalar_type() == ScalarType::Byte;
  const Tensor from = dense(features), matrix = dense(weight), offset = dense(bias, compute), hidden = dense(mask);
  const Tensor towards = dense(target, bytes ? ScalarType::Byte : compute), listed = tokens ? dense(*tokens) : Tensor();
  const Tensor means = mean ? dense(*mean, compute) : Tensor(), stds = std ? dense(*std, compute) : Tensor();
  const bool* hidden_data = hidden.const_data_ptr<bool>();
  const auto [rows, masked] = find_rows(sizes, hidden_data, tokens ? listed.const_data_ptr<int32_t>() : nullptr);
  const Tensor loss = torch::stable::new_empty(features, {}, compute), scale = torch::stable::new_empty(loss, {});
  const Loss kind = loss_of(loss_kind);
  const ScalarType slopes = slope_dtype(kind, dtype);
  Tensor slope = keep_slope ? torch::stable::new_empty(features, {sizes.batch, sizes.slots, sizes.outputs}, slopes)
                            : torch::stable::new_empty(features, {0}, slopes);
  if (int64_t(rows.size()) < sizes.batch * sizes.slots) torch::stable::zero_(slope);
  dispatch_floating(dtype, [&](auto type) {
    using F = typename decltype(type)::type;
    using Compute = Accumulator<F>;
    const ForwardArgs<F> args{rows.data(),
                              int64_t(rows.size()),
                              from.const_data_ptr<F>(),
                              matrix.const_data_ptr<F>(),
                              offset.const_data_ptr<Compute>(),
                              towards.const_data_ptr(),
                              bytes,
                              hidden_data,
                              mean ? means.const_data_ptr<Compute>() : nullptr,
                              std ? stds.const_data_ptr<Compute>() : nullptr,
                              keep_slope ? slope.mutable_data_ptr() : nullptr,
                              kind,
                              sizes};
    const double sum = choose_kernels<Kernels<F>>().forward(args);
    const Compute factor = masked_loss::loss_scale<Compute>(masked, sizes.channels);
    *scale.mutable_data_ptr<Compute>() = factor;
    *loss.mutable_data_ptr<Compute>() = Compute(sum * factor);
  });
  return {loss, slope, scale};
}

std::tuple<Tensor, Tensor, Tensor> backward_cpu(const Tensor& grad_loss, const Tensor& features, const Tensor& weight,
                                                const Tensor& slope, const Tensor& scale, const Tensor& mask,
                                                const std::optional<Tensor>& tokens, int64_t channels,
                                                int64_t patch_size, int64_t loss_kind, bool needs_features,
                                                bool needs_weight, bool needs_bias) {
  const Sizes sizes = check_sizes(features, weight, mask, tokens, channels, patch_size);
  check_shape(slope, "slope", {sizes.batch, sizes.slots, sizes.outputs});
  check_dtype(slope, "slope", slope_dtype(loss_of(loss_kind), features.scalar_type()));
  check_shape(grad_loss, "grad_loss", {});
  const ScalarType dtype = features.scalar_type();
  const Tensor from = dense(features), matrix = dense(weight), slopes = dense(slope), hidden = dense(mask);
  const Tensor listed = tokens ? dense(*tokens) : Tensor();
  const std::vector<Row> rows =
      find_rows(sizes, hidden.const_data_ptr<bool>(), tokens ? listed.const_data_ptr<int32_t>() : nullptr).first;
  const auto allocate = [&](bool wanted, const Tensor& like) {
    return wanted ? torch::stable::new_empty(like, like.sizes(), dtype) : torch::stable::new_empty(features, {0});
  };
  const Tensor grad_features = allocate(needs_features, features), grad_weight = allocate(needs_weight, weight);
  const Tensor grad_bias = torch::stable::new_empty(features, {needs_bias ? sizes.outputs : 0});
  dispatch_floating(dtype, [&](auto type) {
    using F = typename decltype(type)::type;
    using Compute = Accumulator<F>;
    const Tensor grad = dense(grad_loss, scale.scalar_type());
    const BackwardArgs<F> args{rows.data(),
                               int64_t(rows.size()),
                               from.const_data_ptr<F>(),
                               matrix.const_data_ptr<F>(),
                               slopes.const_data_ptr(),
                               *grad.const_data_ptr<Compute>() * *scale.const_data_ptr<Compute>(),
                               needs_features ? grad_features.mutable_data_ptr<F>() : nullptr,
                               needs_weight ? grad_weight.mutable_data_ptr<F>() : nullptr,
                               needs_bias ? grad_bias.mutable_data_ptr<F>() : nullptr,
                               loss_of(loss_kind),
                               sizes};
    if (needs_features) clear_rows(rows, sizes.batch * sizes.height * sizes.width, sizes.depth, args.grad_features);
    choose_kernels<Kernels<F>>().backward(args);
  });
  return {grad_features, grad_weight, grad_bias};
}

}  // namespace
}  // namespace simmim_fast::linear_masked_loss

STABLE_TORCH_LIBRARY_IMPL(simmim_fast, CPU, m) {
  namespace op = simmim_fast::linear_masked_loss;
  m.impl("linear_masked_loss_native", TORCH_BOX(&op::forward_cpu));
  m.impl("linear_masked_loss_native_backward", TORCH_BOX(&op::backward_cpu));
}
