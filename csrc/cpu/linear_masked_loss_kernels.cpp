// Forward and backward of linear_masked_loss: the head for tokens with a masked pixel alone, and the loss on each tile
// of the product while it is in L1. The prediction exists only there; the backward reads the slope of the loss at it, a
// byte for L1. Compiled once per SIMD level.

#include "cpu/linear_masked_loss.h"

#include <cmath>

#include "cpu/buffer.h"
#include "cpu/linear_masked_loss_panels.h"

namespace simmim_fast::SIMMIM_FAST_LEVEL {
namespace {

using linear_masked_loss::BackwardArgs;
using linear_masked_loss::ForwardArgs;
using linear_masked_loss::Loss;
using linear_masked_loss::Row;
using linear_masked_loss::Sizes;
using masked_loss::Level;

constexpr int64_t kChunkPanels = 170;  // panels of tokens that are packed at a time
constexpr int64_t kDepthBlock = 1024;  // units of depth for which a strip is packed at a time
constexpr int64_t kTokenBlock = 512;   // tokens that the gradient of the weight adds up at a time
constexpr int64_t kOutputPanels = 16;  // panels of outputs of the weight's gradient that one thread takes
constexpr int64_t kPixels = 16;        // whose sums are independent, so that additions overlap

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

// The loss of up to kPixels neighbouring pixels, added to the lanes, and its slope.
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
  for (; i + kPixels <= count; i += kPixels)
    add_loss<kLoss, kSlope>(product + i, bias + i, target + i, level, kSlope ? slope + i : nullptr, kPixels, lanes);
  if (i < count)
    add_loss<kLoss, kSlope>(product + i, bias + i, target + i, level, kSlope ? slope + i : nullptr, count - i, lanes);
}

// Neighbouring outputs of a token that are neighbouring pixels.
struct Segment {
  int64_t output, count;
  int64_t channel, y, x;  // within the token
};

// Those of the outputs of a strip.
struct Segments {
  Segments(const Sizes& sizes, int64_t begin, int64_t end) {
    const int64_t stride = sizes.stride;
    for (int64_t output = begin; output < end; output += all[count++].count) {
      const int64_t x = output % stride;
      all[count] = {output, std::min(stride - x, end - output), output / (stride * stride), output / stride % stride,
                    x};
    }
  }

  Segment all[kColumns];
  int64_t count = 0;
};

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
double tile_loss(const Pixels<Compute, T, S>& pixels, const Row* rows, int64_t count, const Segments& segments,
                 const Compute* tile) {
  alignas(64) Compute lanes[kPixels] = {};
  for (int64_t r = 0; r < count; ++r)
    for (int64_t i = 0; i < segments.count; ++i)
      add_segment<kLoss, kSlope>(pixels, rows[r], segments.all[i],
                                 tile + r * kColumns + segments.all[i].output - segments.all[0].output, lanes);
  double sum = 0;
  for (const Compute lane : lanes) sum += lane;
  return sum;
}

// Rows [first, first + count) of `source` (any, depth) as panels, each row where `index` says.
template <class Math, typename E, typename Index>
void pack_panels(const Row* rows, int64_t first, int64_t count, const E* source, int64_t depth, Index&& index,
                 typename Math::Operand* panels) {
  torch::stable::parallel_for(0, ceil_div(count, kRows), 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const E* vectors[kRows] = {};
      const int64_t used = std::min(kRows, count - panel * kRows);
      for (int64_t r = 0; r < used; ++r) vectors[r] = source + index(rows[first + panel * kRows + r]) * depth;
      pack_along<Math, kRows>(vectors, used, depth, panels + panel * operands<Math>(depth) * kRows);
    }
  });
}

// The sum of the losses of all masked pixels, and the slopes where pixels.slope is not null.
template <Loss kLoss, class Math, typename F, typename T, typename S>
double forward_rows(const ForwardArgs<F>& args, const Pixels<typename Math::Sum, T, S>& pixels) {
  using Operand = typename Math::Operand;
  using Sum = typename Math::Sum;
  const Sizes& sizes = args.sizes;
  const int64_t all = args.row_count, depth = operands<Math>(sizes.depth), strips = ceil_div(sizes.outputs, kColumns);
  const int64_t chunk_rows = std::min(kChunkPanels * kRows, round_up(all, kRows));
  const int64_t chunks = chunk_rows ? ceil_div(all, chunk_rows) : 0;
  const Buffer<Operand> panels(chunk_rows * depth);
  const Buffer<double> sums(chunks * strips);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t first = chunk * chunk_rows, count = std::min(chunk_rows, all - first);
    pack_panels<Math>(
        args.rows, first, count, args.features, sizes.depth, [](const Row& row) { return row.token; }, panels.get());
    torch::stable::parallel_for(0, strips, 1, [&](int64_t begin, int64_t end) {
      const Buffer<Operand> strip(depth * kColumns);
      alignas(64) Sum tile[kTile];
      for (int64_t s = begin; s < end; ++s) {
        const int64_t output = s * kColumns, columns = std::min(kColumns, sizes.outputs - output);
        const Segments segments(sizes, output, output + columns);
        const F* vectors[kColumns] = {};
        for (int64_t c = 0; c < columns; ++c) vectors[c] = args.weight + (output + c) * sizes.depth;
        pack_along<Math, kColumns>(vectors, columns, sizes.depth, strip.get());
        double sum = 0;
        for (int64_t r = 0; r < count; r += kRows) {
          multiply_tile<Math>(panels + r * depth, strip, tile, depth, false);
          const int64_t used = std::min(kRows, count - r);
          const Row* here = args.rows + first + r;
          sum += pixels.slope ? tile_loss<kLoss, true>(pixels, here, used, segments, tile)
                              : tile_loss<kLoss, false>(pixels, here, used, segments, tile);
        }
        sums[chunk * strips + s] = sum;
      }
    });
  }
  double total = 0;
  for (int64_t i = 0; i < chunks * strips; ++i) total += sums[i];
  return total;
}

template <typename F>
void store_scaled(const Accumulator<F>* __restrict from, Accumulator<F> factor, int64_t count, F* __restrict to) {
  for (int64_t i = 0; i < count; ++i) to[i] = narrow<F>(from[i] * factor);
}

// grad_features = factor * slope weight, over strips of its channels.
template <class Math, typename S, typename F>
void backward_features(const BackwardArgs<F>& args) {
  const Sizes& sizes = args.sizes;
  const int64_t all = args.row_count, depth = operands<Math>(sizes.outputs);
  const int64_t chunk_rows = std::min(kChunkPanels * kRows, round_up(all, kRows));
  const Buffer<typename Math::Operand> panels(chunk_rows * depth);
  const Buffer<const F*> vectors(sizes.outputs);
  for (int64_t o = 0; o < sizes.outputs; ++o) vectors[o] = args.weight + o * sizes.depth;
  for (int64_t first = 0; first < all; first += chunk_rows) {
    const int64_t count = std::min(chunk_rows, all - first), padded = round_up(count, kRows);
    pack_panels<Math>(
        args.rows, first, count, static_cast<const S*>(args.slope), sizes.outputs,
        [](const Row& row) { return row.slot; }, panels.get());
    torch::stable::parallel_for(0, ceil_div(sizes.depth, kColumns), 1, [&](int64_t begin, int64_t end) {
      const Buffer<typename Math::Operand> strip(kDepthBlock * kColumns);
      const Buffer<typename Math::Sum> products(padded * kColumns);
      for (int64_t s = begin; s < end; ++s) {
        const int64_t channel = s * kColumns, columns = std::min(kColumns, sizes.depth - channel);
        for (int64_t k = 0; k < depth; k += kDepthBlock) {
          const int64_t block = std::min(kDepthBlock, depth - k), output = k * Math::kPer;
          pack_across<Math, kColumns>(vectors + output, channel, columns,
                                      std::min(block * Math::kPer, sizes.outputs - output), strip.get());
          for (int64_t r = 0; r < count; r += kRows)
            multiply_tile<Math>(panels + r * depth + k * kRows, strip, products + r * kColumns, block, k > 0);
        }
        for (int64_t r = 0; r < count; ++r)
          store_scaled(products.get() + r * kColumns, args.factor, columns,
                       args.grad_features + args.rows[first + r].token * sizes.depth + channel);
      }
    });
  }
}

// Columns [begin, end) of grad_bias = factor * the sum of the slopes over the rows.
template <typename S, typename F>
void backward_bias(const BackwardArgs<F>& args, int64_t begin, int64_t end) {
  double sums[kOutputPanels * kRows] = {};
  for (const Row* row = args.rows; row < args.rows + args.row_count; ++row) {
    const S* slope = static_cast<const S*>(args.slope) + row->slot * args.sizes.outputs + begin;
    for (int64_t i = 0; i < end - begin; ++i) sums[i] += widen(slope[i]);
  }
  for (int64_t i = 0; i < end - begin; ++i) args.grad_bias[begin + i] = F(Accumulator<F>(sums[i] * args.factor));
}

// Rows [begin, end) of grad_weight = factor * slope' features.
template <class Math, typename S, typename F>
void backward_weight(const BackwardArgs<F>& args, int64_t begin, int64_t end) {
  const Sizes& sizes = args.sizes;
  const int64_t all = args.row_count, strips = ceil_div(sizes.depth, kColumns);
  const Buffer<typename Math::Operand> panels(kOutputPanels * kRows * kTokenBlock), strip(kTokenBlock * kColumns);
  const Buffer<typename Math::Sum> tiles(strips * kOutputPanels * kTile);
  const F* features[kTokenBlock];
  const S* slopes[kTokenBlock];
  for (int64_t first = 0; first < all; first += kTokenBlock) {
    const int64_t count = std::min(kTokenBlock, all - first), block = operands<Math>(count);
    for (int64_t r = 0; r < count; ++r) {
      const Row& row = args.rows[first + r];
      features[r] = args.features + row.token * sizes.depth;
      slopes[r] = static_cast<const S*>(args.slope) + row.slot * sizes.outputs;
    }
    for (int64_t o = begin; o < end; o += kRows)
      pack_across<Math, kRows>(slopes, o, std::min(kRows, end - o), count, panels + (o - begin) * kTokenBlock);
    for (int64_t s = 0; s < strips; ++s) {
      const int64_t channel = s * kColumns, columns = std::min(kColumns, sizes.depth - channel);
      pack_across<Math, kColumns>(features, channel, columns, count, strip);
      for (int64_t panel = 0; panel * kRows < end - begin; ++panel)
        multiply_tile<Math>(panels + panel * kRows * kTokenBlock, strip, tiles + (s * kOutputPanels + panel) * kTile,
                            block, first > 0);
    }
  }
  for (int64_t o = begin; o < end; ++o)
    for (int64_t s = 0; s < strips; ++s) {
      const int64_t channel = s * kColumns, columns = std::min(kColumns, sizes.depth - channel);
      const int64_t panel = (o - begin) / kRows, row = (o - begin) % kRows;
      const typename Math::Sum* tile = tiles + (s * kOutputPanels + panel) * kTile + row * kColumns;
      F* to = args.grad_weight + o * sizes.depth + channel;
      if (all > 0)
        store_scaled(tile, args.factor, columns, to);
      else
        std::fill_n(to, columns, F(0));
    }
}

template <class Math, typename S, typename F>
void backward_rows(const BackwardArgs<F>& args) {
  if (args.grad_features) backward_features<Math, S>(args);
  constexpr int64_t kOutputs = kOutputPanels * kRows;
  torch::stable::parallel_for(0, ceil_div(args.sizes.outputs, kOutputs), 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * kOutputs, end = std::min(begin + kOutputs, args.sizes.outputs);
      if (args.grad_weight) backward_weight<Math, S>(args, begin, end);
      if (args.grad_bias) backward_bias<S>(args, begin, end);
    }
  });
}

// What the products multiply.
#if defined(__AVX512BF16__)
template <typename F>
using MathOf = std::conditional_t<std::is_same_v<F, BFloat16>, Pairs, Numbers<F>>;
#else
template <typename F>
using MathOf = Numbers<F>;
#endif

// Calls f(loss as a constant, Type<S>): S is the dtype of slopes.
template <typename F, typename Run>
auto with_loss(Loss loss, Run&& f) {
  if (loss == Loss::kL1) return f(std::integral_constant<Loss, Loss::kL1>{}, Type<int8_t>{});
  if (loss == Loss::kL2) return f(std::integral_constant<Loss, Loss::kL2>{}, Type<F>{});
  return f(std::integral_constant<Loss, Loss::kSmoothL1>{}, Type<F>{});
}

template <typename F>
double forward(const ForwardArgs<F>& args) {
  using Compute = Accumulator<F>;
  return with_loss<F>(args.loss, [&](auto loss, auto slope_type) {
    using S = typename decltype(slope_type)::type;
    const auto run = [&](auto target_type) {
      using T = typename decltype(target_type)::type;
      const Pixels<Compute, T, S> pixels{args.bias, static_cast<const T*>(args.target), args.mask, args.mean,
                                         args.std,  static_cast<S*>(args.slope),        args.sizes};
      return forward_rows<decltype(loss)::value, MathOf<F>>(args, pixels);
    };
    return args.bytes ? run(Type<uint8_t>{}) : run(Type<Compute>{});
  });
}

template <typename F>
void backward(const BackwardArgs<F>& args) {
  with_loss<F>(args.loss,
               [&](auto, auto slope_type) { backward_rows<MathOf<F>, typename decltype(slope_type)::type>(args); });
}

}  // namespace
}  // namespace simmim_fast::SIMMIM_FAST_LEVEL

namespace simmim_fast::linear_masked_loss {

template <typename F>
template <Simd kAt>
Kernels<F> Kernels<F>::at() {
  namespace level = SIMMIM_FAST_LEVEL;
  return {&level::forward<F>, &level::backward<F>};
}

template Kernels<float> Kernels<float>::at<kLevel>();
template Kernels<double> Kernels<double>::at<kLevel>();
template Kernels<BFloat16> Kernels<BFloat16>::at<kLevel>();
template Kernels<Half> Kernels<Half>::at<kLevel>();

}  // namespace simmim_fast::linear_masked_loss
