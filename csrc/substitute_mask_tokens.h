// What the CPU and the CUDA implementation of substitute_mask_tokens share: argument checks, allocation, and the chunks
// in which the backward sums. The kernels come in as functions. Formulas: simmim_fast/ops/substitute_mask_tokens.
// Shapes: activations are (batch, positions, channels) with positions = H * W; rows = batch * positions.

#pragma once

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "integers.h"

namespace simmim_fast::substitute_mask_tokens {

// X is the dtype of x, Out that of the result.
template <typename X, typename Out>
struct ForwardArgs {
  const X* x;            // (rows, channels)
  const bool* mask;      // (rows)
  const Out* token;      // (channels)
  const Out* pos_embed;  // (positions, channels) or null
  Out* out;              // (rows, channels)
  int64_t rows;
  int64_t positions;
  int64_t channels;
};

// The chunks of CHUNK_IMAGES by CHUNK_POSITIONS in simmim_fast/ops/substitute_mask_tokens/op.py. They depend on the
// shape alone, not on the number of threads, so a sum repeats bit for bit.
struct Chunks {
  static constexpr int64_t kImages = 16;
  static constexpr int64_t kPositions = 16;

  int64_t of_images;     // chunks along the batch
  int64_t of_positions;  // chunks along the positions

  Chunks(int64_t images, int64_t positions)
      : of_images(ceil_div(images, kImages)), of_positions(ceil_div(positions, kPositions)) {}

  int64_t count() const { return of_images * of_positions; }
};

template <typename X, typename Out>
struct BackwardArgs {
  const Out* grad_out;               // (batch, positions, channels)
  const bool* mask;                  // (batch, positions)
  X* grad_x;                         // (batch, positions, channels) or null
  Accumulator<Out>* token_partials;  // (chunks, channels) or null
  Accumulator<Out>* pos_partials;    // (chunks along the batch, positions, channels) or null
  int64_t batch;
  int64_t positions;
  int64_t channels;
  Chunks chunks;
};

// The kernels know x in the dtype of the result, and half types beside a float32 result. Whatever else may be promoted
// to float64 is converted before (forward) or after (backward).
inline ScalarType kernel_dtype(ScalarType x, ScalarType out) { return out == ScalarType::Double ? out : x; }

// Calls f(Type<X>, Type<Out>).
template <typename F>
void dispatch(ScalarType x, ScalarType out, F&& f) {
  dispatch_floating(out, [&](auto out_type) {
    if (x == out) return f(out_type, out_type);
    if constexpr (std::is_same_v<decltype(out_type), Type<float>>) {
      if (x == ScalarType::BFloat16) return f(Type<BFloat16>{}, out_type);
      if (x == ScalarType::Half) return f(Type<Half>{}, out_type);
    }
    check(false, "x: a result of dtype ", out, " cannot come from ", x);
  });
}

// run(ForwardArgs) fills the result.
template <typename Run>
Tensor forward(const Tensor& x, const Tensor& mask, const Tensor& mask_token, const std::optional<Tensor>& pos_embed,
               Run&& run) {
  check_rank(x, "x", 4);
  const int64_t batch = x.size(0), height = x.size(1), width = x.size(2), channels = x.size(3);
  check_dtype(mask, "mask", ScalarType::Bool);
  check_shape(mask, "mask", {batch, height, width});
  check_same_device(mask, "mask", x, "x");
  check_shape(mask_token, "mask_token", {channels});
  check_same_device(mask_token, "mask_token", x, "x");
  ScalarType dtype = promote(x.scalar_type(), mask_token.scalar_type());
  if (pos_embed) {
    check_shape(*pos_embed, "pos_embed", {height, width, channels});
    check_same_device(*pos_embed, "pos_embed", x, "x");
    dtype = promote(dtype, pos_embed->scalar_type());
  }
  const Tensor from = dense(x, kernel_dtype(x.scalar_type(), dtype)), selected = dense(mask);
  const Tensor token = dense(mask_token, dtype);
  const Tensor positions = pos_embed ? dense(*pos_embed, dtype) : Tensor();
  const Tensor out = torch::stable::new_empty(x, x.sizes(), dtype);
  dispatch(from.scalar_type(), dtype, [&](auto x_type, auto out_type) {
    using X = typename decltype(x_type)::type;
    using Out = typename decltype(out_type)::type;
    run(ForwardArgs<X, Out>{from.const_data_ptr<X>(), selected.const_data_ptr<bool>(), token.const_data_ptr<Out>(),
                            pos_embed ? positions.const_data_ptr<Out>() : nullptr, out.mutable_data_ptr<Out>(),
                            batch * height * width, height * width, channels});
  });
  return out;
}

// run(BackwardArgs) fills grad_x and one partial sum per chunk; sum(partials (n, ...)) adds them up over n. A gradient
// whose dtype is nullopt is not wanted: it comes back with shape (0,).
template <typename Run, typename Sum>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const Tensor& mask,
                                            std::optional<ScalarType> x_dtype, std::optional<ScalarType> token_dtype,
                                            std::optional<ScalarType> pos_dtype, Run&& run, Sum&& sum) {
  check_rank(grad_out, "grad_out", 4);
  const int64_t batch = grad_out.size(0), height = grad_out.size(1), width = grad_out.size(2);
  const int64_t channels = grad_out.size(3);
  check_dtype(mask, "mask", ScalarType::Bool);
  check_shape(mask, "mask", {batch, height, width});
  check_same_device(mask, "mask", grad_out, "grad_out");
  const Tensor from = dense(grad_out), selected = dense(mask);
  const Chunks chunks(batch, height * width);
  const ScalarType dtype = grad_out.scalar_type(), x_kernel_dtype = kernel_dtype(x_dtype.value_or(dtype), dtype);
  const ScalarType sum_dtype = dtype == ScalarType::Double ? dtype : ScalarType::Float;
  const auto allocate = [&](bool wanted, std::initializer_list<int64_t> shape, ScalarType of) {
    return wanted ? torch::stable::new_empty(grad_out, {shape.begin(), shape.size()}, of) : Tensor();
  };
  const Tensor grad_x = allocate(bool(x_dtype), {batch, height, width, channels}, x_kernel_dtype);
  const Tensor token_partials = allocate(bool(token_dtype), {chunks.count(), channels}, sum_dtype);
  const Tensor pos_partials = allocate(bool(pos_dtype), {chunks.of_images, height, width, channels}, sum_dtype);
  dispatch(x_kernel_dtype, dtype, [&](auto x_type, auto out_type) {
    using X = typename decltype(x_type)::type;
    using Out = typename decltype(out_type)::type;
    using Partial = Accumulator<Out>;
    run(BackwardArgs<X, Out>{
        from.const_data_ptr<Out>(), selected.const_data_ptr<bool>(), x_dtype ? grad_x.mutable_data_ptr<X>() : nullptr,
        token_dtype ? token_partials.mutable_data_ptr<Partial>() : nullptr,
        pos_dtype ? pos_partials.mutable_data_ptr<Partial>() : nullptr, batch, height * width, channels, chunks});
  });
  const auto unwanted = [&] { return torch::stable::new_empty(grad_out, {0}); };
  return {x_dtype ? dense(grad_x, *x_dtype) : unwanted(),
          token_dtype ? dense(sum(token_partials), *token_dtype) : unwanted(),
          pos_dtype ? dense(sum(pos_partials), *pos_dtype) : unwanted()};
}

}  // namespace simmim_fast::substitute_mask_tokens
