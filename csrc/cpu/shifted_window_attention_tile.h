// One (window, head) tile of shifted-window attention: what forward and backward share. For N = 36 and D = 32 a tile
// stays in the first-level cache. Included inside one file per SIMD level, as vector.h.
//
// Logits, probabilities and their gradients are kept transposed, (keys N, queries M): vectors run along the queries, so
// that softmax sums over whole vectors. Lanes past M are computed and dropped.

#pragma once

#include "cpu/operands.h"
#include "cpu/shifted_window_attention.h"

namespace simmim_fast::SIMMIM_FAST_LEVEL {
namespace {

using shifted_window_attention::Args;
using shifted_window_attention::kLog2E;

constexpr double kSmallestNorm = 1e-12;
constexpr double kBetweenRegions = -100.0;
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

enum Part { kQuery, kKey, kValue };

// Sizes of a tile, known when compiling where kTokens is not 0 (then N = M = kTokens, D = kHeadSize).
template <class Math, int kTokens, int kHeadSize>
struct Sizes {
  static constexpr int64_t kVector = kLanes<typename Math::Sum>;
  static constexpr int64_t kRowStride = kTokens ? (kHeadSize / Math::kPer + kVector - 1) / kVector * kVector : 0;
  static constexpr int64_t kQueryStride = kTokens ? (kTokens + kVector - 1) / kVector * kVector : 0;
  // Whether the queries fill no more than half of the last vector, and half a vector costs less than a whole one.
  static constexpr bool kHalf = kVectorBytes == 64 && kTokens % kVector > 0 && kTokens % kVector <= kVector / 2;

  int64_t any_keys, any_queries, any_head_size;

  int64_t keys() const { return kTokens ? kTokens : any_keys; }
  int64_t queries() const { return kTokens ? kTokens : any_queries; }
  int64_t head_size() const { return kTokens ? kHeadSize : any_head_size; }
  int64_t row_operands() const { return ceil_div(head_size(), Math::kPer); }
  int64_t row_stride() const { return round_up(row_operands(), kVector); }    // of loaded rows, operands
  int64_t head_stride() const { return round_up(head_size(), kVector); }      // of results, numbers
  int64_t query_stride() const { return round_up(queries(), kVector); }       // of logits, numbers
  int64_t key_operands() const { return ceil_div(keys(), Math::kPer); }       // along a sum over keys
  int64_t query_operands() const { return ceil_div(queries(), Math::kPer); }  // along a sum over queries
};

// The tokens of one window of one image.
template <typename T>
struct Window {
  using Sum = Accumulator<T>;

  explicit Window(const Args<T>& args)
      : tokens(args.grid.tokens()),
        slots(args.queries),
        outputs(args.queries),
        key_regions(args.grid.tokens()),
        query_regions(round_up(args.queries, kLanes<Sum>)) {}

  void move_to(const Args<T>& args, int64_t index) {
    const WindowGrid grid = args.grid;
    const int window = int(index % grid.windows());
    const int64_t image = index / grid.windows(), image_tokens = int64_t(grid.height) * grid.width;
    has_regions = grid.has_regions(window);
    for (int slot = 0; slot < grid.tokens(); ++slot) {
      const int64_t token = grid.token(window, slot);
      tokens[slot] = token < 0 ? -1 : image * image_tokens + token;
      if (has_regions) key_regions[slot] = Sum(grid.region(window, slot));
    }
    for (int64_t i = 0; i < args.queries; ++i) {
      slots[i] = args.query_slots ? args.query_slots[image * args.queries + i] : i;
      outputs[i] = args.query_slots ? image * args.queries + i : tokens[i];
      query_regions[i] = key_regions[slots[i]];
    }
  }

  bool has_regions;
  Buffer<int64_t> tokens;   // (N) rows of qkv, -1 for padding
  Buffer<int64_t> slots;    // (M) of the queries
  Buffer<int64_t> outputs;  // (M) rows of out, -1 where dropped
  Buffer<Sum> key_regions, query_regions;
};

template <class MathKind, typename T, int kTokens, int kHeadSize>
class Tile {
 public:
  using Math = MathKind;
  using Sum = typename Math::Sum;
  using Operand = typename Math::Operand;
  using TileSizes = Sizes<Math, kTokens, kHeadSize>;
  static constexpr int64_t kVector = kLanes<Sum>;

  explicit Tile(const Args<T>& args)
      : args(args),
        sizes{args.grid.tokens(), args.queries, args.head_size},
        channels(args.heads * args.head_size),
        windows{Window<T>(args), Window<T>(args)},
        fetch(kRowsPerToken * sizes.keys() * ceil_div(row_bytes(), kCacheLine),
              larger(sizes.row_stride(), sizes.keys()), reinterpret_cast<const char*>(args.qkv)),
        keys(sizes.keys() * sizes.row_stride()),
        queries(sizes.queries() * sizes.row_stride()),
        across(sizes.row_operands() * sizes.query_stride()),
        logits(sizes.keys() * sizes.query_stride()),
        packed_logits(sizes.key_operands() * Math::kPer * sizes.query_stride()),
        packed_rows(larger(sizes.key_operands(), sizes.query_operands()) * sizes.head_stride()),
        result(larger(sizes.keys(), sizes.queries()) * sizes.head_stride()),
        cosines(args.cosine ? sizes.keys() * sizes.query_stride() : 0),
        chosen_bias(args.query_slots ? sizes.keys() * sizes.query_stride() : 0),
        key_factors(sizes.keys()),
        query_factors(sizes.query_stride()),
        inverse_sums(sizes.query_stride()) {
    clear_unwritten(logits);
  }

  // Lanes of (N, M) past M that multiply_across() leaves as they are; what they hold is dropped.
  void clear_unwritten(Sum* at) const {
    if (TileSizes::kHalf) __builtin_memset(at, 0, sizes.keys() * sizes.query_stride() * sizeof(Sum));
  }

  int64_t row_bytes() const { return sizes.head_size() * int64_t(sizeof(T)); }

  // The next window becomes the present one.
  void enter() {
    Window<T>* entered = next;
    next = window;
    window = entered;
    fetch.clear();
    fetch.finish();
  }

  // Moves the next window, and lists its rows of qkv, of further (tokens, 3C) and of (outputs, C), from a head on.
  void announce(int64_t index, int64_t first_head, std::initializer_list<const T*> like_qkv,
                std::initializer_list<const T*> like_out) {
    next->move_to(args, index);
    fetch.clear();
    for (const T* rows : like_qkv)
      for (int64_t part = 0; part < 3; ++part)
        add_rows(next->tokens, sizes.keys(), rows + part * channels + first_head * sizes.head_size(), 3 * channels);
    for (const T* rows : like_out)
      add_rows(next->outputs, sizes.queries(), rows + first_head * sizes.head_size(), channels);
    fetch.finish();
  }

  // Row of q, k or v (D) of a slot.
  const T* row(int64_t slot, Part part) const {
    const int64_t token = window->tokens[slot];
    const T* all = token < 0 ? args.pad_row : args.qkv + token * 3 * channels;
    return all + part * channels + head * sizes.head_size();
  }

  void load_keys(Part part, Operand* to) const {
    for (int64_t n = 0; n < sizes.keys(); ++n) load_row(row(n, part), to + n * sizes.row_stride());
  }

  void load_row(const T* from, Operand* to) const {
    Operands<Math>::load_row(from, sizes.head_size(), to, sizes.row_stride());
  }

  void load_queries() {
    for (int64_t m = 0; m < sizes.queries(); ++m)
      load_row(row(window->slots[m], kQuery), queries + m * sizes.row_stride());
  }

  // to (N, M) = keys (N, D) * rows (M, D)'.
  void multiply_across(const Operand* key_rows, const Operand* rows, Sum* to) {
    transpose<Operand>(rows, sizes.queries(), sizes.row_stride(), across, sizes.query_stride(), sizes.row_operands());
    multiply<Math, false, TileSizes::kRowStride, true, TileSizes::kHalf>(
        {key_rows, sizes.row_stride(), across, sizes.query_stride(), to, sizes.query_stride(), sizes.keys(),
         sizes.query_stride() / kVector, sizes.row_operands(), false, &fetch});
  }

  // result (M, D) = from (N, M)' * rows (N, D); a factor for each key where given.
  void sum_over_keys(const Sum* from, const Sum* factors, const Operand* rows) {
    const Operand* left =
        Operands<Math>::sum_over_rows(from, sizes.keys(), sizes.query_stride(), factors, packed_logits);
    const Operand* right =
        Operands<Math>::along_rows(rows, sizes.keys(), sizes.row_stride(), packed_rows, sizes.head_stride());
    multiply<Math, true, TileSizes::kQueryStride, true>(
        {left, sizes.query_stride(), right, sizes.head_stride(), result, sizes.head_stride(), sizes.queries(),
         sizes.head_stride() / kVector, sizes.key_operands(), false, &fetch});
  }

  // result (N, D) = from (N, M) * rows (M, D); a factor for each query where given.
  void sum_over_queries(const Sum* from, const Sum* factors, const Operand* rows) {
    const Operand* left =
        Operands<Math>::sum_over_columns(from, sizes.keys(), sizes.query_stride(), factors, packed_logits);
    const Operand* right =
        Operands<Math>::along_rows(rows, sizes.queries(), sizes.row_stride(), packed_rows, sizes.head_stride());
    multiply<Math, false, TileSizes::kQueryStride / Math::kPer, true>(
        {left, sizes.query_stride() / Math::kPer, right, sizes.head_stride(), result, sizes.head_stride(), sizes.keys(),
         sizes.head_stride() / kVector, sizes.query_operands(), false, &fetch});
  }

  // logits (N, M): products of keys and queries -> exp(logit - the query's maximum), inverse_sums (M).
  void softmax() {
    if (args.cosine) prepare_factors();
    if (window->has_regions)
      softmax_all<true>();
    else
      softmax_all<false>();
  }

  // A row of the result, or of a gradient, times a factor.
  void store_row(const Sum* from, Sum factor, T* to) const {
    const int64_t whole = sizes.head_size() / kVector * kVector;
    for (int64_t d = 0; d < whole; d += kVector) narrow<T, Sum>(to + d, load(from + d) * factor);
    for (int64_t d = 0; d < sizes.head_size() % kVector; ++d) to[whole + d] = T(from[whole + d] * factor);
  }

  // The sum of term(d) over the head's channels, in vectors.
  template <typename Total, typename Term>
  Total sum_over_head(Term&& term) const {
    constexpr int64_t kSums = 16;
    Total sums[kSums] = {};
    const int64_t whole = sizes.head_size() / kSums * kSums;
    for (int64_t d = 0; d < whole; d += kSums)
      for (int64_t i = 0; i < kSums; ++i) sums[i] += term(d + i);
    for (int64_t d = whole; d < sizes.head_size(); ++d) sums[d - whole] += term(d);
    for (int64_t half = kSums / 2; half > 0; half /= 2)
      for (int64_t i = 0; i < half; ++i) sums[i] += sums[i + half];
    return sums[0];
  }

  const Args<T>& args;
  const TileSizes sizes;
  const int64_t channels;
  int64_t head = 0;
  Window<T> windows[2];
  Window<T>*window = &windows[0], *next = &windows[1];
  FetchList fetch;                // rows of the next window, of its first head in this unit of work
  Buffer<Operand> keys, queries;  // (N, D), (M, D)
  Buffer<Operand> across;         // (D, M)
  Buffer<Sum> logits;             // (N, M)
  Buffer<Operand> packed_logits, packed_rows;
  Buffer<Sum> result;         // (N or M, D)
  Buffer<Sum> cosines;        // (N, M) times the factor
  Buffer<Sum> chosen_bias;    // (N, M)
  Buffer<Sum> key_factors;    // (N) 1 / |k|
  Buffer<Sum> query_factors;  // (M) 1 / |q|
  Buffer<Sum> inverse_sums;   // (M)

 private:
  static constexpr int64_t kRowsPerToken = 7;  // the backward's: q, k, v, their gradients and that of out

  void add_rows(const int64_t* indices, int64_t count, const T* rows, int64_t stride) {
    for (int64_t i = 0; i < count; ++i)
      if (indices[i] >= 0) fetch.add(rows + indices[i] * stride, row_bytes());
  }

  Sum inverse_norm(const T* from) const {
    const double sum = sum_over_head<double>([&](int64_t d) { return double(Sum(from[d])) * Sum(from[d]); });
    const double norm = __builtin_sqrt(sum);
    return Sum(1 / (norm < kSmallestNorm ? kSmallestNorm : norm));
  }

  void prepare_factors() {
    for (int64_t n = 0; n < sizes.keys(); ++n) key_factors[n] = inverse_norm(row(n, kKey));
    for (int64_t m = 0; m < sizes.query_stride(); ++m)
      query_factors[m] = m < sizes.queries() ? inverse_norm(row(window->slots[m], kQuery)) : 1;
  }

  // (N, M): the columns of the chosen queries.
  const Sum* choose_bias() {
    const Sum* all = args.bias + head * sizes.keys() * args.bias_stride;
    for (int64_t n = 0; n < sizes.keys(); ++n)
      for (int64_t m = 0; m < sizes.query_stride(); ++m)
        chosen_bias[n * sizes.query_stride() + m] =
            m < sizes.queries() ? all[n * args.bias_stride + window->slots[m]] : 0;
    return chosen_bias;
  }

  template <bool kRegions>
  void softmax_all() {
    const Sum* head_bias = args.query_slots ? choose_bias() : args.bias + head * sizes.keys() * args.bias_stride;
    const int64_t bias_stride = args.query_slots ? sizes.query_stride() : args.bias_stride;
    for (int64_t m = 0; m < sizes.query_stride(); m += kVector) {
      if (args.cosine)
        softmax_columns<kRegions, true>(head_bias + m, bias_stride, m);
      else
        softmax_columns<kRegions, false>(head_bias + m, bias_stride, m);
    }
  }

  // Logits times log2(e), as bias is, so that powers are those of 2.
  template <bool kRegions, bool kCosine>
  void softmax_columns(const Sum* bias, int64_t bias_stride, int64_t m) {
    const int64_t stride = sizes.query_stride();
    const Sum head_factor = args.factors[head];
    const Vec<Sum> factor = kCosine ? load<Sum>(query_factors + m) * head_factor : broadcast(head_factor * Sum(kLog2E));
    const Vec<Sum> regions = load<Sum>(window->query_regions + m);
    Vec<Sum> largest = broadcast(Sum(-__builtin_inf()));
    for (int64_t n = 0; n < sizes.keys(); ++n) {
      Sum* at = logits + n * stride + m;
      Vec<Sum> logit = load(at) * factor;
      if constexpr (kCosine) {
        logit = load(at) * (factor * key_factors[n]);
        store<Sum>(cosines + n * stride + m, logit);
        logit *= Sum(kLog2E);
      }
      logit += load(bias + n * bias_stride);
      if constexpr (kRegions) {
        const Vec<Sum> between = logit + Sum(kBetweenRegions * kLog2E);
        logit = regions == window->key_regions[n] ? logit : between;
      }
      store(at, logit);
      largest = maximum<Sum>(logit, largest);
    }
    Vec<Sum> sum = {};
    for (int64_t n = 0; n < sizes.keys(); ++n) {
      Sum* at = logits + n * stride + m;
      const Vec<Sum> power = exp2(load(at) - largest);
      store(at, power);
      sum += power;
    }
    store<Sum>(inverse_sums + m, 1 / sum);
  }
};

}  // namespace
}  // namespace simmim_fast::SIMMIM_FAST_LEVEL
