// shifted_window_attention on the CPU: checks, allocation, choice of the SIMD level, sums over the chunks.
// The kernels are compiled once per level, in shifted_window_attention_kernels.cpp.

#include "cpu/shifted_window_attention.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/grain.h"
#include "cpu/sum_partials.h"

namespace simmim_fast::shifted_window_attention {
namespace {

const double kMaxLogitScale = std::log(100.0);

// What the caller gave, checked, in the dtypes that the kernels take.
struct Inputs {
  Tensor qkv, bias_table;
  std::optional<Tensor> logit_scale, pad_value, queries;
  WindowGrid grid;
  int64_t heads;
  double scale;
  ScalarType dtype, sum_dtype;

  int64_t images() const { return qkv.size(0); }
  int64_t channels() const { return qkv.size(3) / 3; }
  int64_t chosen() const { return queries ? queries->size(1) : grid.tokens(); }  // queries per window
  std::vector<int64_t> out_shape() const {
    if (queries) return {images(), chosen(), channels()};
    return {images(), grid.height, grid.width, channels()};
  }
};

void check_inputs(const Inputs& in) {
  const WindowGrid& grid = in.grid;
  check(grid.window_h > 0 && grid.window_w > 0, "window_size: expected positive sizes, got ", grid.window_h, ", ",
        grid.window_w);
  check(grid.shift_h >= 0 && grid.shift_h < grid.window_h && grid.shift_w >= 0 && grid.shift_w < grid.window_w,
        "shift: expected 0 <= shift < window, got ", grid.shift_h, ", ", grid.shift_w);
  check(in.heads > 0 && in.qkv.size(3) % (3 * in.heads) == 0, "qkv: expected a multiple of 3 * ", in.heads,
        " channels, got ", in.qkv.size(3));
  check_shape(in.bias_table, "bias_table", {grid.table_rows(), in.heads});
  if (in.logit_scale) check_shape(*in.logit_scale, "logit_scale", {in.heads});
  if (in.pad_value) check_shape(*in.pad_value, "pad_value", {in.qkv.size(3)});
  if (!in.queries) return;
  check(grid.windows() == 1, "queries: expected a grid of one window, got ", grid.windows());
  check_rank(*in.queries, "queries", 2);
  check_dtype(*in.queries, "queries", ScalarType::Int);
  check(in.queries->size(0) == in.images(), "queries: expected ", in.images(), " rows, got ", in.queries->size(0));
}

Inputs make_inputs(const Tensor& qkv, const Tensor& bias_table, const std::optional<Tensor>& logit_scale,
                   const std::optional<Tensor>& pad_value, const std::optional<Tensor>& queries, int64_t window_h,
                   int64_t window_w, int64_t shift_h, int64_t shift_w, int64_t heads, double scale) {
  check_rank(qkv, "qkv", 4);
  const ScalarType dtype = qkv.scalar_type();
  const WindowGrid grid{int(qkv.size(1)), int(qkv.size(2)), int(window_h), int(window_w), int(shift_h), int(shift_w)};
  Inputs in{dense(qkv), bias_table, logit_scale, pad_value, queries,
            grid,       heads,      scale,       dtype,     dtype == ScalarType::Double ? dtype : ScalarType::Float};
  check_inputs(in);
  in.bias_table = dense(bias_table, in.sum_dtype);
  if (logit_scale) in.logit_scale = dense(*logit_scale, in.sum_dtype);
  if (pad_value) in.pad_value = dense(*pad_value, dtype);
  if (queries) in.queries = dense(*queries);
  return in;
}

// Owns what Args points to beside the caller's tensors.
template <typename T>
class Prepared {
 public:
  using Sum = Accumulator<T>;

  Prepared(const Inputs& in, const Kernels<T>& kernels)
      : stride_(round_up(in.grid.tokens(), kernels.lanes)),
        bias_(torch::stable::new_empty(in.qkv, {in.heads, in.grid.tokens(), stride_}, in.sum_dtype)),
        zero_row_(in.qkv.size(3), T(0)) {
    fill_bias(in);
    fill_factors(in);
    if (in.queries) fill_slots(in);
  }

  Args<T> args(const Inputs& in) const {
    return {in.grid,
            in.images(),
            in.heads,
            in.channels() / in.heads,
            in.qkv.template const_data_ptr<T>(),
            in.pad_value ? in.pad_value->template const_data_ptr<T>() : zero_row_.data(),
            bias_.template const_data_ptr<Sum>(),
            stride_,
            factors_.data(),
            in.logit_scale.has_value(),
            in.queries ? slots_.data() : nullptr,
            in.chosen()};
  }

 private:
  // For a key and a row of queries the table's rows are neighbours.
  void fill_bias(const Inputs& in) {
    const Sum* table = in.bias_table.template const_data_ptr<Sum>();
    Sum* bias = bias_.template mutable_data_ptr<Sum>();
    const WindowGrid& grid = in.grid;
    const int64_t tokens = grid.tokens(), rows = grid.table_rows();
    torch::stable::parallel_for(0, in.heads, grain(tokens * stride_), [&](int64_t begin, int64_t end) {
      std::vector<Sum> column(rows);
      for (int64_t head = begin; head < end; ++head) {
        for (int64_t row = 0; row < rows; ++row) column[row] = table[row * in.heads + head] * Sum(kLog2E);
        for (int key = 0; key < tokens; ++key) {
          Sum* to = bias + (head * tokens + key) * stride_;
          for (int query = 0; query < tokens; query += grid.window_w)
            std::copy_n(column.data() + grid.table_row(query, key), grid.window_w, to + query);
          std::fill(to + tokens, to + stride_, Sum(0));
        }
      }
    });
  }

  void fill_factors(const Inputs& in) {
    factors_.assign(in.heads, Sum(in.scale));
    if (!in.logit_scale) return;
    const Sum* logit_scale = in.logit_scale->template const_data_ptr<Sum>();
    for (int64_t head = 0; head < in.heads; ++head)
      factors_[head] = std::exp(logit_scale[head] > kMaxLogitScale ? Sum(kMaxLogitScale) : logit_scale[head]);
  }

  void fill_slots(const Inputs& in) {
    const int32_t* tokens = in.queries->template const_data_ptr<int32_t>();
    slots_.resize(in.queries->numel());
    std::vector<bool> named(in.grid.tokens());
    for (size_t i = 0; i < slots_.size(); ++i) {
      if (i % in.chosen() == 0) named.assign(named.size(), false);  // the next image
      check(tokens[i] >= 0 && tokens[i] < in.grid.height * in.grid.width, "queries: expected tokens from 0 to ",
            in.grid.height * in.grid.width - 1, ", got ", tokens[i]);
      slots_[i] = in.grid.slot(tokens[i]);
      check(!named[slots_[i]], "queries: expected distinct tokens, got ", tokens[i], " twice in an image");
      named[slots_[i]] = true;
    }
  }

  int64_t stride_;
  Tensor bias_;
  std::vector<T> zero_row_;
  std::vector<Sum> factors_;
  std::vector<int32_t> slots_;
};

Tensor forward_cpu(const Tensor& qkv, const Tensor& bias_table, const std::optional<Tensor>& logit_scale,
                   const std::optional<Tensor>& pad_value, const std::optional<Tensor>& queries, int64_t window_h,
                   int64_t window_w, int64_t shift_h, int64_t shift_w, int64_t heads, double scale) {
  const Inputs in =
      make_inputs(qkv, bias_table, logit_scale, pad_value, queries, window_h, window_w, shift_h, shift_w, heads, scale);
  const Tensor out = torch::stable::new_empty(in.qkv, in.out_shape());
  if (out.numel() == 0) return out;
  dispatch_floating(in.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Kernels<T> kernels = choose_kernels<Kernels<T>>();
    const Prepared<T> prepared(in, kernels);
    const ForwardArgs<T> args{prepared.args(in), out.mutable_data_ptr<T>()};
    torch::stable::parallel_for(0, args.units(), 1,
                                [&](int64_t begin, int64_t end) { kernels.forward(args, begin, end); });
  });
  return out;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;
struct Wanted {
  bool table, logit_scale, pad_value;
};

// Sums over chunks, 0 at first; empty where they are not wanted.
template <typename T>
struct ChunkSums {
  using Sum = Accumulator<T>;

  ChunkSums(const Inputs& in, const BackwardArgs<T>& args, const Wanted& wanted)
      : table(allocate(in, wanted.table, {args.chunks(), in.heads, in.grid.table_rows()})),
        factor(allocate(in, wanted.logit_scale, {args.chunks(), in.heads})),
        pad(allocate(in, wanted.pad_value, {args.chunks(), in.qkv.size(3)})) {}

  static Tensor allocate(const Inputs& in, bool wanted, std::vector<int64_t> shape) {
    if (!wanted) shape = {0};
    Tensor sums = torch::stable::new_empty(in.qkv, shape, in.sum_dtype);
    return torch::stable::zero_(sums);
  }

  static Sum* pointer(const Tensor& sums) { return sums.numel() ? sums.mutable_data_ptr<Sum>() : nullptr; }

  Tensor table, factor, pad;
};

// Gradients of log(factor) -> of logit_scale: none above the clamp.
template <typename Sum>
void clamp_gradient(const Inputs& in, const Tensor& gradient) {
  const Sum* logit_scale = in.logit_scale->template const_data_ptr<Sum>();
  Sum* to = gradient.mutable_data_ptr<Sum>();
  for (int64_t head = 0; head < in.heads; ++head)
    if (logit_scale[head] > kMaxLogitScale) to[head] = 0;
}

template <typename T>
Gradients run_backward(const Inputs& in, const Tensor& grad_out, const Wanted& wanted,
                       const std::array<ScalarType, 3>& dtypes) {
  using Sum = Accumulator<T>;
  const Kernels<T> kernels = choose_kernels<Kernels<T>>();
  const Prepared<T> prepared(in, kernels);
  Tensor grad_qkv = torch::stable::new_empty(in.qkv, in.qkv.sizes());
  BackwardArgs<T> args{prepared.args(in), grad_out.const_data_ptr<T>(), grad_qkv.mutable_data_ptr<T>()};
  const ChunkSums<T> sums(in, args, wanted);
  args.table_sums = sums.pointer(sums.table);
  args.factor_sums = sums.pointer(sums.factor);
  args.pad_sums = sums.pointer(sums.pad);
  if (grad_out.numel() == 0)
    torch::stable::zero_(grad_qkv);
  else
    torch::stable::parallel_for(0, args.units(), 1,
                                [&](int64_t begin, int64_t end) { kernels.backward(args, begin, end); });
  const auto unwanted = [&] { return torch::stable::new_empty(grad_out, {0}); };
  Gradients gradients{grad_qkv, unwanted(), unwanted(), unwanted()};
  if (wanted.table) std::get<1>(gradients) = dense(torch::stable::transpose(sum_partials(sums.table), 0, 1), dtypes[0]);
  if (wanted.logit_scale) {
    const Tensor gradient = sum_partials(sums.factor);
    clamp_gradient<Sum>(in, gradient);
    std::get<2>(gradients) = dense(gradient, dtypes[1]);
  }
  if (wanted.pad_value) std::get<3>(gradients) = dense(sum_partials(sums.pad), dtypes[2]);
  return gradients;
}

Gradients backward_cpu(const Tensor& grad_out, const Tensor& qkv, const Tensor& bias_table,
                       const std::optional<Tensor>& logit_scale, const std::optional<Tensor>& pad_value,
                       const std::optional<Tensor>& queries, int64_t window_h, int64_t window_w, int64_t shift_h,
                       int64_t shift_w, int64_t heads, double scale, bool needs_table, bool needs_logit_scale,
                       bool needs_pad_value) {
  const Inputs in =
      make_inputs(qkv, bias_table, logit_scale, pad_value, queries, window_h, window_w, shift_h, shift_w, heads, scale);
  const std::vector<int64_t> shape = in.out_shape();
  check(grad_out.sizes().equals({shape.data(), shape.size()}), "grad_out: expected shape ",
        shape_text({shape.data(), shape.size()}), ", got ", shape_text(grad_out.sizes()));
  check_dtype(grad_out, "grad_out", in.dtype);
  const Wanted wanted{needs_table, needs_logit_scale && logit_scale, needs_pad_value && pad_value};
  const auto dtype_of = [&](const std::optional<Tensor>& tensor) { return tensor ? tensor->scalar_type() : in.dtype; };
  const std::array<ScalarType, 3> dtypes{bias_table.scalar_type(), dtype_of(logit_scale), dtype_of(pad_value)};
  Gradients gradients;
  dispatch_floating(in.dtype, [&](auto type) {
    gradients = run_backward<typename decltype(type)::type>(in, dense(grad_out), wanted, dtypes);
  });
  return gradients;
}

}  // namespace
}  // namespace simmim_fast::shifted_window_attention

STABLE_TORCH_LIBRARY_IMPL(simmim_fast, CPU, m) {
  namespace op = simmim_fast::shifted_window_attention;
  m.impl("shifted_window_attention_native", TORCH_BOX(&op::forward_cpu));
  m.impl("shifted_window_attention_native_backward", TORCH_BOX(&op::backward_cpu));
}
