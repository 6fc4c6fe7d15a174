// linear_masked_loss on the CPU: the head for tokens with a masked pixel alone, and the loss on each tile of the
// product while it is in L1. The prediction exists only there; the backward reads the slope of the loss at it, a byte
// for L1.

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/linear_masked_loss.h"
#include "masked_loss.h"

namespace simmim_fast::linear_masked_loss {
namespace {

using namespace gemm;
using masked_loss::Level;

enum class Loss : int64_t { kL1, kL2, kSmoothL1 };

constexpr int64_t kChunkPanels = 170;  // panels of tokens that are packed at a time
constexpr int64_t kDepthBlock = 1024;  // units of depth for which a strip is packed at a time
constexpr int64_t kTokenBlock = 512;   // tokens that the gradient of the weight adds up at a time
constexpr int64_t kOutputPanels = 16;  // panels of outputs of the weight's gradient that one thread takes
constexpr int64_t kTile = kRows * kColumns;
constexpr int64_t kLanes = 16;

template <typename Compute, typename T, typename S>
struct Pixels {
  const Compute* bias;  // (outputs)
  const T* target;      // (batch, channels, height stride, width stride)
  const bool* mask;     // (batch, mask height, mask width)
  const Compute* mean;  // (channels) or null
  const Compute* std;   // (channels) or null
  S* slope;             // (batch, slots, outputs) or null
  Sizes sizes;
};

// The loss of up to kLanes neighbouring pixels, added to the lanes, and its slope.
template <Loss kLoss, bool kSlope, typename Compute, typename T, typename S>
inline __attribute__((always_inline)) void add_loss(const Compute* __restrict product, const Compute* __restrict bias,
                                                    const T* __restrict target, Level<Compute> level,
                                                    S* __restrict slope, int64_t count, Compute* __restrict lanes) {
#pragma GCC unroll 1
  for (int64_t i = 0; i < count; ++i) {
    const Compute residual = product[i] + bias[i] - (Compute(target[i]) * level.scale + level.shift);
    const Compute size = std::abs(residual);
    if constexpr (kLoss == Loss::kL1) {
      lanes[i] += size;
      if (kSlope) slope[i] = int8_t(residual > 0) - int8_t(residual < 0);
    } else if constexpr (kLoss == Loss::kL2) {
      lanes[i] += size * size;
      if (kSlope) slope[i] = narrow<S>(2 * residual);
    } else {
      lanes[i] += size < 1 ? size * size / 2 : size - Compute(0.5);
      const Compute below = residual > 1 ? Compute(1) : residual;
      if (kSlope) slope[i] = narrow<S>(below < -1 ? Compute(-1) : below);
    }
  }
}

// The same for any count.
template <Loss kLoss, bool kSlope, typename Compute, typename T, typename S>
inline __attribute__((always_inline)) void add_run(const Compute* product, const Compute* bias, const T* target,
                                                   Level<Compute> level, S* slope, int64_t count, Compute* lanes) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    add_loss<kLoss, kSlope>(product + i, bias + i, target + i, level, kSlope ? slope + i : nullptr, kLanes, lanes);
  if (i < count)
    add_loss<kLoss, kSlope>(product + i, bias + i, target + i, level, kSlope ? slope + i : nullptr, count - i, lanes);
}

// The loss of one token's tile row, added to the lanes, and its slopes: 0 where no pixel is masked.
template <Loss kLoss, bool kSlope, typename Compute, typename T, typename S>
inline __attribute__((always_inline)) void add_segment(const Pixels<Compute, T, S>& pixels, const Row& row,
                                                       const Segment& segment, const Compute* product, Compute* lanes) {
  const Sizes& sizes = pixels.sizes;
  const int64_t y = row.y * sizes.stride + segment.y, first = row.x * sizes.stride + segment.x;
  const int64_t height = sizes.height * sizes.stride, width = sizes.width * sizes.stride, last = first + segment.count;
  const bool* mask = pixels.mask + (row.image * sizes.mask_height + y / sizes.patch) * sizes.mask_width;
  const T* target = pixels.target + ((row.image * sizes.channels + segment.channel) * height + y) * width;
  const Compute* bias = pixels.bias + segment.output;
  const Level<Compute> level = masked_loss::level(pixels.mean, pixels.std, segment.channel);
  S* slope = kSlope ? pixels.slope + row.slot * sizes.outputs + segment.output : nullptr;
  for (int64_t x = first, end; x < last; x = end) {
    const int64_t cell = x / sizes.patch, at = x - first;
    end = row.whole ? last : std::min(last, (cell + 1) * sizes.patch);
    if (row.whole || mask[cell])
      add_run<kLoss, kSlope>(product + at, bias + at, target + x, level, kSlope ? slope + at : nullptr, end - x, lanes);
    else if (kSlope)
      std::fill_n(slope + at, end - x, S(0));
  }
}

template <Loss kLoss, bool kSlope, typename Compute, typename T, typename S>
SIMMIM_FAST_SIMD double tile_loss(const Pixels<Compute, T, S>& pixels, const Row* rows, int64_t count,
                                  const std::vector<Segment>& segments, const Compute* tile) {
  alignas(64) Compute lanes[kLanes] = {};
  for (int64_t r = 0; r < count; ++r)
    for (const Segment& segment : segments)
      add_segment<kLoss, kSlope>(pixels, rows[r], segment, tile + r * kColumns + segment.output - segments[0].output,
                                 lanes);
  double sum = 0;
  for (const Compute lane : lanes) sum += lane;
  return sum;
}

// Rows [first, first + count) of `source` (any, depth) as panels, each row where `index` says.
template <typename Unit, typename E, typename Index>
void pack_panels(const std::vector<Row>& rows, int64_t first, int64_t count, const E* source, int64_t depth,
                 Index&& index, Unit* panels) {
  torch::stable::parallel_for(0, ceil_div(count, kRows), 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const E* vectors[kRows] = {};
      const int64_t used = std::min<int64_t>(kRows, count - panel * kRows);
      for (int64_t r = 0; r < used; ++r) vectors[r] = source + index(rows[first + panel * kRows + r]) * depth;
      pack_along<kRows>(vectors, used, depth, panels + panel * units<Unit>(depth) * kRows);
    }
  });
}

// The sum of the losses of all masked pixels, and the slopes where pixels.slope is not null.
template <Loss kLoss, typename Unit, typename F, typename T, typename S>
double forward_rows(const std::vector<Row>& rows, const F* features, const F* weight,
                    const Pixels<Sum<Unit>, T, S>& pixels) {
  const Sizes& sizes = pixels.sizes;
  const int64_t all = rows.size(), depth = units<Unit>(sizes.depth), strips = ceil_div(sizes.outputs, kColumns);
  const int64_t chunk_rows = std::min<int64_t>(kChunkPanels * kRows, ceil_div(all, kRows) * kRows);
  const Multiply<Unit> multiply = multiply_kernel<Unit>();
  const Buffer<Unit> panels(chunk_rows * depth);
  std::vector<double> sums(ceil_div(all, std::max<int64_t>(chunk_rows, 1)) * strips);
  for (int64_t first = 0, chunk = 0; first < all; first += chunk_rows, ++chunk) {
    const int64_t count = std::min(chunk_rows, all - first);
    pack_panels(rows, first, count, features, sizes.depth, [](const Row& row) { return row.token; }, panels.get());
    torch::stable::parallel_for(0, strips, 1, [&](int64_t begin, int64_t end) {
      const Buffer<Unit> strip(depth * kColumns);
      alignas(64) Sum<Unit> tile[kTile];
      for (int64_t s = begin; s < end; ++s) {
        const int64_t output = s * kColumns, columns = std::min<int64_t>(kColumns, sizes.outputs - output);
        const std::vector<Segment> segments = segments_of(sizes, output, output + columns);
        const F* vectors[kColumns] = {};
        for (int64_t c = 0; c < columns; ++c) vectors[c] = weight + (output + c) * sizes.depth;
        pack_along<kColumns>(vectors, columns, sizes.depth, strip.get());
        double sum = 0;
        for (int64_t r = 0; r < count; r += kRows) {
          multiply(panels.get() + r * depth, strip.get(), tile, depth, false);
          const int64_t used = std::min<int64_t>(kRows, count - r);
          const Row* here = rows.data() + first + r;
          sum += pixels.slope ? tile_loss<kLoss, true>(pixels, here, used, segments, tile)
                              : tile_loss<kLoss, false>(pixels, here, used, segments, tile);
        }
        sums[chunk * strips + s] = sum;
      }
    });
  }
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

template <typename F, typename S>
struct BackwardArgs {
  const F* features;  // (batch, height, width, depth)
  const F* weight;    // (outputs, depth)
  const S* slope;     // (batch, slots, outputs)
  Accumulator<F> factor;
  F* grad_features;  // like features, or null
  F* grad_weight;    // like weight, or null
  F* grad_bias;      // (outputs) or null
  Sizes sizes;
};

template <typename F>
SIMMIM_FAST_SIMD void store_scaled(const Accumulator<F>* __restrict from, Accumulator<F> factor, int64_t count,
                                   F* __restrict to) {
  for (int64_t i = 0; i < count; ++i) to[i] = narrow<F>(from[i] * factor);
}

// Rows of the gradient of tokens that were not computed: 0.
template <typename F>
void clear_rows(const std::vector<Row>& rows, int64_t tokens, int64_t depth, F* grad_features) {
  std::vector<bool> computed(tokens);
  for (const Row& row : rows) computed[row.token] = true;
  for (int64_t token = 0; token < tokens; ++token)
    if (!computed[token]) std::fill_n(grad_features + token * depth, depth, F(0));
}

// grad_features = factor * slope weight, over strips of its channels.
template <typename Unit, typename F, typename S>
void backward_features(const std::vector<Row>& rows, const BackwardArgs<F, S>& args) {
  const Sizes& sizes = args.sizes;
  const int64_t all = rows.size(), depth = units<Unit>(sizes.outputs);
  const int64_t chunk_rows = std::min<int64_t>(kChunkPanels * kRows, ceil_div(all, kRows) * kRows);
  const Multiply<Unit> multiply = multiply_kernel<Unit>();
  const Buffer<Unit> panels(chunk_rows * depth);
  std::vector<const F*> vectors(sizes.outputs);
  for (int64_t o = 0; o < sizes.outputs; ++o) vectors[o] = args.weight + o * sizes.depth;
  clear_rows(rows, sizes.batch * sizes.height * sizes.width, sizes.depth, args.grad_features);
  for (int64_t first = 0; first < all; first += chunk_rows) {
    const int64_t count = std::min(chunk_rows, all - first), padded = ceil_div(count, kRows) * kRows;
    pack_panels(rows, first, count, args.slope, sizes.outputs, [](const Row& row) { return row.slot; }, panels.get());
    torch::stable::parallel_for(0, ceil_div(sizes.depth, kColumns), 1, [&](int64_t begin, int64_t end) {
      const Buffer<Unit> strip(kDepthBlock * kColumns);
      const Buffer<Sum<Unit>> products(padded * kColumns);
      for (int64_t s = begin; s < end; ++s) {
        const int64_t channel = s * kColumns, columns = std::min<int64_t>(kColumns, sizes.depth - channel);
        for (int64_t k = 0; k < depth; k += kDepthBlock) {
          const int64_t block = std::min(kDepthBlock, depth - k), output = k * kElements<Unit>;
          pack_across<kColumns>(vectors.data() + output, channel, columns,
                                std::min(block * kElements<Unit>, sizes.outputs - output), strip.get());
          for (int64_t r = 0; r < count; r += kRows)
            multiply(panels.get() + r * depth + k * kRows, strip.get(), products.get() + r * kColumns, block, k > 0);
        }
        for (int64_t r = 0; r < count; ++r)
          store_scaled(products.get() + r * kColumns, args.factor, columns,
                       args.grad_features + rows[first + r].token * sizes.depth + channel);
      }
    });
  }
}

// Columns [begin, end) of grad_bias = factor * the sum of the slopes over the rows.
template <typename F, typename S>
SIMMIM_FAST_SIMD void backward_bias(const std::vector<Row>& rows, const BackwardArgs<F, S>& args, int64_t begin,
                                    int64_t end) {
  double sums[kOutputPanels * kRows] = {};
  for (const Row& row : rows) {
    const S* slope = args.slope + row.slot * args.sizes.outputs + begin;
    for (int64_t i = 0; i < end - begin; ++i) sums[i] += widen(slope[i]);
  }
  for (int64_t i = 0; i < end - begin; ++i) args.grad_bias[begin + i] = F(Accumulator<F>(sums[i] * args.factor));
}

// Rows [begin, end) of grad_weight = factor * slope' features.
template <typename Unit, typename F, typename S>
void backward_weight(const std::vector<Row>& rows, const BackwardArgs<F, S>& args, int64_t begin, int64_t end) {
  const Sizes& sizes = args.sizes;
  const int64_t all = rows.size(), strips = ceil_div(sizes.depth, kColumns);
  const Multiply<Unit> multiply = multiply_kernel<Unit>();
  const Buffer<Unit> panels(kOutputPanels * kRows * kTokenBlock), strip(kTokenBlock * kColumns);
  const Buffer<Sum<Unit>> tiles(strips * kOutputPanels * kTile);
  std::vector<const F*> features(kTokenBlock);
  std::vector<const S*> slopes(kTokenBlock);
  for (int64_t first = 0; first < all; first += kTokenBlock) {
    const int64_t count = std::min(kTokenBlock, all - first), block = units<Unit>(count);
    for (int64_t r = 0; r < count; ++r) {
      features[r] = args.features + rows[first + r].token * sizes.depth;
      slopes[r] = args.slope + rows[first + r].slot * sizes.outputs;
    }
    for (int64_t o = begin; o < end; o += kRows)
      pack_across<kRows>(slopes.data(), o, std::min<int64_t>(kRows, end - o), count,
                         panels.get() + (o - begin) * kTokenBlock);
    for (int64_t s = 0; s < strips; ++s) {
      const int64_t channel = s * kColumns, columns = std::min<int64_t>(kColumns, sizes.depth - channel);
      pack_across<kColumns>(features.data(), channel, columns, count, strip.get());
      for (int64_t panel = 0; panel * kRows < end - begin; ++panel)
        multiply(panels.get() + panel * kRows * kTokenBlock, strip.get(),
                 tiles.get() + (s * kOutputPanels + panel) * kTile, block, first > 0);
    }
  }
  for (int64_t o = begin; o < end; ++o)
    for (int64_t s = 0; s < strips; ++s) {
      const int64_t channel = s * kColumns, columns = std::min<int64_t>(kColumns, sizes.depth - channel);
      const int64_t panel = (o - begin) / kRows, row = (o - begin) % kRows;
      const Sum<Unit>* tile = tiles.get() + (s * kOutputPanels + panel) * kTile + row * kColumns;
      F* to = args.grad_weight + o * sizes.depth + channel;
      if (all > 0)
        store_scaled(tile, args.factor, columns, to);
      else
        std::fill_n(to, columns, F(0));
    }
}

template <typename Unit, typename F, typename S>
void backward_rows(const std::vector<Row>& rows, const BackwardArgs<F, S>& args) {
  if (args.grad_features) backward_features<Unit>(rows, args);
  constexpr int64_t kOutputs = kOutputPanels * kRows;
  torch::stable::parallel_for(0, ceil_div(args.sizes.outputs, kOutputs), 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * kOutputs, end = std::min(begin + kOutputs, args.sizes.outputs);
      if (args.grad_weight) backward_weight<Unit>(rows, args, begin, end);
      if (args.grad_bias) backward_bias(rows, args, begin, end);
    }
  });
}

// Calls f(Type<Unit>, Type<F>): what the products multiply, and the dtype of features and weight.
template <typename F>
void dispatch_unit(ScalarType dtype, F&& f) {
  dispatch_floating(dtype, [&](auto type) {
    using E = typename decltype(type)::type;
    if constexpr (std::is_same_v<E, BFloat16>)
      if (has_bf16()) return f(Type<Pair>{}, type);
    f(Type<Accumulator<E>>{}, type);
  });
}

// Calls f(loss as a constant, Type<S>): S is the dtype of slopes.
template <typename E, typename F>
void dispatch_loss(int64_t loss, F&& f) {
  switch (static_cast<Loss>(loss)) {
    case Loss::kL1:
      return f(std::integral_constant<Loss, Loss::kL1>{}, Type<int8_t>{});
    case Loss::kL2:
      return f(std::integral_constant<Loss, Loss::kL2>{}, Type<E>{});
    case Loss::kSmoothL1:
      return f(std::integral_constant<Loss, Loss::kSmoothL1>{}, Type<E>{});
    default:
      check(false, "loss: expected 0, 1 or 2, got ", loss);
  }
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
  const ScalarType slope_dtype = static_cast<Loss>(loss_kind) == Loss::kL1 ? ScalarType::Char : dtype;
  Tensor slope = keep_slope ? torch::stable::new_empty(features, {sizes.batch, sizes.slots, sizes.outputs}, slope_dtype)
                            : torch::stable::new_empty(features, {0}, slope_dtype);
  if (int64_t(rows.size()) < sizes.batch * sizes.slots) torch::stable::zero_(slope);
  dispatch_unit(dtype, [&](auto unit, auto type) {
    using Unit = typename decltype(unit)::type;
    using F = typename decltype(type)::type;
    using Compute = Sum<Unit>;
    dispatch_loss<F>(loss_kind, [&](auto kind, auto slope_type) {
      using S = typename decltype(slope_type)::type;
      const auto run = [&](auto target_type) {
        using T = typename decltype(target_type)::type;
        const Pixels<Compute, T, S> pixels{offset.const_data_ptr<Compute>(),
                                           towards.const_data_ptr<T>(),
                                           hidden_data,
                                           mean ? means.const_data_ptr<Compute>() : nullptr,
                                           std ? stds.const_data_ptr<Compute>() : nullptr,
                                           keep_slope ? slope.mutable_data_ptr<S>() : nullptr,
                                           sizes};
        const double sum = forward_rows<decltype(kind)::value, Unit>(rows, from.const_data_ptr<F>(),
                                                                     matrix.const_data_ptr<F>(), pixels);
        const Compute factor = masked_loss::loss_scale<Compute>(masked, sizes.channels);
        *scale.mutable_data_ptr<Compute>() = factor;
        *loss.mutable_data_ptr<Compute>() = Compute(sum * factor);
      };
      bytes ? run(Type<uint8_t>{}) : run(Type<Compute>{});
    });
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
  dispatch_unit(dtype, [&](auto unit, auto type) {
    using Unit = typename decltype(unit)::type;
    using F = typename decltype(type)::type;
    using Compute = Sum<Unit>;
    const Tensor grad = dense(grad_loss, scale.scalar_type());
    const Compute factor = *grad.const_data_ptr<Compute>() * *scale.const_data_ptr<Compute>();
    dispatch_loss<F>(loss_kind, [&](auto, auto slope_type) {
      using S = typename decltype(slope_type)::type;
      backward_rows<Unit>(
          rows, BackwardArgs<F, S>{from.const_data_ptr<F>(), matrix.const_data_ptr<F>(), slopes.const_data_ptr<S>(),
                                   factor, needs_features ? grad_features.mutable_data_ptr<F>() : nullptr,
                                   needs_weight ? grad_weight.mutable_data_ptr<F>() : nullptr,
                                   needs_bias ? grad_bias.mutable_data_ptr<F>() : nullptr, sizes});
    });
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
