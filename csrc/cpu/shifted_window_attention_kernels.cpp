// Forward and backward of shifted-window attention over units of work.
// Compiled once per SIMD level.

#include "cpu/shifted_window_attention_tile.h"

namespace simmim_fast::SIMMIM_FAST_LEVEL {
namespace {

using shifted_window_attention::BackwardArgs;
using shifted_window_attention::ForwardArgs;
using shifted_window_attention::kChunkWindows;
using shifted_window_attention::Kernels;
using shifted_window_attention::kHeadsPerUnit;

// out = softmax(logits) v of one (window, head).
template <class Tile, typename T>
void forward_tile(Tile& tile, const ForwardArgs<T>& args) {
  tile.load_keys(kKey, tile.keys);
  tile.load_queries();
  tile.multiply_across(tile.keys, tile.queries, tile.logits);
  tile.softmax();
  tile.load_keys(kValue, tile.keys);
  tile.sum_over_keys(tile.logits, nullptr, tile.keys);
  for (int64_t m = 0; m < tile.sizes.queries(); ++m) {
    const int64_t row = tile.window->outputs[m];
    if (row < 0) continue;
    T* out = args.out + row * tile.channels + tile.head * tile.sizes.head_size();
    tile.store_row(tile.result + m * tile.sizes.head_stride(), tile.inverse_sums[m], out);
  }
}

template <class Tile, typename T>
void forward_units(const ForwardArgs<T>& args, int64_t begin, int64_t end) {
  Tile tile(args);
  const auto window = [&](int64_t unit) { return unit / args.head_units(); };
  const auto first_head = [&](int64_t unit) { return unit % args.head_units() * kHeadsPerUnit; };
  tile.next->move_to(args, window(begin));
  for (int64_t unit = begin; unit < end; ++unit) {
    tile.enter();
    if (unit + 1 < end) tile.announce(window(unit + 1), first_head(unit + 1), {args.qkv}, {args.out});
    const int64_t first = first_head(unit), last = smaller(first + kHeadsPerUnit, args.heads);
    for (tile.head = first; tile.head < last; ++tile.head) {
      tile.fetch.rewind((tile.head - first) * tile.row_bytes());
      forward_tile(tile, args);
    }
  }
}

// The backward of tiles, and the sums over the windows of a chunk for each head of a unit.
template <class Tile, typename T>
class Backward {
 public:
  using Math = typename Tile::Math;
  using Sum = typename Tile::Sum;
  using Operand = typename Tile::Operand;

  explicit Backward(const BackwardArgs<T>& args)
      : args_(args),
        tile_(args),
        bias_size_(tile_.sizes.keys() * args.bias_stride),
        values_(tile_.sizes.keys() * tile_.sizes.row_stride()),
        grad_out_(tile_.sizes.queries() * tile_.sizes.row_stride()),
        grad_logits_(tile_.sizes.keys() * tile_.sizes.query_stride()),
        bias_sums_(args.table_sums ? kHeadsPerUnit * bias_size_ : 0) {
    tile_.clear_unwritten(grad_logits_);
  }

  void run(int64_t begin, int64_t end) {
    tile_.next->move_to(args_, first_window(begin));
    for (int64_t unit = begin; unit < end; ++unit) run_unit(unit, end);
  }

 private:
  int64_t first_window(int64_t unit) const { return unit / args_.head_units() * kChunkWindows; }
  int64_t first_head(int64_t unit) const { return unit % args_.head_units() * kHeadsPerUnit; }

  // The heads of one unit in the windows of its chunk. Units go up to `end`.
  void run_unit(int64_t unit, int64_t end) {
    chunk_ = unit / args_.head_units();
    first_head_ = first_head(unit);
    const int64_t last_head = smaller(first_head_ + kHeadsPerUnit, args_.heads);
    const int64_t last_window = smaller(first_window(unit) + kChunkWindows, args_.windows());
    if (args_.table_sums) __builtin_memset(bias_sums_, 0, kHeadsPerUnit * bias_size_ * sizeof(Sum));
    for (int64_t head = 0; head < kHeadsPerUnit; ++head) factor_sums_[head] = 0;
    for (int64_t index = first_window(unit); index < last_window; ++index) {
      tile_.enter();
      if (index + 1 < last_window)
        announce(unit, index + 1);
      else if (unit + 1 < end)
        announce(unit + 1, first_window(unit + 1));
      for (tile_.head = first_head_; tile_.head < last_head; ++tile_.head) {
        tile_.fetch.rewind((tile_.head - first_head_) * tile_.row_bytes());
        run_tile();
      }
    }
    for (int64_t head = first_head_; head < last_head; ++head) {
      if (args_.table_sums) store_table_sums(head);
      if (args_.factor_sums) args_.factor_sums[chunk_ * args_.heads + head] = Sum(factor_sums_[head - first_head_]);
    }
  }

  void announce(int64_t unit, int64_t window) {
    tile_.announce(window, first_head(unit), {args_.qkv, args_.grad_qkv}, {args_.grad_out});
  }

  void run_tile() {
    tile_.load_keys(kValue, values_);
    load_grad_out();
    tile_.multiply_across(values_, grad_out_, grad_logits_);
    tile_.load_keys(kKey, tile_.keys);
    tile_.load_queries();
    tile_.multiply_across(tile_.keys, tile_.queries, tile_.logits);
    tile_.softmax();
    for (int64_t m = 0; m < tile_.sizes.query_stride(); m += Tile::kVector) {
      finish_columns(m);
      if (args_.factor_sums) add_to_factor_sum(m);
    }
    if (args_.table_sums) add_to_bias_sums();
    value_gradients();
    key_gradients();
    query_gradients();
  }

  void load_grad_out() {
    const int64_t stride = tile_.sizes.row_stride();
    for (int64_t m = 0; m < tile_.sizes.queries(); ++m) {
      const int64_t row = tile_.window->outputs[m];
      const T* from = args_.grad_out + row * tile_.channels + tile_.head * tile_.sizes.head_size();
      if (row < 0)
        __builtin_memset(grad_out_ + m * stride, 0, stride * sizeof(Operand));
      else
        tile_.load_row(from, grad_out_ + m * stride);
    }
  }

  // logits -> probabilities P; grad_logits: gradients dP -> dS = P (dP - sum over keys of P dP), those of the logits.
  void finish_columns(int64_t m) {
    const int64_t stride = tile_.sizes.query_stride();
    const Vec<Sum> inverse_sum = load<Sum>(tile_.inverse_sums + m);
    Vec<Sum> delta = {};
    for (int64_t n = 0; n < tile_.sizes.keys(); ++n) {
      Sum* at = tile_.logits + n * stride + m;
      const Vec<Sum> probability = load(at) * inverse_sum;
      store(at, probability);
      delta += probability * load<Sum>(grad_logits_ + n * stride + m);
    }
    for (int64_t n = 0; n < tile_.sizes.keys(); ++n) {
      Sum* at = grad_logits_ + n * stride + m;
      store<Sum>(at, load<Sum>(tile_.logits + n * stride + m) * (load(at) - delta));
    }
  }

  // The sum over the keys of dS S, with S the cosines times the factor. In exact arithmetic dS adds up to 0 over the
  // keys, so the mean of S that is taken off changes nothing; in floating point it takes the rounding of P and dP out,
  // which all keys of a query share.
  void add_to_factor_sum(int64_t m) {
    const int64_t stride = tile_.sizes.query_stride();
    Vec<Sum> mean = {}, sum = {};
    for (int64_t n = 0; n < tile_.sizes.keys(); ++n)
      mean += load<Sum>(tile_.logits + n * stride + m) * load<Sum>(tile_.cosines + n * stride + m);
    for (int64_t n = 0; n < tile_.sizes.keys(); ++n)
      sum += load<Sum>(grad_logits_ + n * stride + m) * (load<Sum>(tile_.cosines + n * stride + m) - mean);
    for (int64_t lane = 0; lane < smaller(Tile::kVector, tile_.sizes.queries() - m); ++lane)
      factor_sums_[tile_.head - first_head_] += sum[lane];
  }

  void add_to_bias_sums() {
    Sum* sums = bias_sums_ + (tile_.head - first_head_) * bias_size_;
    const int64_t stride = tile_.sizes.query_stride();
    if (!args_.query_slots) {
      for (int64_t i = 0; i < bias_size_; i += Tile::kVector)
        store(sums + i, load(sums + i) + load<Sum>(grad_logits_ + i));
      return;
    }
    for (int64_t n = 0; n < tile_.sizes.keys(); ++n)
      for (int64_t m = 0; m < tile_.sizes.queries(); ++m)
        sums[n * args_.bias_stride + tile_.window->slots[m]] += grad_logits_[n * stride + m];
  }

  void value_gradients() {
    tile_.sum_over_queries(tile_.logits, nullptr, grad_out_);
    for (int64_t n = 0; n < tile_.sizes.keys(); ++n) store_gradient(n, n, kValue, 1);
  }

  void key_gradients() {
    const Sum factor = args_.factors[tile_.head];
    tile_.sum_over_queries(grad_logits_, args_.cosine ? tile_.query_factors.get() : nullptr, tile_.queries);
    for (int64_t n = 0; n < tile_.sizes.keys(); ++n) {
      if (args_.cosine) project(n, n, kKey, tile_.key_factors[n]);
      store_gradient(n, n, kKey, factor);
    }
  }

  void query_gradients() {
    const Sum factor = args_.factors[tile_.head];
    tile_.sum_over_keys(grad_logits_, args_.cosine ? tile_.key_factors.get() : nullptr, tile_.keys);
    if (args_.query_slots) clear_query_gradients();
    for (int64_t m = 0; m < tile_.sizes.queries(); ++m) {
      const int64_t slot = tile_.window->slots[m];
      if (args_.cosine) project(m, slot, kQuery, tile_.query_factors[m]);
      store_gradient(m, slot, kQuery, factor);
    }
  }

  // Row `index` of the result, the gradient u of a normalised vector x / max(|x|, 1e-12), becomes that of x.
  void project(int64_t index, int64_t slot, Part part, Sum inverse_norm) {
    const T* x = tile_.row(slot, part);
    Sum* u = tile_.result + index * tile_.sizes.head_stride();
    const Sum along = tile_.template sum_over_head<Sum>([&](int64_t d) { return u[d] * (Sum(x[d]) * inverse_norm); });
    const bool vanishes = inverse_norm >= 1 / Sum(kSmallestNorm);
    for (int64_t d = 0; d < tile_.sizes.head_size(); ++d)
      u[d] = vanishes ? 0 : inverse_norm * (u[d] - Sum(x[d]) * inverse_norm * along);
  }

  // Row `index` of the result, times a factor, is the gradient of a slot. A query that is padding has none.
  void store_gradient(int64_t index, int64_t slot, Part part, Sum factor) {
    const Sum* from = tile_.result + index * tile_.sizes.head_stride();
    const int64_t token = tile_.window->tokens[slot];
    const int64_t at = part * tile_.channels + tile_.head * tile_.sizes.head_size();
    if (token >= 0) {
      tile_.store_row(from, factor, args_.grad_qkv + token * 3 * tile_.channels + at);
    } else if (args_.pad_sums && part != kQuery) {
      Sum* sums = args_.pad_sums + chunk_ * 3 * tile_.channels + at;
      for (int64_t d = 0; d < tile_.sizes.head_size(); ++d) sums[d] += from[d] * factor;
    }
  }

  void clear_query_gradients() {
    for (int64_t n = 0; n < tile_.sizes.keys(); ++n) {
      const int64_t token = tile_.window->tokens[n];
      if (token < 0) continue;
      T* to = args_.grad_qkv + token * 3 * tile_.channels + tile_.head * tile_.sizes.head_size();
      __builtin_memset(to, 0, tile_.sizes.head_size() * sizeof(T));
    }
  }

  // Sums the (key, query) gradients of a head by rows of the table.
  void store_table_sums(int64_t head) {
    const WindowGrid grid = args_.grid;
    const int64_t h = grid.window_h, w = grid.window_w;
    Sum* table = args_.table_sums + (chunk_ * args_.heads + head) * grid.table_rows();
    const Sum* key_sums = bias_sums_ + (head - first_head_) * bias_size_;
    for (int64_t key_y = 0; key_y < h; ++key_y)
      for (int64_t key_x = 0; key_x < w; ++key_x, key_sums += args_.bias_stride)
        for (int64_t y = 0; y < h; ++y) {
          Sum* to = table + (y - key_y + h - 1) * (2 * w - 1) - key_x + w - 1;
          for (int64_t x = 0; x < w; ++x) to[x] += key_sums[y * w + x];
        }
  }

  const BackwardArgs<T>& args_;
  Tile tile_;
  int64_t chunk_ = 0, first_head_ = 0;
  const int64_t bias_size_;
  Buffer<Operand> values_, grad_out_;  // (N, D), (M, D)
  Buffer<Sum> grad_logits_;            // (N, M)
  Buffer<Sum> bias_sums_;              // (heads of a unit, N, bias_stride)
  double factor_sums_[kHeadsPerUnit];
};

template <class Tile, typename T>
void backward_units(const BackwardArgs<T>& args, int64_t begin, int64_t end) {
  Backward<Tile, T> backward(args);
  backward.run(begin, end);
}

// Calls run(Type<Tile>) with the tile for these sizes: those of the official models' windows are known when compiling.
template <class Math, typename T, typename Run>
void with_tile(const Args<T>& args, Run&& run) {
  const int64_t tokens = args.query_slots || args.head_size != 32 ? 0 : args.grid.tokens();
  if constexpr (sizeof(typename Math::Sum) == sizeof(float)) {
    if (tokens == 36) return run(Type<Tile<Math, T, 36, 32>>{});
    if (tokens == 49) return run(Type<Tile<Math, T, 49, 32>>{});
  }
  run(Type<Tile<Math, T, 0, 0>>{});
}

template <typename T, typename Run>
void with_best_tile(const Args<T>& args, Run&& run) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, BFloat16>)
    if (args.head_size % 2 == 0) return with_tile<Pairs>(args, run);
#endif
  with_tile<Numbers<T>>(args, run);
}

template <typename T>
void forward(const ForwardArgs<T>& args, int64_t begin, int64_t end) {
  with_best_tile<T>(args, [&](auto type) { forward_units<typename decltype(type)::type>(args, begin, end); });
}

template <typename T>
void backward(const BackwardArgs<T>& args, int64_t begin, int64_t end) {
  with_best_tile<T>(args, [&](auto type) { backward_units<typename decltype(type)::type>(args, begin, end); });
}

}  // namespace
}  // namespace simmim_fast::SIMMIM_FAST_LEVEL

namespace simmim_fast::shifted_window_attention {

template <typename T>
template <Simd kAt>
Kernels<T> Kernels<T>::at() {
  namespace level = SIMMIM_FAST_LEVEL;
  return {level::kLanes<Accumulator<T>>, &level::forward<T>, &level::backward<T>};
}

template Kernels<float> Kernels<float>::at<kLevel>();
template Kernels<double> Kernels<double>::at<kLevel>();
template Kernels<BFloat16> Kernels<BFloat16>::at<kLevel>();
template Kernels<Half> Kernels<Half>::at<kLevel>();

}  // namespace simmim_fast::shifted_window_attention
