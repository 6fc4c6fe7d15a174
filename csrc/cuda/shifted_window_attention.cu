// shifted_window_attention on the GPU, for windows of at most 64 tokens and heads of 32 channels. qkv is read once in
// each direction, where the linear layer wrote it; what a block needs of a window and head lies in shared memory.
// Formulas: simmim_fast/ops/shifted_window_attention.

#include "cuda/window_gradients.cuh"

namespace simmim_fast::shifted_window_attention {
namespace {

// Blocks that shall share a multiprocessor: as many as leave a thread the registers that it needs.
template <typename T, int kWarps>
constexpr int kForwardBlocks = (std::is_same_v<T, float> ? 12
                                : kWarps == 4            ? 16
                                                         : 20) /
                               kWarps;
template <typename T, int kWarps>
constexpr int kBackwardBlocks = (std::is_same_v<T, float> ? 8
                                 : kWarps == 4            ? 12
                                                          : 16) /
                                kWarps;

// out (16, D) += weights of the warp's queries, rounded to T, times the values.
template <typename T, int kWarps>
__device__ __forceinline__ void multiply_weights(float (&out)[kHeadSize / 8][4], const float (&weights)[2 * kWarps][4],
                                                 ForwardTile<T, kWarps>& tile) {
  const auto values = operand<Order::kRows, kRowStride<T>>(tile.values);
  if constexpr (std::is_same_v<T, float>) {
    constexpr int kStride = kWeightStride<T, kWarps>;
    float* rows = tile.weights + threadIdx.x / 32 * 16 * kStride;
    store_result<kStride>(rows, weights);
    __syncwarp();
    multiply<16 * kWarps>(out, operand<Order::kRows, kStride>(rows), values);
  } else {
    multiply<16 * kWarps>(out, weights, values);
  }
}

// Output of one head of consecutive windows, one after the other. Block x: head x % heads, windows from
// x / heads * block_windows on; one warp: 16 queries.
template <typename T, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, kForwardBlocks<T, kWarps>)
    shifted_window_attention_fwd_kernel(const ForwardArgs<T> args) {
  constexpr int kRow = kRowStride<T>;
  using Tile = ForwardTile<T, kWarps>;
  Tile& tile = dynamic_shared<Tile>();
  const int head = blockIdx.x % args.heads, first = threadIdx.x / 32 * 16;
  const uint32_t block = blockIdx.x / args.heads, first_window = block * args.block_windows;
  const uint32_t last_window = min(first_window + args.block_windows, args.windows), in_image = args.grid.windows();
  const bool cosine = args.logit_scale.data;
  const float factor = args.factor(head);
  const float* bias = args.bias + head * args.side * args.side;
  if (args.pad_value.data) place_padding(args, head, tile);
  for (uint32_t window = first_window; window < last_window; ++window) {
    const uint32_t image = window / in_image;
    const int place = window % in_image;
    place_slots(args, image, place, tile);
    if (args.chosen) choose_queries(args, image, tile);
    const bool regions = args.grid.has_regions(place);
    if (regions) place_regions(args, place, tile);
    __syncthreads();
    fetch_window(args, head, tile);
    finish_window(args, tile);
    __syncthreads();
    if (first < args.rows) {
      float weights[2 * kWarps][4] = {}, inverse_sums[2];
      multiply<kHeadSize>(weights, operand<Order::kRows, kRow>(tile.queries + first * kRow),
                          operand<Order::kColumns, kRow>(tile.keys));
      if (cosine) scale_by_norms(weights, tile, factor);
      if (regions)
        softmax<true>(weights, inverse_sums, tile, bias, cosine ? 1 : factor);
      else
        softmax<false>(weights, inverse_sums, tile, bias, cosine ? 1 : factor);
      float out[kHeadSize / 8][4] = {};
      multiply_weights(out, weights, tile);
      const int row = first + lane() / 4;
#pragma unroll
      for (int at = 0; at < 4; ++at) {
        const bool missing = tile.query_tokens[row + at / 2 * 8] == kNoToken;
        const float by = missing ? NAN : inverse_sums[at / 2];
#pragma unroll
        for (int j = 0; j < kHeadSize / 8; ++j) out[j][at] *= by;
      }
      store_result<kRow>(tile.queries + first * kRow, out);
      __syncwarp();
      store_rows(tile.queries, args.out + head * kHeadSize, args.channels(), tile.out_rows);
    }
    __syncthreads();
  }
}

// weights: exponentials of the logits -> softmax; products: gradients of the weights -> gradients of the logits.
template <int J>
__device__ __forceinline__ void softmax_gradient(float (&weights)[J][4], float (&products)[J][4],
                                                 const float (&inverse_sums)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = 0;
#pragma unroll
    for (int j = 0; j < J; ++j) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        weights[j][i] *= inverse_sums[half];
        sum += weights[j][i] * products[j][i];
      }
    }
    sum = sum_over_row(sum);
#pragma unroll
    for (int j = 0; j < J; ++j) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) products[j][i] = weights[j][i] * (products[j][i] - sum);
    }
  }
}

// Gradients of the logits -> of the products of queries and keys.
template <typename T, int kWarps>
__device__ __forceinline__ void scale_products(float (&grads)[2 * kWarps][4], const WindowTile<T, kWarps>& tile,
                                               bool cosine, float factor) {
  if (cosine) return scale_by_norms(grads, tile, factor);
#pragma unroll
  for (int j = 0; j < 2 * kWarps; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) grads[j][i] *= factor;
  }
}

// This lane's share of the gradient of the logarithm of the factor, from those of the products, which are computed
// again: they left their registers to the softmax.
template <typename T, int kWarps>
__device__ __forceinline__ float scale_gradient(const float (&grads)[2 * kWarps][4],
                                                const WindowTile<T, kWarps>& tile) {
  constexpr int kRow = kRowStride<T>;
  float products[2 * kWarps][4] = {}, sum = 0;
  multiply<kHeadSize>(products, operand<Order::kRows, kRow>(tile.queries + threadIdx.x / 32 * 16 * kRow),
                      operand<Order::kColumns, kRow>(tile.keys));
#pragma unroll
  for (int j = 0; j < 2 * kWarps; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum += grads[j][i] * products[j][i];
  }
  return sum;
}

// grads (16, D): of queries or keys as if their norm were constant -> with it.
template <typename T, int kSlots>
__device__ __forceinline__ void project(float (&grads)[kHeadSize / 8][4], const T* rows, const Norms<kSlots>& norms) {
  const int first = threadIdx.x / 32 * 16 + lane() / 4, t = lane() % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first + 8 * half;
    float x[kHeadSize / 4], sum = 0;
#pragma unroll
    for (int j = 0; j < kHeadSize / 8; ++j) {
      const Vector<T, 2> pair = load<2>(rows + row * kRowStride<T> + 8 * j + 2 * t);
#pragma unroll
      for (int i = 0; i < 2; ++i) sum += (x[2 * j + i] = float(pair.values[i])) * grads[j][2 * half + i];
    }
    const float inverse = norms.inverse[row], along = inverse * inverse * sum_over_row(sum);
#pragma unroll
    for (int j = 0; j < kHeadSize / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        grads[j][2 * half + i] = norms.power[row] * (grads[j][2 * half + i] - x[2 * j + i] * along);
    }
  }
}

// Adds what padding tokens have in `keys` and `values` (gradients) to the sums. One thread: some channels.
template <typename T, int kWarps>
__device__ void add_padding(GradientTile<T, kWarps>& tile, int tokens) {
  for (int channel = threadIdx.x; channel < 2 * kHeadSize; channel += 32 * kWarps) {
    const T* rows = channel < kHeadSize ? tile.keys + channel : tile.values + (channel - kHeadSize);
    float sum = tile.pad_sums[channel];
    for (int slot = 0; slot < tokens; ++slot)
      if (tile.key_tokens[slot] == kPaddingToken) sum += float(rows[slot * kRowStride<T>]);
    tile.pad_sums[channel] = sum;
  }
}

// Stores a block's sums over its windows.
template <typename T, int kWarps>
__device__ __forceinline__ void store_partials(const BackwardArgs<T>& args, const float (&table_sums)[2 * kWarps][4],
                                               float scale_sum, GradientTile<T, kWarps>& tile) {
  const int head = blockIdx.x % args.heads, tokens = args.grid.tokens();
  const int64_t block = blockIdx.x / args.heads;
  if (args.table_partials) {
    float* to = args.table_partials + int64_t(blockIdx.x) * tokens * tokens;  // (block, head)
#pragma unroll
    for (int j = 0; j < 2 * kWarps; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int query = threadIdx.x / 32 * 16 + lane() / 4 + i / 2 * 8, key = 8 * j + lane() % 4 * 2 + i % 2;
        if (query < tokens && key < tokens) to[query * tokens + key] = table_sums[j][i];
      }
    }
  }
  if (args.scale_partials) {
#pragma unroll
    for (int other = 16; other > 0; other /= 2) scale_sum += __shfl_xor_sync(kFullWarp, scale_sum, other);
    if (lane() == 0) tile.scale_sums[threadIdx.x / 32] = scale_sum;
    __syncthreads();
    float sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) sum += tile.scale_sums[warp];
    if (threadIdx.x == 0) args.scale_partials[blockIdx.x] = sum;
  }
  if (args.pad_partials)
    for (int channel = threadIdx.x; channel < 2 * kHeadSize; channel += 32 * kWarps) {
      const int64_t part = 2 * block + channel / kHeadSize;
      args.pad_partials[part * args.channels() + head * kHeadSize + channel % kHeadSize] = tile.pad_sums[channel];
    }
}

// Gradients of one head of consecutive windows, blocks as in the forward; one warp: 16 queries, then 16 keys.
template <typename T, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, kBackwardBlocks<T, kWarps>)
    shifted_window_attention_bwd_kernel(const BackwardArgs<T> args) {
  constexpr int kRow = kRowStride<T>, kWeightRow = kWeightStride<T, kWarps>, kTiles = 2 * kWarps;
  using Tile = GradientTile<T, kWarps>;
  Tile& tile = dynamic_shared<Tile>();
  const int head = blockIdx.x % args.heads, first = threadIdx.x / 32 * 16;
  const uint32_t first_window = blockIdx.x / args.heads * args.block_windows, in_image = args.grid.windows();
  const uint32_t last_window = min(first_window + args.block_windows, args.windows);
  const bool cosine = args.logit_scale.data;
  const float factor = args.factor(head);
  const int64_t channels = args.channels();
  float table_sums[kTiles][4] = {}, scale_sum = 0;
  for (int channel = threadIdx.x; channel < 2 * kHeadSize; channel += 32 * kWarps) tile.pad_sums[channel] = 0;
  if (args.pad_value.data) place_padding(args, head, tile);
  for (uint32_t window = first_window; window < last_window; ++window) {
    const uint32_t image = window / in_image;
    const int place = window % in_image, kind = window_kind(args.grid, place);
    const float* bias = args.bias + (kind * args.heads + head) * args.side * args.side;
    place_slots(args, image, place, tile);
    if (args.chosen) place_results(args, image, tile);
    __syncthreads();
    fetch_window(args, head, tile);
    fetch_rows<T, kWarps>(tile.grads, args.grad_out + head * kHeadSize, channels, tile.out_rows);
    finish_window(args, tile);
    __syncthreads();
    float weights[kTiles][4] = {}, grads[kTiles][4] = {}, inverse_sums[2];
    multiply<kHeadSize>(weights, operand<Order::kRows, kRow>(tile.queries + first * kRow),
                        operand<Order::kColumns, kRow>(tile.keys));
    if (cosine) scale_by_norms(weights, tile, factor);
    softmax<false>(weights, inverse_sums, tile, bias, cosine ? 1 : factor);
    multiply<kHeadSize>(grads, operand<Order::kRows, kRow>(tile.grads + first * kRow),
                        operand<Order::kColumns, kRow>(tile.values));
    softmax_gradient(weights, grads, inverse_sums);
    store_result<kWeightRow>(tile.weights + first * kWeightRow, weights);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) table_sums[j][i] += grads[j][i];
    }
    scale_products(grads, tile, cosine, factor);
    store_result<kWeightRow>(tile.weight_grads + first * kWeightRow, grads);
    if (args.scale_partials) scale_sum += scale_gradient(grads, tile);
    __syncthreads();
    float grad_queries[kHeadSize / 8][4] = {}, grad_keys[kHeadSize / 8][4] = {}, grad_values[kHeadSize / 8][4] = {};
    const auto of_keys = operand<Order::kColumns, kWeightRow>(tile.weight_grads + first);
    multiply<16 * kWarps>(grad_values, operand<Order::kColumns, kWeightRow>(tile.weights + first),
                          operand<Order::kRows, kRow>(tile.grads));
    multiply<16 * kWarps>(grad_keys, of_keys, operand<Order::kRows, kRow>(tile.queries));
    multiply<16 * kWarps>(grad_queries, operand<Order::kRows, kWeightRow>(tile.weight_grads + first * kWeightRow),
                          operand<Order::kRows, kRow>(tile.keys));
    if (cosine) {
      project(grad_queries, tile.queries, tile.query_norms);
      project(grad_keys, tile.keys, tile.key_norms);
    }
    __syncthreads();
    store_result<kRow>(tile.queries + first * kRow, grad_queries);
    store_result<kRow>(tile.keys + first * kRow, grad_keys);
    store_result<kRow>(tile.values + first * kRow, grad_values);
    __syncwarp();
    T* grad_qkv = args.grad_qkv + head * kHeadSize;
    store_rows(tile.queries, grad_qkv, 3 * channels, tile.key_tokens);
    store_rows(tile.keys, grad_qkv + channels, 3 * channels, tile.key_tokens);
    store_rows(tile.values, grad_qkv + 2 * channels, 3 * channels, tile.key_tokens);
    __syncthreads();
    if (!args.pad_partials) continue;
    add_padding(tile, args.grid.tokens());
    __syncthreads();
  }
  store_partials(args, table_sums, scale_sum, tile);
}

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
void dispatch(const Inputs& in, F&& f) {
  dispatch_floating(in.qkv.scalar_type(), [&](auto type) {
    if constexpr (!std::is_same_v<decltype(type), Type<double>>) {
      const int tokens = in.grid.tokens();
      if (tokens <= 16) return f(type, std::integral_constant<int, 1>{});
      if (tokens <= 32) return f(type, std::integral_constant<int, 2>{});
      if (tokens <= 48) return f(type, std::integral_constant<int, 3>{});
      f(type, std::integral_constant<int, 4>{});
    }
  });
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
  return {make(table, {blocks, in.heads, in.grid.tokens(), in.grid.tokens()}), make(scale, {blocks, in.heads}),
          make(pad && in.grid.is_padded(), {blocks, 2, in.channels()})};
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
}  // namespace simmim_fast::shifted_window_attention

SIMMIM_FAST_CUDA_LIBRARY(m) {
  namespace op = simmim_fast::shifted_window_attention;
  m.impl("shifted_window_attention_native", TORCH_BOX(&op::forward_cuda));
  m.impl("shifted_window_attention_native_backward", TORCH_BOX(&op::backward_cuda));
}
