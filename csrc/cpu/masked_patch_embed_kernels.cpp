// Forward and backward of masked_patch_embed over ranges of work.
// Compiled once per SIMD level.

#include "cpu/masked_patch_embed_rows.h"

namespace simmim_fast::SIMMIM_FAST_LEVEL {
namespace {

using masked_patch_embed::BackwardArgs;
using masked_patch_embed::ForwardArgs;
using masked_patch_embed::kBlockChannels;
using masked_patch_embed::kChunkRows;
using masked_patch_embed::Kernels;
using masked_patch_embed::Layout;

// Panels of the weight (C, D) as the right-hand side of the projection.
template <class Math, typename T>
void pack(const Args<T>& args, int64_t begin, int64_t end) {
  using Sum = typename Math::Sum;
  using Operand = typename Math::Operand;
  const int64_t numbers = args.numbers(), stride = args.number_stride(), panel_size = args.depth() * kPanel<Sum>;
  Buffer<Sum> rows(kPanel<Sum> * stride);
  Buffer<Operand> operands(kPanel<Sum> * stride / Math::kPer);
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t first = panel * kPanel<Sum>, count = std::min(kPanel<Sum>, args.channels - first);
    for (int64_t r = 0; r < count; ++r) {
      std::copy_n(args.weight + (first + r) * numbers, numbers, rows + r * stride);
      std::fill_n(rows + r * stride + numbers, stride - numbers, Sum(0));
    }
    const Operand* from = Operands<Math>::sum_over_columns(rows, count, stride, nullptr, operands);
    Operand* to = static_cast<Operand*>(args.packed) + panel * panel_size;
    std::fill_n(to, panel_size, Operand(0));
    transpose(from, count, stride / Math::kPer, to, kPanel<Sum>, args.depth());
  }
}

// Tokens [begin, end) of out: hidden ones at once, visible ones by the tile.
template <class Math, typename T, typename Out>
void forward(const ForwardArgs<T>& args, int64_t begin, int64_t end) {
  using Sum = typename Math::Sum;
  Rows<Math, T> rows(args);
  int64_t tokens[kTileRows];
  int64_t count = 0;
  const int64_t channels = args.channels;
  Out* const out = static_cast<Out*>(args.out);
  const auto store_token = [&](const Sum* values, int64_t token) {
    const Sum* positions = args.pos_embed ? args.pos_embed + token % args.positions() * channels : nullptr;
    Out* to = out + token * channels;
    for (int64_t c = 0; c < channels; c += kLanes<Sum>) {
      Vec<Sum> value = load(values + c);
      if (positions) value += widen_part(positions + c, channels - c);
      narrow_part(to + c, value, channels - c);
    }
  };
  const auto embed = [&] {
    rows.project(tokens, count);
    for (int64_t r = 0; r < count; ++r) {
      Sum* values = rows.results + r * args.channel_stride();
      if (args.norm_weight) rows.normalise(values, true);
      store_token(values, tokens[r]);
    }
    count = 0;
  };
  for (int64_t token = begin; token < end; ++token) {
    if (args.mask[token]) {
      store_token(args.mask_token, token);
    } else {
      tokens[count++] = token;
      if (count == kTileRows) embed();
    }
  }
  if (count > 0) embed();
}

// Gradients of the projection of chunks of rows, and the chunks' sums of the gradients of bias and norm.
template <class Math, typename T, typename Grad>
class BackwardRows {
 public:
  using Sum = typename Math::Sum;
  using Operand = typename Math::Operand;

  explicit BackwardRows(const BackwardArgs<T>& args) : args_(args), rows_(args) {}

  void run(int64_t chunk) {
    const int64_t stride = args_.channel_stride();
    Sum* sums = args_.row_sums + chunk * 3 * stride;
    std::fill_n(sums, 3 * stride, Sum(0));
    const int64_t last = std::min((chunk + 1) * kChunkRows, args_.row_count);
    for (int64_t row = chunk * kChunkRows; row < last; row += kTileRows)
      run_tile(row, std::min(kTileRows, last - row), sums);
  }

 private:
  void run_tile(int64_t first, int64_t count, Sum* sums) {
    const int64_t stride = args_.channel_stride(), channels = args_.channels;
    const int64_t* tokens = args_.rows + first;
    if (args_.norm_weight)
      rows_.project(tokens, count);
    else if (args_.pixels)
      rows_.gather(tokens, count);
    for (int64_t r = 0; r < count; ++r) {
      const Grad* grad = static_cast<const Grad*>(args_.grad_out) + tokens[r] * channels;
      Sum* row = rows_.results + r * stride;
      args_.norm_weight ? through_norm(grad, row, sums) : copy(grad, row, sums);
    }
    if (!args_.pixels) return;
    keep(rows_.pixels, count, args_.number_stride(), first, args_.pixels);
    keep(rows_.results, count, stride, first, args_.grad_rows);
  }

  void copy(const Grad* grad, Sum* row, Sum* sums) {
    for (int64_t c = 0; c < args_.channels; c += kLanes<Sum>) {
      const Vec<Sum> value = widen_part(grad + c, args_.channels - c);
      store(row + c, value);
      store(sums + c, load(sums + c) + value);
    }
  }

  // row: the projection -> its gradient.
  void through_norm(const Grad* grad, Sum* row, Sum* sums) {
    const int64_t stride = args_.channel_stride(), channels = args_.channels;
    const Sum inverse = rows_.normalise(row, false);
    Vec<Sum> total = {}, along = {};
    for (int64_t c = 0; c < channels; c += kLanes<Sum>) {
      const Vec<Sum> value = widen_part(grad + c, channels - c), normed = load(row + c);
      Sum *norm_weight_sum = sums + stride + c, *embedded_sum = sums + 2 * stride + c;
      store(norm_weight_sum, load(norm_weight_sum) + value * normed);
      store(embedded_sum, load(embedded_sum) + value);
      const Vec<Sum> scaled = value * load(args_.norm_weight + c);
      store(scaled_ + c, scaled);
      total += scaled;
      along += scaled * normed;
    }
    const Sum mean = sum_lanes<Sum>(total) / Sum(channels), slope = sum_lanes<Sum>(along) / Sum(channels);
    for (int64_t c = 0; c < channels; c += kLanes<Sum>) {
      const Vec<Sum> value = (load(scaled_ + c) - mean - load(row + c) * slope) * inverse;
      store(row + c, value);
      store(sums + c, load(sums + c) + value);
    }
  }

  // (count, stride) numbers as operands of sums over rows.
  void keep(const Sum* from, int64_t count, int64_t stride, int64_t first, void* to) {
    Operand* const at = static_cast<Operand*>(to) + first / Math::kPer * stride;
    const Operand* operands = Operands<Math>::sum_over_rows(from, count, stride, nullptr, at);
    if (operands != at) std::copy_n(operands, count * stride, at);  // numbers, where they lay
  }

  const BackwardArgs<T>& args_;
  Rows<Math, T> rows_;
  Buffer<Sum> scaled_{args_.channel_stride()};
};

template <class Math, typename T, typename Grad>
void backward_rows(const BackwardArgs<T>& args, int64_t begin, int64_t end) {
  BackwardRows<Math, T, Grad> work(args);
  for (int64_t chunk = begin; chunk < end; ++chunk) work.run(chunk);
}

// weight_sums of one block of channels and one group of rows: products of kChunkRows rows, added up.
template <class Math, typename T>
void backward_weight(const BackwardArgs<T>& args, int64_t begin, int64_t end) {
  using Sum = typename Math::Sum;
  using Operand = typename Math::Operand;
  const int64_t stride = args.number_stride(), channel_stride = args.channel_stride();
  Buffer<Sum> product(kBlockChannels * stride);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t group = unit / args.blocks(), channel = unit % args.blocks() * kBlockChannels;
    const int64_t channels = std::min(kBlockChannels, args.channels - channel);
    const int64_t first = group * args.group_rows(), last = std::min(first + args.group_rows(), args.row_count);
    Sum* sums = args.weight_sums + (group * args.channels + channel) * stride;
    if (first >= last) std::fill_n(sums, channels * stride, Sum(0));
    for (int64_t row = first; row < last; row += kChunkRows) {
      const Operand* grads = static_cast<const Operand*>(args.grad_rows) + row / Math::kPer * channel_stride + channel;
      const Operand* pixels = static_cast<const Operand*>(args.pixels) + row / Math::kPer * stride;
      Sum* to = row == first ? sums : product.get();
      const int64_t depth = ceil_div(std::min(kChunkRows, last - row), Math::kPer);
      multiply<Math, true, 0>(
          {grads, channel_stride, pixels, stride, to, stride, channels, stride / kLanes<Sum>, depth});
      if (row == first) continue;
      for (int64_t i = 0; i < channels * stride; i += kLanes<Sum>) store(sums + i, load(sums + i) + load(product + i));
    }
  }
}

// grad_out of chunks of tokens, summed where hidden, and over the images.
template <typename T, typename Grad>
void backward_tokens(const BackwardArgs<T>& args, int64_t begin, int64_t end) {
  using Sum = Accumulator<T>;
  const int64_t channels = args.channels, images = args.chunk_images();
  const auto add = [&](const Grad* grad, Sum* sums) {
    for (int64_t c = 0; c < channels; c += kLanes<Sum>)
      narrow_part(sums + c, widen_part(sums + c, channels - c) + widen_part(grad + c, channels - c), channels - c);
  };
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    Sum* token_sums = args.token_sums ? args.token_sums + chunk * args.channel_stride() : nullptr;
    if (token_sums) std::fill_n(token_sums, args.channel_stride(), Sum(0));
    const int64_t first = chunk * args.chunk_positions();
    const int64_t last = std::min(first + args.chunk_positions(), args.image_tokens());
    for (int64_t position = first; position < last; ++position) {
      Sum* pos_sums = args.pos_sums ? args.pos_sums + position * channels : nullptr;
      if (pos_sums) std::fill_n(pos_sums, channels, Sum(0));
      for (int64_t image = 0; image < images; ++image) {
        const int64_t token = image * args.image_tokens() + position;
        const Grad* grad = static_cast<const Grad*>(args.grad_out) + token * channels;
        if (token_sums && args.mask[token]) add(grad, token_sums);
        if (pos_sums) add(grad, pos_sums);
      }
    }
  }
}

template <class Math, typename T>
struct Table {
  using Sum = typename Math::Sum;

  static void run_forward(const ForwardArgs<T>& args, int64_t begin, int64_t end) {
    with_dtype<Sum>(args.out_dtype,
                    [&](auto type) { forward<Math, T, typename decltype(type)::type>(args, begin, end); });
  }

  static void run_backward_rows(const BackwardArgs<T>& args, int64_t begin, int64_t end) {
    with_dtype<Sum>(args.grad_dtype,
                    [&](auto type) { backward_rows<Math, T, typename decltype(type)::type>(args, begin, end); });
  }

  static void run_backward_tokens(const BackwardArgs<T>& args, int64_t begin, int64_t end) {
    with_dtype<Sum>(args.grad_dtype,
                    [&](auto type) { backward_tokens<T, typename decltype(type)::type>(args, begin, end); });
  }

  static Kernels<T> kernels() {
    const Layout layout{kLanes<Sum>, kPanel<Sum>, Math::kPer, sizeof(typename Math::Operand)};
    return {layout, &pack<Math, T>, &run_forward, &run_backward_rows, &backward_weight<Math, T>, &run_backward_tokens};
  }
};

}  // namespace
}  // namespace simmim_fast::SIMMIM_FAST_LEVEL

namespace simmim_fast::masked_patch_embed {

template <typename T>
template <Simd kAt>
Kernels<T> Kernels<T>::at() {
  namespace level = SIMMIM_FAST_LEVEL;
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, BFloat16>) return level::Table<level::Pairs, T>::kernels();
#endif
  return level::Table<level::Numbers<T>, T>::kernels();
}

template Kernels<float> Kernels<float>::at<kLevel>();
template Kernels<double> Kernels<double>::at<kLevel>();
template Kernels<BFloat16> Kernels<BFloat16>::at<kLevel>();

}  // namespace simmim_fast::masked_patch_embed
