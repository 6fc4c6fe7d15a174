// shifted_window_attention on the GPU, for windows of at most 64 tokens and heads of 32 channels: checks, allocation,
// launches. Formulas: simmim_fast/ops/shifted_window_attention.

#include "cuda/window_gradients.cuh"
#include "cuda/window_kernels.cuh"

namespace simmim_fast::shifted_window_attention {
namespace {

// What the caller gave, checked.
struct Inputs {
  Tensor qkv, bias_table;
  std::optional<Tensor> logit_scale, pad_value, queries;
  WindowGrid grid;
  int64_t heads;
  double scale;

  int64_t images() const { return qkv.size(0); }
  int64_t channels() const { return qkv.size(3) / 3; }
  int64_t windows() const { return images() * grid.windows(); }
  int64_t rows() const { return queries ? queries->size(1) : grid.tokens(); }
  int64_t side() const { return grid.tokens() <= 16 ? 16 : grid.tokens() <= 32 ? 32 : 64; }
  bool is_rolled() const { return grid.shift_h > 0 || grid.shift_w > 0; }
  std::vector<int64_t> out_shape() const {
    if (queries) return {images(), rows(), channels()};
    return {images(), grid.height, grid.width, channels()};
  }
};

// Contiguous, and where 16 bytes can be read at a time.
Tensor aligned(const Tensor& tensor) {
  const Tensor values = dense(tensor);
  return reinterpret_cast<uintptr_t>(values.const_data_ptr()) % 16 == 0 ? values : torch::stable::clone(values);
}

void check_parameter(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape, const Tensor& qkv) {
  check_shape(tensor, name, shape);
  check_same_device(tensor, name, qkv, "qkv");
}

void check_inputs(const Inputs& in) {
  const WindowGrid& grid = in.grid;
  check(grid.window_h > 0 && grid.window_w > 0, "window_size: expected positive sizes, got ", grid.window_h, ", ",
        grid.window_w);
  check(grid.shift_h >= 0 && grid.shift_h < grid.window_h && grid.shift_w >= 0 && grid.shift_w < grid.window_w,
        "shift: expected 0 <= shift < window, got ", grid.shift_h, ", ", grid.shift_w);
  check(in.qkv.scalar_type() != ScalarType::Double, "qkv: expected float32, bfloat16 or float16, got float64");
  check(int64_t(grid.window_h) * grid.window_w <= kMaxTokens && in.heads > 0 &&
            in.qkv.size(3) == 3 * in.heads * kHeadSize,
        "qkv: expected windows of at most ", kMaxTokens, " tokens and heads of ", kHeadSize, " channels, got ",
        grid.window_h, " x ", grid.window_w, " and ", in.qkv.size(3), " channels for ", in.heads, " heads");
  check(int64_t(grid.height) * grid.width <= 2147483647 && in.windows() * in.heads <= 2147483647,
        "qkv: expected fewer than 2^31 tokens of an image and heads of windows, got ", shape_text(in.qkv.sizes()));
  check_parameter(in.bias_table, "bias_table", {grid.table_rows(), in.heads}, in.qkv);
  if (in.logit_scale) check_parameter(*in.logit_scale, "logit_scale", {in.heads}, in.qkv);
  if (in.pad_value) check_parameter(*in.pad_value, "pad_value", {in.qkv.size(3)}, in.qkv);
  if (!in.queries) return;
  check_dtype(*in.queries, "queries", ScalarType::Int);
  check_rank(*in.queries, "queries", 2);
  check_parameter(*in.queries, "queries", {in.images(), in.queries->size(1)}, in.qkv);
  check(in.rows() <= grid.height * grid.width && (grid.windows() == 1 || in.qkv.numel() == 0),
        "queries: expected a grid of one window that holds them, got ", grid.windows(), " and ", in.rows());
}

Inputs make_inputs(const Tensor& qkv, const Tensor& bias_table, const std::optional<Tensor>& logit_scale,
                   const std::optional<Tensor>& pad_value, const std::optional<Tensor>& queries, int64_t window_h,
                   int64_t window_w, int64_t shift_h, int64_t shift_w, int64_t heads, double scale) {
  check_rank(qkv, "qkv", 4);
  const WindowGrid grid{int(qkv.size(1)), int(qkv.size(2)), int(window_h), int(window_w), int(shift_h), int(shift_w)};
  const auto contiguous = [](const std::optional<Tensor>& tensor) {
    return tensor ? std::optional<Tensor>(dense(*tensor)) : std::nullopt;
  };
  const Inputs in{
      aligned(qkv), dense(bias_table), contiguous(logit_scale), contiguous(pad_value), contiguous(queries), grid, heads,
      scale};
  check_inputs(in);
  return in;
}

Parameter parameter(const std::optional<Tensor>& tensor) {
  return tensor ? Parameter{tensor->const_data_ptr(), tensor->scalar_type()} : Parameter{};
}

// Calls f(Type<T>, std::integral_constant of the warps that a window takes).
template <typename F>
void dispatch(ScalarType dtype, int64_t tokens, F&& f) {
  dispatch_floating(dtype, [&](auto type) {
    if constexpr (!std::is_same_v<decltype(type), Type<double>>) {
      if (tokens <= 16) return f(type, std::integral_constant<int, 1>{});
      if (tokens <= 32) return f(type, std::integral_constant<int, 2>{});
      if (tokens <= 48) return f(type, std::integral_constant<int, 3>{});
      f(type, std::integral_constant<int, 4>{});
    }
  });
}

template <typename F>
void dispatch(const Inputs& in, F&& f) {
  dispatch(in.qkv.scalar_type(), in.grid.tokens(), f);
}

// Biases of `kinds` of windows, as the kernels read them.
Tensor make_biases(const Stream& stream, const Inputs& in, int kinds) {
  const int heads = int(in.heads), side = int(in.side());
  const Tensor bias = torch::stable::new_empty(in.qkv, {kinds, heads, side, side}, ScalarType::Float);
  dispatch(in, [&](auto, auto warps) {
    launch(stream, window_bias_kernel<warps>, dim3(blocks_for(bias.numel(), kThreads)), dim3(kThreads), in.grid,
           parameter(in.bias_table), bias.mutable_data_ptr<float>(), kinds, heads, side);
  });
  return bias;
}

// Windows of a block: as many as leave enough blocks to fill a GPU, or else the last. It depends on sizes alone, so
// that sums repeat from GPU to GPU.
int64_t block_windows(const Inputs& in, std::initializer_list<int64_t> choices) {
  constexpr int64_t kEnoughBlocks = 512;
  for (const int64_t windows : choices)
    if ((in.windows() + windows - 1) / windows * in.heads >= kEnoughBlocks) return windows;
  return *(choices.end() - 1);
}

template <typename T>
Args<T> make_args(const Inputs& in, const Tensor& bias, int64_t block_windows) {
  return {in.grid,
          in.qkv.const_data_ptr<T>(),
          parameter(in.pad_value),
          parameter(in.logit_scale),
          in.queries ? in.queries->const_data_ptr<int32_t>() : nullptr,
          bias.const_data_ptr<float>(),
          int(in.side()),
          int(in.heads),
          int(in.rows()),
          in.queries.has_value(),
          int(block_windows),
          uint32_t(in.windows()),
          float(in.scale)};
}

unsigned blocks_of(const Inputs& in, int64_t windows) {
  return unsigned((in.windows() + windows - 1) / windows * in.heads);
}

Tensor forward_cuda(const Tensor& qkv, const Tensor& bias_table, const std::optional<Tensor>& logit_scale,
                    const std::optional<Tensor>& pad_value, const std::optional<Tensor>& queries, int64_t window_h,
                    int64_t window_w, int64_t shift_h, int64_t shift_w, int64_t heads, double scale) {
  const Stream stream(qkv);
  const Inputs in =
      make_inputs(qkv, bias_table, logit_scale, pad_value, queries, window_h, window_w, shift_h, shift_w, heads, scale);
  const std::vector<int64_t> shape = in.out_shape();
  const Tensor out = torch::stable::new_empty(in.qkv, {shape.data(), shape.size()});
  if (out.numel() == 0) return out;
  const Tensor bias = make_biases(stream, in, 1);
  const int64_t windows = block_windows(in, {8, 4, 2, 1});
  dispatch(in, [&](auto type, auto warps) {
    using T = typename decltype(type)::type;
    launch_with<ForwardTile<T, warps>>(stream, shifted_window_attention_fwd_kernel<T, warps>,
                                       dim3(blocks_of(in, windows)), dim3(32 * warps),
                                       ForwardArgs<T>{make_args<T>(in, bias, windows), out.mutable_data_ptr<T>()});
  });
  return out;
}

// Sums for table, logit scale and padding value; undefined where they are not wanted.
struct Partials {
  Tensor table, scale, pad;
};

float* pointer(const Tensor& sums) { return sums.defined() ? sums.mutable_data_ptr<float>() : nullptr; }

Partials allocate(const Inputs& in, int64_t blocks, bool table, bool scale, bool pad) {
  const auto make = [&](bool wanted, std::vector<int64_t> shape) {
    if (!wanted) return Tensor();
    return torch::stable::new_empty(in.qkv, {shape.data(), shape.size()}, ScalarType::Float);
  };
  return {make(table, {blocks, in.heads, in.grid.tokens(), in.grid.tokens()}), make(scale, {in.windows(), in.heads}),
          make(pad && in.grid.is_padded(), {in.windows(), 2, in.channels()})};
}

// Fills grad_qkv and the partial sums.
void run_backward(const Stream& stream, const Inputs& in, const Tensor& grad_out, const Tensor& grad_qkv,
                  int64_t windows, const Partials& partials) {
  const Tensor bias = make_biases(stream, in, in.is_rolled() ? 4 : 1);
  dispatch(in, [&](auto type, auto warps) {
    using T = typename decltype(type)::type;
    launch_with<GradientTile<T, warps>>(
        stream, shifted_window_attention_bwd_kernel<T, warps>, dim3(blocks_of(in, windows)), dim3(32 * warps),
        BackwardArgs<T>{make_args<T>(in, bias, windows), grad_out.const_data_ptr<T>(), grad_qkv.mutable_data_ptr<T>(),
                        pointer(partials.table), pointer(partials.scale), pointer(partials.pad)});
  });
}

Partials sum_over_blocks(const Stream& stream, const Partials& partials) {
  const auto sum = [&](const Tensor& of_blocks) {
    return of_blocks.defined() ? sum_partials(stream, of_blocks) : Tensor();
  };
  return {sum(partials.table), sum(partials.scale), sum(partials.pad)};
}

// The gradient of a parameter, by a kernel that takes the sums over all blocks.
template <typename... Parameters, typename... Args>
Tensor finish(const Stream& stream, const Tensor& parameter, const Tensor& sums, void (*kernel)(Parameters...),
              const Args&... args) {
  const Tensor gradient = torch::stable::new_empty(parameter, parameter.sizes());
  launch(stream, kernel, dim3(blocks_for(gradient.numel(), kThreads)), dim3(kThreads), args..., pointer(sums),
         Result{gradient.mutable_data_ptr(), gradient.scalar_type()});
  return gradient;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_cuda(
    const Tensor& grad_out, const Tensor& qkv, const Tensor& bias_table, const std::optional<Tensor>& logit_scale,
    const std::optional<Tensor>& pad_value, const std::optional<Tensor>& queries, int64_t window_h, int64_t window_w,
    int64_t shift_h, int64_t shift_w, int64_t heads, double scale, bool needs_table, bool needs_logit_scale,
    bool needs_pad_value) {
  const Stream stream(qkv);
  const Inputs in =
      make_inputs(qkv, bias_table, logit_scale, pad_value, queries, window_h, window_w, shift_h, shift_w, heads, scale);
  const std::vector<int64_t> shape = in.out_shape();
  check(grad_out.sizes().equals({shape.data(), shape.size()}), "grad_out: expected shape ",
        shape_text({shape.data(), shape.size()}), ", got ", shape_text(grad_out.sizes()));
  check_dtype(grad_out, "grad_out", in.qkv.scalar_type());
  check_same_device(grad_out, "grad_out", in.qkv, "qkv");
  const bool scales = needs_logit_scale && logit_scale, pads = needs_pad_value && pad_value;
  const int64_t windows = block_windows(in, {32, 16, 8, 4}), blocks = (in.windows() + windows - 1) / windows;
  const Partials partials = allocate(in, blocks, needs_table, scales, pads);
  const Tensor grad_qkv = torch::stable::new_empty(in.qkv, in.qkv.sizes());
  if (grad_qkv.numel() > 0) run_backward(stream, in, aligned(grad_out), grad_qkv, windows, partials);
  const Partials sums = sum_over_blocks(stream, partials);
  const auto unwanted = [&] { return torch::stable::new_empty(grad_out, {0}); };
  const int of_heads = int(heads), channels = int(in.channels());
  return {grad_qkv,
          needs_table ? finish(stream, bias_table, sums.table, table_gradient_kernel, in.grid, of_heads) : unwanted(),
          scales ? finish(stream, *logit_scale, sums.scale, scale_gradient_kernel, parameter(in.logit_scale), of_heads)
                 : unwanted(),
          pads ? finish(stream, *pad_value, sums.pad, pad_gradient_kernel, channels) : unwanted()};
}

}  // namespace

// Bytes of shared memory that a launch asks for, by bytes of an element (2 or 4) and warps of a window.
// benchmarks/cuda_kernels.py reads them.
extern "C" __attribute__((visibility("default"))) int64_t shifted_window_attention_shared_bytes(bool backward,
                                                                                                int64_t element_size,
                                                                                                int64_t warps) {
  int64_t bytes = 0;
  dispatch(element_size == 2 ? ScalarType::BFloat16 : ScalarType::Float, 16 * warps, [&](auto type, auto of_window) {
    using T = typename decltype(type)::type;
    bytes = backward ? sizeof(GradientTile<T, of_window>) : sizeof(ForwardTile<T, of_window>);
  });
  return bytes;
}

}  // namespace simmim_fast::shifted_window_attention

SIMMIM_FAST_CUDA_LIBRARY(m) {
  namespace op = simmim_fast::shifted_window_attention;
  m.impl("shifted_window_attention_native", TORCH_BOX(&op::forward_cuda));
  m.impl("shifted_window_attention_native_backward", TORCH_BOX(&op::backward_cuda));
}
