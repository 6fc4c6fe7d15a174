// The operator masked_patch_embed on the CPU: checks, allocation, choice of the SIMD level, sums over chunks.
// The kernels are compiled once per level, in masked_patch_embed_kernels.cpp.

#include "cpu/masked_patch_embed.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <stdexcept>
#include <tuple>

#include "cpu/sum_partials.h"

namespace simmim_fast::masked_patch_embed {
namespace {

using MaybeTensor = std::optional<Tensor>;
using MaybeDtype = std::optional<ScalarType>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Calls f(Type<T>): T is bfloat16 where operands may be, else the dtype of the sums.
template <typename F>
void dispatch(ScalarType compute, ScalarType out, F&& f) {
  if (out == ScalarType::Double) return f(Type<double>{});
  if (compute == ScalarType::BFloat16) return f(Type<BFloat16>{});
  f(Type<float>{});
}

// Every visible token is listed, and there. Python's ValueError otherwise.
void check_visible(const Tensor& visible, const bool* mask, int64_t images, int64_t positions) {
  check_rank(visible, "visible", 2);
  check_dtype(visible, "visible", ScalarType::Int);
  check(visible.size(0) == images, "visible: expected ", images, " rows, got ", visible.size(0));
  const Tensor list = dense(visible);
  const int32_t* token = list.const_data_ptr<int32_t>();
  for (int64_t image = 0; image < images; ++image) {
    std::vector<bool> accounted(mask + image * positions, mask + (image + 1) * positions);
    for (int64_t k = 0; k < visible.size(1); ++k, ++token) {
      if (*token < 0 || *token >= positions)
        throw std::invalid_argument("visible must hold flat patches from 0 to " + std::to_string(positions - 1) +
                                    "; got one out of range");
      accounted[*token] = true;
    }
    if (!std::all_of(accounted.begin(), accounted.end(), [](bool is) { return is; }))
      throw std::invalid_argument("visible must hold every patch that is not hidden; one is missing");
  }
}

// What both directions take, checked.
struct Inputs {
  Tensor image, mask, weight, bias;
  MaybeTensor norm_weight, norm_bias, mean, std;
  double eps;

  void check_all(const MaybeTensor& visible) const {
    check_rank(image, "image", 4);
    check_rank(weight, "weight", 4);
    const int64_t planes = image.size(1), channels = weight.size(0), patch = weight.size(3);
    check(patch > 0 && channels > 0 && image.size(2) % patch == 0 && image.size(3) % patch == 0,
          "image: expected sides that are multiples of ", patch, ", got ", shape_text(image.sizes()));
    check_shape(weight, "weight", {channels, planes, patch, patch});
    check_dtype(mask, "mask", ScalarType::Bool);
    check_shape(mask, "mask", {image.size(0), image.size(2) / patch, image.size(3) / patch});
    check_shape(bias, "bias", {channels});
    if (norm_weight) check_shape(*norm_weight, "norm_weight", {channels});
    if (norm_bias) check_shape(*norm_bias, "norm_bias", {channels});
    const bool bytes = image.scalar_type() == ScalarType::Byte;
    check(bool(mean) == bytes && bool(std) == bytes, "mean and std: expected for a uint8 image, and only there");
    if (bytes) check_shape(*mean, "mean", {planes});
    if (bytes) check_shape(*std, "std", {planes});
    if (visible) check_visible(*visible, mask.const_data_ptr<bool>(), image.size(0), mask.size(1) * mask.size(2));
  }
};

// Owns what Args points to beside the caller's tensors.
template <typename T>
class Prepared {
 public:
  using Sum = Accumulator<T>;

  // `projects` tells whether the weight is needed.
  Prepared(const Inputs& in, bool projects)
      : kernels_(choose_kernels<Kernels<T>>()), weight_(dense(in.weight, kSum)), args_(make_args(in)) {
    args_.bias = padded(in.bias);
    if (in.norm_weight) args_.norm_weight = padded(*in.norm_weight);
    if (in.norm_bias) args_.norm_bias = padded(*in.norm_bias);
    if (in.mean) normalisation(in);
    if (!projects) return;
    packed_ = allocate(in.image, args_.panels() * args_.depth() * args_.layout.panel);
    args_.packed = packed_.mutable_data_ptr();
    const int64_t panel_size = args_.layout.panel * args_.numbers();
    torch::stable::parallel_for(0, args_.panels(), grain(panel_size),
                                [&](int64_t begin, int64_t end) { kernels_.pack(args_, begin, end); });
  }

  const Kernels<T>& table() const { return kernels_; }
  const Args<T>& args() const { return args_; }

  // (C) numbers as sums, 0 from there to channel_stride.
  const Sum* padded(const Tensor& tensor) {
    const Tensor values = dense(tensor, kSum);
    rows_.emplace_back(args_.channel_stride(), Sum(0));
    std::copy_n(values.const_data_ptr<Sum>(), args_.channels, rows_.back().data());
    return rows_.back().data();
  }

  Tensor allocate(const Tensor& like, int64_t operands) const {
    return torch::stable::new_empty(like, {operands * args_.layout.operand_bytes}, ScalarType::Byte);
  }

  static constexpr ScalarType kSum = std::is_same_v<Sum, double> ? ScalarType::Double : ScalarType::Float;

 private:
  Args<T> make_args(const Inputs& in) const {
    Args<T> args{};
    args.layout = kernels_.layout;
    args.image = in.image.const_data_ptr();
    args.image_dtype = in.image.scalar_type();
    args.mask = in.mask.const_data_ptr<bool>();
    args.weight = weight_.template const_data_ptr<Sum>();
    args.eps = in.eps;
    args.images = in.image.size(0), args.planes = in.image.size(1);
    args.grid_h = in.mask.size(1), args.grid_w = in.mask.size(2);
    args.patch = in.weight.size(3), args.channels = in.weight.size(0);
    return args;
  }

  // (byte / 255 - mean) / std as byte * scale + shift.
  void normalisation(const Inputs& in) {
    const Tensor means = dense(*in.mean, ScalarType::Double), stds = dense(*in.std, ScalarType::Double);
    for (int64_t plane = 0; plane < args_.planes; ++plane) {
      const double mean = means.const_data_ptr<double>()[plane], std = stds.const_data_ptr<double>()[plane];
      scale_.push_back(Sum(1 / (255 * std)));
      shift_.push_back(Sum(-mean / std));
    }
    args_.scale = scale_.data();
    args_.shift = shift_.data();
  }

  Kernels<T> kernels_;
  Tensor weight_, packed_;
  Args<T> args_;
  std::vector<std::vector<Sum>> rows_;
  std::vector<Sum> scale_, shift_;
};

Tensor forward_cpu(const Tensor& image, const Tensor& mask, const Tensor& weight, const Tensor& bias,
                   const MaybeTensor& norm_weight, const MaybeTensor& norm_bias, const Tensor& mask_token,
                   const MaybeTensor& pos_embed, const MaybeTensor& mean, const MaybeTensor& std,
                   const MaybeTensor& visible, double eps, ScalarType compute_dtype, ScalarType out_dtype) {
  const Inputs in{dense(image), dense(mask), weight, bias, norm_weight, norm_bias, mean, std, eps};
  in.check_all(visible);
  const int64_t channels = weight.size(0), height = in.mask.size(1), width = in.mask.size(2);
  check_shape(mask_token, "mask_token", {channels});
  if (pos_embed) check_shape(*pos_embed, "pos_embed", {height, width, channels});
  const Tensor out = torch::stable::new_empty(image, {image.size(0), height, width, channels}, out_dtype);
  if (out.numel() == 0) return out;
  dispatch(compute_dtype, out_dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using Sum = Accumulator<T>;
    Prepared<T> prepared(in, true);
    const Tensor positions = pos_embed ? dense(*pos_embed, prepared.kSum) : Tensor();
    const ForwardArgs<T> args{prepared.args(), prepared.padded(mask_token),
                              pos_embed ? positions.const_data_ptr<Sum>() : nullptr, out.mutable_data_ptr(), out_dtype};
    torch::stable::parallel_for(0, args.tokens(), grain(channels),
                                [&](int64_t begin, int64_t end) { prepared.table().forward(args, begin, end); });
  });
  return out;
}

// The first `size` numbers of each row, the last axis, in memory of their own.
Tensor leading(Tensor rows, int64_t size) {
  return torch::stable::clone(torch::stable::narrow(rows, rows.dim() - 1, 0, size));
}

std::vector<int64_t> visible_tokens(const Tensor& mask) {
  const bool* hidden = mask.const_data_ptr<bool>();
  std::vector<int64_t> tokens;
  for (int64_t token = 0; token < mask.numel(); ++token)
    if (!hidden[token]) tokens.push_back(token);
  return tokens;
}

template <typename T>
class Backward {
 public:
  using Sum = Accumulator<T>;

  // Dtypes of the gradients of weight, bias, norm_weight, norm_bias, mask_token and pos_embed, where they are wanted.
  Backward(const Inputs& in, const Tensor& grad_out, const std::array<MaybeDtype, 6>& dtypes)
      : grad_out_(grad_out),
        dtypes_(dtypes),
        tokens_(visible_tokens(in.mask)),
        norm_(in.norm_weight.has_value()),
        prepared_(in, norm_ && sums_rows()),
        args_{prepared_.args(), grad_out.const_data_ptr(), grad_out.scalar_type(), tokens_.data(),
              int64_t(tokens_.size())} {}

  Gradients run(const IntHeaderOnlyArrayRef& weight_shape) {
    const Tensor row_sums = sums(sums_rows(), {args_.row_chunks(), 3, args_.channel_stride()}, args_.row_sums);
    if (dtypes_[0]) {
      pixels_ = prepared_.allocate(grad_out_, args_.row_stride() * args_.number_stride() / args_.layout.per);
      grad_rows_ = prepared_.allocate(grad_out_, args_.row_stride() * args_.channel_stride() / args_.layout.per);
      args_.pixels = pixels_.mutable_data_ptr();
      args_.grad_rows = grad_rows_.mutable_data_ptr();
    }
    if (sums_rows()) parallel(args_.row_chunks(), 1, prepared_.table().backward_rows);
    const auto weight = [&] { return weight_gradient(weight_shape); };
    const Tensor rows = sums_rows() ? sum_partials(row_sums) : Tensor();
    const auto row_sum = [&](int64_t which) {
      return [&, which] { return leading(torch::stable::select(rows, 0, which), args_.channels); };
    };
    const auto token_gradients = sum_tokens();
    return {wanted(0, weight),
            wanted(1, row_sum(0)),
            wanted(2, row_sum(1)),
            wanted(3, row_sum(2)),
            wanted(4, [&] { return token_gradients.first; }),
            wanted(5, [&] { return token_gradients.second; })};
  }

 private:
  // Whether visible tokens are looked at one by one.
  bool sums_rows() const { return dtypes_[0] || dtypes_[1] || dtypes_[2] || dtypes_[3]; }

  Tensor sums(bool wanted, std::vector<int64_t> shape, Sum*& pointer) const {
    if (!wanted) return Tensor();
    const Tensor tensor = torch::stable::new_empty(grad_out_, shape, prepared_.kSum);
    pointer = tensor.template mutable_data_ptr<Sum>();
    return tensor;
  }

  void parallel(int64_t units, int64_t grain, void (*kernel)(const BackwardArgs<T>&, int64_t, int64_t)) const {
    torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) { kernel(args_, begin, end); });
  }

  template <typename F>
  Tensor wanted(int64_t which, F&& gradient) const {
    if (!dtypes_[which]) return torch::stable::new_empty(grad_out_, {0});
    return dense(gradient(), *dtypes_[which]);
  }

  Tensor weight_gradient(const IntHeaderOnlyArrayRef& shape) {
    const int64_t groups = args_.groups();
    const Tensor partials = sums(true, {groups, args_.channels, args_.number_stride()}, args_.weight_sums);
    parallel(groups * args_.blocks(), 1, prepared_.table().backward_weight);
    return torch::stable::reshape(leading(sum_partials(partials), args_.numbers()), shape);
  }

  // Gradients of mask_token and pos_embed.
  std::pair<Tensor, Tensor> sum_tokens() {
    if (!dtypes_[4] && !dtypes_[5]) return {};
    const Tensor positions = sums(bool(dtypes_[5]), {args_.grid_h, args_.grid_w, args_.channels}, args_.pos_sums);
    const Tensor partials = sums(bool(dtypes_[4]), {args_.token_chunks(), args_.channel_stride()}, args_.token_sums);
    parallel(args_.token_chunks(), 1, prepared_.table().backward_tokens);
    return {dtypes_[4] ? leading(sum_partials(partials), args_.channels) : Tensor(), positions};
  }

  const Tensor& grad_out_;
  const std::array<MaybeDtype, 6>& dtypes_;
  std::vector<int64_t> tokens_;
  bool norm_;
  Prepared<T> prepared_;
  BackwardArgs<T> args_;
  Tensor pixels_, grad_rows_;
};

Gradients backward_cpu(const Tensor& grad_out, const Tensor& image, const Tensor& mask, const Tensor& weight,
                       const Tensor& bias, const MaybeTensor& norm_weight, const MaybeTensor& mean,
                       const MaybeTensor& std, const MaybeTensor& visible, double eps, ScalarType compute_dtype,
                       MaybeDtype weight_dtype, MaybeDtype bias_dtype, MaybeDtype norm_weight_dtype,
                       MaybeDtype norm_bias_dtype, MaybeDtype token_dtype, MaybeDtype pos_dtype) {
  const Inputs in{dense(image), dense(mask), weight, bias, norm_weight, {}, mean, std, eps};
  in.check_all(visible);
  check_shape(grad_out, "grad_out", {image.size(0), in.mask.size(1), in.mask.size(2), weight.size(0)});
  const Tensor grad = dense(grad_out);
  const std::array<MaybeDtype, 6> dtypes{weight_dtype,    bias_dtype,  norm_weight_dtype,
                                         norm_bias_dtype, token_dtype, pos_dtype};
  Gradients gradients;
  dispatch(compute_dtype, grad.scalar_type(), [&](auto type) {
    gradients = Backward<typename decltype(type)::type>(in, grad, dtypes).run(weight.sizes());
  });
  return gradients;
}

}  // namespace
}  // namespace simmim_fast::masked_patch_embed

STABLE_TORCH_LIBRARY_IMPL(simmim_fast, CPU, m) {
  namespace op = simmim_fast::masked_patch_embed;
  m.impl("masked_patch_embed_native", TORCH_BOX(&op::forward_cpu));
  m.impl("masked_patch_embed_native_backward", TORCH_BOX(&op::backward_cpu));
}
