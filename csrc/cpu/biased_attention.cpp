// The operator biased_attention on the CPU: checks, the bias prepared for the kernels, and the choice of SIMD level.

#include "cpu/biased_attention.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/grain.h"

namespace simmim_fast::biased_attention {
namespace {

// Every query names a token, and no token is named twice.
void check_queries(const Tensor& queries, int64_t tokens) {
  const int32_t* query = queries.const_data_ptr<int32_t>();
  for (int64_t image = 0; image < queries.size(0); ++image) {
    std::vector<bool> named(tokens);
    for (int64_t row = 0; row < queries.size(1); ++row, ++query) {
      check(*query >= 0 && *query < tokens, "queries: expected tokens from 0 to ", tokens - 1, ", got ", *query);
      check(!named[*query], "queries: expected distinct tokens, got ", *query, " twice in image ", image);
      named[*query] = true;
    }
  }
}

// The tensors of a call, dense and checked.
struct Inputs {
  Tensor qkv, bias, queries;
  bool has_bias, has_queries;
  int64_t images, tokens, rows, heads, head_size;
  double scale;

  Inputs(const Tensor& any_qkv, const std::optional<Tensor>& any_bias, const std::optional<Tensor>& any_queries,
         int64_t num_heads, double scale)
      : has_bias(any_bias.has_value()), has_queries(any_queries.has_value()), heads(num_heads), scale(scale) {
    check_rank(any_qkv, "qkv", 3);
    images = any_qkv.size(0), tokens = rows = any_qkv.size(1);
    check(heads > 0 && any_qkv.size(2) % (3 * heads) == 0, "qkv: expected 3 * num_heads * head size channels, got ",
          any_qkv.size(2), " for ", heads, " heads");
    head_size = any_qkv.size(2) / (3 * heads);
    qkv = dense(any_qkv);
    if (has_bias) {
      check_shape(*any_bias, "bias", {heads, tokens, tokens});
      check_same_device(*any_bias, "bias", qkv, "qkv");
      bias = dense(*any_bias);
    }
    if (has_queries) {
      check_rank(*any_queries, "queries", 2);
      rows = any_queries->size(1);
      check_shape(*any_queries, "queries", {images, rows});
      check_dtype(*any_queries, "queries", ScalarType::Int);
      check_same_device(*any_queries, "queries", qkv, "qkv");
      queries = dense(*any_queries);
      check_queries(queries, tokens);
    }
  }

  ScalarType sum_dtype() const {
    return qkv.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  }

  Tensor allocate(std::initializer_list<int64_t> shape, ScalarType dtype) const {
    return torch::stable::new_empty(qkv, {shape.begin(), shape.size()}, dtype);
  }
};

template <typename F>
void for_rows(int64_t rows, int64_t row_elements, F&& f) {
  torch::stable::parallel_for(0, rows, grain(row_elements), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) f(row);
  });
}

// (heads, N, key_stride): the bias times log2(e), -inf past the last key. Without a bias one row of zeros.
template <typename Sum>
Tensor padded_bias(const Inputs& inputs, int64_t key_stride) {
  const int64_t rows = inputs.has_bias ? inputs.heads * inputs.tokens : 1, tokens = inputs.tokens;
  const Tensor padded = inputs.allocate({rows, key_stride}, inputs.sum_dtype());
  Sum* to = padded.mutable_data_ptr<Sum>();
  const auto fill = [&](const auto* from) {
    for_rows(rows, key_stride, [=](int64_t row) {
      Sum* at = to + row * key_stride;
      for (int64_t n = 0; n < tokens; ++n) at[n] = from ? Sum(from[row * tokens + n]) * Sum(kLog2E) : Sum(0);
      std::fill(at + tokens, at + key_stride, -std::numeric_limits<Sum>::infinity());
    });
  };
  if (!inputs.has_bias) {
    fill(static_cast<const Sum*>(nullptr));
  } else {
    dispatch_floating(inputs.bias.scalar_type(),
                      [&](auto type) { fill(inputs.bias.const_data_ptr<typename decltype(type)::type>()); });
  }
  return padded;
}

// (heads, N, N) in the bias's dtype: the sums of the chunks (chunks, heads, N, key_stride), added up in their order.
template <typename Sum>
Tensor add_chunks(const Tensor& sums, const Inputs& inputs, int64_t chunks, int64_t key_stride) {
  const int64_t tokens = inputs.tokens, rows = inputs.heads * tokens;
  const Tensor grad_bias = inputs.allocate({inputs.heads, tokens, tokens}, inputs.bias.scalar_type());
  const Sum* from = sums.const_data_ptr<Sum>();
  dispatch_floating(grad_bias.scalar_type(), [&](auto type) {
    using Bias = typename decltype(type)::type;
    Bias* to = grad_bias.mutable_data_ptr<Bias>();
    for_rows(rows, chunks * key_stride, [=](int64_t row) {
      for (int64_t n = 0; n < tokens; ++n) {
        Sum sum = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += from[(chunk * rows + row) * key_stride + n];
        to[row * tokens + n] = Bias(sum);
      }
    });
  });
  return grad_bias;
}

template <typename T>
Args<T> arguments(const Inputs& inputs, const Tensor& bias, int64_t key_stride) {
  using Sum = Accumulator<T>;
  return {inputs.images,
          inputs.tokens,
          inputs.rows,
          inputs.heads,
          inputs.head_size,
          Sum(inputs.scale),
          inputs.qkv.const_data_ptr<T>(),
          bias.const_data_ptr<Sum>(),
          inputs.has_bias,
          key_stride,
          inputs.has_queries ? inputs.queries.const_data_ptr<int32_t>() : nullptr};
}

std::tuple<Tensor, Tensor> forward(const Tensor& qkv, const std::optional<Tensor>& bias,
                                   const std::optional<Tensor>& queries, int64_t num_heads, double scale) {
  const Inputs inputs(qkv, bias, queries, num_heads, scale);
  const Tensor out =
      inputs.allocate({inputs.images, inputs.rows, num_heads * inputs.head_size}, inputs.qkv.scalar_type());
  const Tensor lse = inputs.allocate({inputs.images, num_heads, inputs.rows}, inputs.sum_dtype());
  if (out.numel() == 0) return {out, lse};
  dispatch_floating(inputs.qkv.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const Kernels<T> level = choose_kernels<Kernels<T>>();
    const int64_t key_stride = round_up(inputs.tokens, level.lanes);
    const Tensor padded = padded_bias<Accumulator<T>>(inputs, key_stride);
    const ForwardArgs<T> args{arguments<T>(inputs, padded, key_stride), out.mutable_data_ptr<T>(),
                              lse.mutable_data_ptr<Accumulator<T>>()};
    torch::stable::parallel_for(0, args.units(), 1,
                                [&](int64_t begin, int64_t end) { level.forward(args, begin, end); });
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_out, const Tensor& qkv, const std::optional<Tensor>& bias,
                                    const std::optional<Tensor>& queries, const Tensor& out, const Tensor& lse,
                                    int64_t num_heads, double scale, bool needs_bias) {
  const Inputs inputs(qkv, bias, queries, num_heads, scale);
  for (const auto& [tensor, name] : {std::pair{&grad_out, "grad_out"}, std::pair{&out, "out"}}) {
    check_shape(*tensor, name, {inputs.images, inputs.rows, num_heads * inputs.head_size});
    check_dtype(*tensor, name, inputs.qkv.scalar_type());
  }
  check_shape(lse, "lse", {inputs.images, num_heads, inputs.rows});
  check_dtype(lse, "lse", inputs.sum_dtype());
  const Tensor gradient = dense(grad_out), result = dense(out), exponents = dense(lse);
  const Tensor grad_qkv = torch::stable::new_empty(inputs.qkv, inputs.qkv.sizes());
  Tensor grad_bias = torch::stable::new_empty(gradient, {0});
  dispatch_floating(inputs.qkv.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using Sum = Accumulator<T>;
    const Kernels<T> level = choose_kernels<Kernels<T>>();
    const int64_t key_stride = round_up(inputs.tokens, level.lanes);
    const Tensor padded = padded_bias<Sum>(inputs, key_stride);
    BackwardArgs<T> args{
        arguments<T>(inputs, padded, key_stride), gradient.const_data_ptr<T>(),   result.const_data_ptr<T>(),
        exponents.const_data_ptr<Sum>(),          grad_qkv.mutable_data_ptr<T>(), nullptr};
    Tensor sums;
    if (needs_bias && inputs.has_bias) {
      sums = inputs.allocate({args.chunks(), num_heads, inputs.tokens, key_stride}, inputs.sum_dtype());
      args.bias_sums = sums.mutable_data_ptr<Sum>();
    }
    torch::stable::parallel_for(0, args.units(), 1,
                                [&](int64_t begin, int64_t end) { level.backward(args, begin, end); });
    if (needs_bias && inputs.has_bias) grad_bias = add_chunks<Sum>(sums, inputs, args.chunks(), key_stride);
  });
  return {grad_qkv, grad_bias};
}

}  // namespace
}  // namespace simmim_fast::biased_attention

STABLE_TORCH_LIBRARY_IMPL(simmim_fast, CPU, m) {
  namespace op = simmim_fast::biased_attention;
  m.impl("biased_attention_native", TORCH_BOX(&op::forward));
  m.impl("biased_attention_native_backward", TORCH_BOX(&op::backward));
}
