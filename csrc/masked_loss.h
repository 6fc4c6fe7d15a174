// What the implementations of masked_l1_loss and linear_masked_loss share: checks of target and mask, the target's
// normalisation, the denominator, and for masked_l1_loss allocation and chunks. The kernels come in as functions.
// Formulas: simmim_fast/ops/masked_l1_loss. Shapes: prediction and target (batch, channels, height, width), mask
// (batch, height / patch, width / patch).

#pragma once

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>

#include "checks.h"
#include "integers.h"

namespace simmim_fast::masked_loss {

// How a channel of the target is read: value * scale + shift. Float targets as they are, bytes as (value / 255 - mean)
// / std.
template <typename Compute>
struct Level {
  Compute scale = 1;
  Compute shift = 0;
};

template <typename Compute>
SIMMIM_FAST_HOST_DEVICE inline Level<Compute> level(const Compute* mean, const Compute* std, int64_t channel) {
  if (!mean) return {};
  const Compute inverse = 1 / std[channel];
  return {inverse * (Compute(1) / 255), -mean[channel] * inverse};
}

// 1 / (masked pixels + 1e-5) / channels. The official mask is an integer, so that there the denominator is rounded to
// float32, whatever the dtype of the loss.
template <typename Compute>
SIMMIM_FAST_HOST_DEVICE inline Compute loss_scale(int64_t masked_pixels, int64_t channels) {
  const float denominator = static_cast<float>(masked_pixels) + 1e-5f;
  return Compute(1) / Compute(denominator) / Compute(channels);
}

// The dtype in which kernels read the target beside predictions of `dtype`.
inline ScalarType target_dtype(ScalarType target, ScalarType dtype) {
  if (target == ScalarType::Byte || target == dtype) return target;
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls f(Type<P>, Type<T>) for predictions of P beside a target of T.
template <typename F>
void dispatch(ScalarType prediction, ScalarType target, F&& f) {
  dispatch_floating(prediction, [&](auto type) {
    if (target == prediction) return f(type, type);
    if (target == ScalarType::Byte) return f(type, Type<uint8_t>{});
    if constexpr (!std::is_same_v<decltype(type), Type<double>>)
      if (target == ScalarType::Float) return f(type, Type<float>{});
    check(false, "target: no kernel for ", target, " beside ", prediction);
  });
}

inline void check_arguments(const Tensor& target, const Tensor& mask, int64_t patch_size,
                            const std::optional<Tensor>& mean, const std::optional<Tensor>& std) {
  check_rank(target, "target", 4);
  check(patch_size > 0, "patch_size: expected a positive integer, got ", patch_size);
  const int64_t height = target.size(2), width = target.size(3);
  check(height % patch_size == 0 && width % patch_size == 0, "target: expected sides that are multiples of ",
        patch_size, ", got ", shape_text(target.sizes()));
  check_dtype(mask, "mask", ScalarType::Bool);
  check_shape(mask, "mask", {target.size(0), height / patch_size, width / patch_size});
  check_same_device(mask, "mask", target, "target");
  const bool bytes = target.scalar_type() == ScalarType::Byte;
  check(bool(mean) == bytes && bool(std) == bytes, "mean and std: expected for a uint8 target, and only there");
  if (!bytes) return;
  check_shape(*mean, "mean", {target.size(1)});
  check_shape(*std, "std", {target.size(1)});
  check_same_device(*mean, "mean", target, "target");
  check_same_device(*std, "std", target, "target");
}

// A row is one line of one channel of one image. A chunk is kChunkRows of them: the same for any number of threads.
constexpr int64_t kChunkRows = 16;

template <typename P, typename T>
struct ForwardArgs {
  using Compute = Accumulator<P>;
  const P* prediction;  // (rows, width)
  const T* target;      // (rows, width)
  const bool* mask;     // (batch, height / patch, width / patch)
  const Compute* mean;  // (channels) or null
  const Compute* std;   // (channels) or null
  int8_t* sign;         // (rows, width) or null: that of prediction - target where masked, else 0
  double* sums;         // (chunks): of the absolute residuals
  int64_t* counts;      // (chunks): masked pixels, of the first channel alone
  int64_t rows;
  int64_t channels;
  int64_t height;
  int64_t width;
  int64_t patch;

  SIMMIM_FAST_HOST_DEVICE int64_t chunks() const { return ceil_div(rows, kChunkRows); }
  // Divisions in 32 bits, which GPUs have no slow subroutine for.
  SIMMIM_FAST_HOST_DEVICE int64_t channel(int64_t row) const { return narrow(row) / narrow(height) % narrow(channels); }
  SIMMIM_FAST_HOST_DEVICE const bool* mask_row(int64_t row) const {
    const int64_t image = narrow(row) / narrow(height * channels), cell = narrow(row) % narrow(height) / narrow(patch);
    return mask + (image * (narrow(height) / narrow(patch)) + cell) * (narrow(width) / narrow(patch));
  }
  SIMMIM_FAST_HOST_DEVICE static uint32_t narrow(int64_t value) { return static_cast<uint32_t>(value); }
};

template <typename P>
struct BackwardArgs {
  using Compute = Accumulator<P>;
  const Compute* grad_loss;  // ()
  const Compute* scale;      // ()
  const int8_t* sign;        // (pixels)
  P* grad_prediction;        // (pixels)
  int64_t pixels;
};

// run(ForwardArgs) fills sign and the sums of every chunk; finish(sums, counts, chunks, channels, loss, scale) adds the
// chunks up. Returns loss (), sign like prediction or (0), and scale (): what the gradient of the loss is multiplied
// by.
template <typename Run, typename Finish>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& prediction, const Tensor& target, const Tensor& mask,
                                           const std::optional<Tensor>& mean, const std::optional<Tensor>& std,
                                           int64_t patch_size, bool keep_sign, Run&& run, Finish&& finish) {
  check_arguments(target, mask, patch_size, mean, std);
  check(prediction.sizes().equals(target.sizes()), "prediction: expected shape ", shape_text(target.sizes()), ", got ",
        shape_text(prediction.sizes()));
  check_same_device(prediction, "prediction", target, "target");
  const ScalarType dtype = prediction.scalar_type();
  const ScalarType compute = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const int64_t channels = target.size(1), height = target.size(2), width = target.size(3);
  const int64_t rows = target.size(0) * channels * height;
  check(rows <= std::numeric_limits<uint32_t>::max(), "prediction: expected fewer than 2^32 lines, got ", rows);
  const Tensor from = dense(prediction), hidden = dense(mask);
  const Tensor towards = dense(target, target_dtype(target.scalar_type(), dtype));
  const Tensor means = mean ? dense(*mean, compute) : Tensor(), stds = std ? dense(*std, compute) : Tensor();
  const auto allocate = [&](std::initializer_list<int64_t> shape, ScalarType of) {
    return torch::stable::new_empty(prediction, {shape.begin(), shape.size()}, of);
  };
  const Tensor loss = allocate({}, compute), scale = allocate({}, compute);
  const Tensor sign = keep_sign ? torch::stable::new_empty(prediction, prediction.sizes(), ScalarType::Char)
                                : allocate({0}, ScalarType::Char);
  const int64_t chunks = ceil_div(rows, kChunkRows);
  const Tensor sums = allocate({chunks}, ScalarType::Double), counts = allocate({chunks}, ScalarType::Long);
  dispatch(dtype, towards.scalar_type(), [&](auto prediction_type, auto target_type) {
    using P = typename decltype(prediction_type)::type;
    using T = typename decltype(target_type)::type;
    using Compute = Accumulator<P>;
    double* sum = sums.mutable_data_ptr<double>();
    int64_t* count = counts.mutable_data_ptr<int64_t>();
    run(ForwardArgs<P, T>{
        from.const_data_ptr<P>(), towards.const_data_ptr<T>(), hidden.const_data_ptr<bool>(),
        mean ? means.const_data_ptr<Compute>() : nullptr, std ? stds.const_data_ptr<Compute>() : nullptr,
        keep_sign ? sign.mutable_data_ptr<int8_t>() : nullptr, sum, count, rows, channels, height, width, patch_size});
    finish(static_cast<const double*>(sum), static_cast<const int64_t*>(count), chunks, channels,
           loss.mutable_data_ptr<Compute>(), scale.mutable_data_ptr<Compute>());
  });
  return {loss, sign, scale};
}

// run(BackwardArgs) fills the gradient: sign * grad_loss * scale.
template <typename Run>
Tensor backward(const Tensor& grad_loss, const Tensor& sign, const Tensor& scale, ScalarType prediction_dtype,
                Run&& run) {
  const ScalarType compute = prediction_dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check_shape(grad_loss, "grad_loss", {});
  check_shape(scale, "scale", {});
  check_dtype(scale, "scale", compute);
  check_dtype(sign, "sign", ScalarType::Char);
  check_same_device(sign, "sign", grad_loss, "grad_loss");
  check_same_device(scale, "scale", grad_loss, "grad_loss");
  const Tensor factor = dense(grad_loss, compute), signs = dense(sign);
  const Tensor grad = torch::stable::new_empty(sign, sign.sizes(), prediction_dtype);
  dispatch_floating(prediction_dtype, [&](auto type) {
    using P = typename decltype(type)::type;
    using Compute = Accumulator<P>;
    run(BackwardArgs<P>{factor.const_data_ptr<Compute>(), scale.const_data_ptr<Compute>(),
                        signs.const_data_ptr<int8_t>(), grad.mutable_data_ptr<P>(), sign.numel()});
  });
  return grad;
}

}  // namespace simmim_fast::masked_loss
