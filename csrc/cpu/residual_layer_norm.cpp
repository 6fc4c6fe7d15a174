// The operator residual_layer_norm on the CPU: checks, allocation, choice of the SIMD level, sums over chunks.
// The kernels are compiled once per level, in residual_layer_norm_kernels.cpp.

#include "cpu/residual_layer_norm.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/sum_partials.h"

namespace simmim_fast::residual_layer_norm {
namespace {

using MaybeTensor = std::optional<Tensor>;
using MaybeDtype = std::optional<ScalarType>;

ScalarType sum_dtype(ScalarType stream) { return stream == ScalarType::Double ? stream : ScalarType::Float; }

// The dtype of delta and norm in the kernels: theirs where they share one that there are kernels for beside the
// stream's, else the stream's, from and to which they are converted.
ScalarType branch_dtype(ScalarType stream, std::initializer_list<MaybeDtype> dtypes) {
  MaybeDtype common;
  for (const MaybeDtype& dtype : dtypes) {
    if (dtype && common && *dtype != *common) return stream;
    if (dtype) common = dtype;
  }
  const bool half = common == ScalarType::BFloat16 || common == ScalarType::Half;
  return half && stream == ScalarType::Float ? *common : stream;
}

// Calls f(Type<Stream>, Type<Branch>).
template <typename F>
void dispatch(ScalarType stream, ScalarType branch, F&& f) {
  dispatch_floating(stream, [&](auto type) {
    if (stream == branch) return f(type, type);
    if constexpr (std::is_same_v<decltype(type), Type<float>>) {
      if (branch == ScalarType::BFloat16) return f(type, Type<BFloat16>{});
      if (branch == ScalarType::Half) return f(type, Type<Half>{});
    }
    check(false, "delta: ", branch, " cannot stand beside ", stream);
  });
}

MaybeDtype dtype_of(const MaybeTensor& tensor) { return tensor ? MaybeDtype(tensor->scalar_type()) : std::nullopt; }

MaybeTensor dense_if(const MaybeTensor& tensor, ScalarType dtype) {
  return tensor ? MaybeTensor(dense(*tensor, dtype)) : std::nullopt;
}

template <typename T>
const T* data(const MaybeTensor& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

template <typename T>
T* mutable_data(const MaybeTensor& tensor) {
  return tensor ? tensor->mutable_data_ptr<T>() : nullptr;
}

// What both directions take beside activations, checked and in the dtype of the sums.
struct Parameters {
  Tensor weight;
  MaybeTensor gamma, keep, delta_bias;
  int64_t channels, rows, rows_per_sample;

  Parameters(const Tensor& source, const Tensor& factor, const MaybeTensor& scale, const MaybeTensor& kept,
             const MaybeTensor& shift, ScalarType sums) {
    check(source.dim() > 0 && source.size(-1) > 0, "x: expected (..., C) with C > 0, got ", shape_text(source.sizes()));
    channels = source.size(-1), rows = source.numel() / channels;
    const int64_t samples = source.dim() > 1 ? source.size(0) : 1;
    rows_per_sample = std::max<int64_t>(1, rows / std::max<int64_t>(1, samples));
    check_shape(factor, "weight", {channels});
    if (scale) check_shape(*scale, "gamma", {channels});
    if (kept) check_shape(*kept, "keep", {samples});
    if (shift) check_shape(*shift, "delta_bias", {channels});
    weight = dense(factor, sums), gamma = dense_if(scale, sums), keep = dense_if(kept, sums);
    delta_bias = dense_if(shift, sums);
  }

  template <typename Stream, typename Branch>
  Args<Stream, Branch> args() const {
    using Sum = Accumulator<Stream>;
    return {weight.const_data_ptr<Sum>(),
            data<Sum>(gamma),
            data<Sum>(keep),
            data<Sum>(delta_bias),
            rows,
            rows_per_sample,
            channels};
  }
};

void check_like(const Tensor& other, std::initializer_list<std::pair<const char*, MaybeTensor>> tensors) {
  for (const auto& [name, tensor] : tensors)
    if (tensor) check(tensor->sizes().equals(other.sizes()), name, ": expected shape ", shape_text(other.sizes()));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_cpu(const Tensor& x, const MaybeTensor& delta, const Tensor& weight,
                                                       const Tensor& bias, const MaybeTensor& gamma,
                                                       const MaybeTensor& keep, const MaybeTensor& delta_bias,
                                                       double eps, bool norms_delta, ScalarType norm_dtype) {
  const ScalarType dtype = delta ? promote(x.scalar_type(), delta->scalar_type()) : x.scalar_type();
  const ScalarType sums = sum_dtype(dtype);
  const ScalarType branch = branch_dtype(dtype, {dtype_of(delta), norms_delta ? MaybeDtype() : norm_dtype});
  const Parameters parameters(x, weight, gamma, keep, delta_bias, sums);
  check_like(x, {{"delta", delta}});
  check(delta || !(norms_delta || delta_bias), "delta: expected where it is normalised, or has a bias");
  check_shape(bias, "bias", {parameters.channels});
  const Tensor from = dense(x, dtype), offset = dense(bias, sums);
  const MaybeTensor added = dense_if(delta, branch);
  const std::vector<int64_t> rows(x.sizes().begin(), x.sizes().end() - 1);
  const Tensor mean = torch::stable::new_empty(x, rows, sums), rstd = torch::stable::new_empty(x, rows, sums);
  const auto allocate = [&](bool wanted, ScalarType of) {
    return wanted ? torch::stable::new_empty(x, x.sizes(), of) : torch::stable::new_empty(x, {0}, of);
  };
  const Tensor stream = allocate(bool(delta), dtype),
               normed = allocate(!norms_delta, norms_delta ? norm_dtype : branch);
  dispatch(dtype, branch, [&](auto stream_type, auto branch_type) {
    using Stream = typename decltype(stream_type)::type;
    using Branch = typename decltype(branch_type)::type;
    using Sum = Accumulator<Stream>;
    const ForwardArgs<Stream, Branch> args{parameters.args<Stream, Branch>(),
                                           from.const_data_ptr<Stream>(),
                                           data<Branch>(added),
                                           offset.const_data_ptr<Sum>(),
                                           delta ? stream.mutable_data_ptr<Stream>() : nullptr,
                                           norms_delta ? nullptr : normed.mutable_data_ptr<Branch>(),
                                           mean.mutable_data_ptr<Sum>(),
                                           rstd.mutable_data_ptr<Sum>(),
                                           Sum(eps)};
    const auto table = choose_kernels<Kernels<Stream, Branch>>();
    const auto kernel = norms_delta ? table.forward_norms_delta : table.forward;
    torch::stable::parallel_for(0, args.rows, grain(args.channels),
                                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  });
  return {stream, dense(normed, norm_dtype), mean, rstd};
}

// Results of the backward: gradients of source and branch and partial sums, where wanted, and what becomes of them.
class Results {
 public:
  Results(const Tensor& like, ScalarType sums) : like_(like), sums_(sums) {}

  MaybeTensor activation(bool wanted, ScalarType dtype) const {
    return wanted ? MaybeTensor(torch::stable::new_empty(like_, like_.sizes(), dtype)) : std::nullopt;
  }

  MaybeTensor partials(bool wanted, int64_t chunks) const {
    return wanted ? MaybeTensor(torch::stable::new_empty(like_, {chunks, like_.size(-1)}, sums_)) : std::nullopt;
  }

  // Of the dtype asked for; shape (0,) where none is.
  Tensor finished(const MaybeTensor& result, const MaybeDtype& dtype) const {
    return result ? dense(*result, *dtype) : torch::stable::new_empty(like_, {0});
  }

  Tensor summed(const MaybeTensor& partials, const MaybeDtype& dtype) const {
    return finished(partials ? MaybeTensor(sum_partials(*partials)) : std::nullopt, dtype);
  }

 private:
  const Tensor& like_;
  ScalarType sums_;
};

// With the bias, the norm is a result again. Where the source is x, to which delta is yet to be added, `adds_delta`.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward_cpu(
    const Tensor& grad_normed, const MaybeTensor& grad_stream, const Tensor& source, const MaybeTensor& delta,
    const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& gamma, const MaybeTensor& keep,
    const MaybeTensor& delta_bias, const Tensor& mean, const Tensor& rstd, bool norms_delta, bool adds_delta,
    MaybeDtype x_dtype, MaybeDtype delta_dtype, MaybeDtype weight_dtype, MaybeDtype bias_dtype, MaybeDtype gamma_dtype,
    MaybeDtype delta_bias_dtype) {
  const ScalarType dtype = (norms_delta ? grad_normed : source).scalar_type(), sums = sum_dtype(dtype);
  const ScalarType normed_dtype = (norms_delta ? source : grad_normed).scalar_type();
  const ScalarType branch = branch_dtype(dtype, {normed_dtype, dtype_of(delta), delta_dtype});
  const Parameters parameters(source, weight, gamma, keep, delta_bias, sums);
  check_like(source, {{"grad_normed", grad_normed}, {"grad_stream", grad_stream}, {"delta", delta}});
  check(delta || !(gamma_dtype || adds_delta), "delta: expected for the gradient of gamma, and to be added");
  check(!norms_delta || !(bias || adds_delta), "the norm of delta is no result, and delta is not added before it");
  if (bias) check_shape(*bias, "bias", {parameters.channels});
  check(mean.numel() == parameters.rows && rstd.numel() == parameters.rows, "mean and rstd: expected one for each row");
  const Tensor grad = dense(grad_normed, norms_delta ? dtype : branch),
               from = dense(source, norms_delta ? branch : dtype);
  const MaybeTensor other_grad = dense_if(grad_stream, dtype), added = dense_if(delta, branch);
  const MaybeTensor offset = dense_if(bias, sums);
  const Tensor means = dense(mean, sums), rstds = dense(rstd, sums);
  const Results results(from, sums);
  const MaybeTensor grad_x = results.activation(x_dtype && !norms_delta, dtype);
  const MaybeTensor grad_delta = results.activation(bool(delta_dtype), branch);
  const MaybeTensor normed = results.activation(bool(bias), branch);
  MaybeTensor weights, biases, gammas, shifts;
  dispatch(dtype, branch, [&](auto stream_type, auto branch_type) {
    using Stream = typename decltype(stream_type)::type;
    using Branch = typename decltype(branch_type)::type;
    using Sum = Accumulator<Stream>;
    BackwardArgs<Stream, Branch> args{parameters.args<Stream, Branch>(),
                                      grad.const_data_ptr(),
                                      from.const_data_ptr(),
                                      data<Sum>(offset),
                                      data<Stream>(other_grad),
                                      data<Branch>(added),
                                      adds_delta,
                                      means.const_data_ptr<Sum>(),
                                      rstds.const_data_ptr<Sum>(),
                                      mutable_data<Stream>(grad_x),
                                      mutable_data<Branch>(grad_delta),
                                      mutable_data<Branch>(normed),
                                      nullptr,
                                      nullptr,
                                      nullptr,
                                      nullptr};
    weights = results.partials(bool(weight_dtype), args.chunks());
    biases = results.partials(bool(bias_dtype), args.chunks());
    gammas = results.partials(bool(gamma_dtype), args.chunks());
    shifts = results.partials(bool(delta_bias_dtype), args.chunks());
    args.weight_partials = mutable_data<Sum>(weights);
    args.bias_partials = mutable_data<Sum>(biases);
    args.gamma_partials = mutable_data<Sum>(gammas);
    args.delta_bias_partials = mutable_data<Sum>(shifts);
    const auto table = choose_kernels<Kernels<Stream, Branch>>();
    const auto kernel = norms_delta ? table.backward_norms_delta : table.backward;
    torch::stable::parallel_for(0, args.chunks(), 1, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  });
  return {results.finished(grad_x, x_dtype),     results.finished(grad_delta, delta_dtype),
          results.summed(weights, weight_dtype), results.summed(biases, bias_dtype),
          results.summed(gammas, gamma_dtype),   results.summed(shifts, delta_bias_dtype),
          results.finished(normed, normed_dtype)};
}

}  // namespace
}  // namespace simmim_fast::residual_layer_norm

STABLE_TORCH_LIBRARY_IMPL(simmim_fast, CPU, m) {
  namespace op = simmim_fast::residual_layer_norm;
  m.impl("residual_layer_norm_native", TORCH_BOX(&op::forward_cpu));
  m.impl("residual_layer_norm_native_backward", TORCH_BOX(&op::backward_cpu));
}
