// Forward and backward of biased_attention over units of work: one head of one image (forward) or of a chunk of images
// (backward), a block of rows at a time. Keys, values and a block's logits stay in the second-level cache.
// Compiled once per SIMD level.

#include "cpu/biased_attention.h"
#include "cpu/operands.h"

namespace simmim_fast::SIMMIM_FAST_LEVEL {

using biased_attention::Args;
using biased_attention::BackwardArgs;
using biased_attention::ForwardArgs;
using biased_attention::kChunkImages;
using biased_attention::Kernels;
using biased_attention::kLog2E;

namespace {

constexpr int64_t kBlockRows = 102;  // at most; a multiple of the 6 rows that a product keeps in registers

// 2^x, and 0 below 2^-126.
template <typename Sum>
inline Vec<Sum> exp2_or_zero(Vec<Sum> x) {
  const Vec<Sum> power = exp2(x);
  return x < Sum(-126) ? Vec<Sum>{} : power;
}

template <typename Sum>
inline Sum sum_of_lanes(Vec<Sum> value) {
  Sum sum = 0;
  for (int64_t lane = 0; lane < kLanes<Sum>; ++lane) sum += value[lane];
  return sum;
}

template <typename Sum>
inline Sum largest_lane(Vec<Sum> value) {
  Sum largest = value[0];
  for (int64_t lane = 1; lane < kLanes<Sum>; ++lane) largest = value[lane] > largest ? value[lane] : largest;
  return largest;
}

enum Part { kQuery, kKey, kValue };

// One head of one image, and the block of rows that is worked on.
template <class MathKind, typename T>
class Head {
 public:
  using Math = MathKind;
  using Sum = typename Math::Sum;
  using Operand = typename Math::Operand;
  static constexpr int64_t kVector = kLanes<Sum>;

  explicit Head(const Args<T>& args)
      : args(args),
        depth(ceil_div(args.head_size, Math::kPer)),
        row_stride(round_up(depth, kVector)),
        head_stride(round_up(args.head_size, kVector)),
        key_operands(ceil_div(args.tokens, Math::kPer)),
        keys(args.tokens * row_stride),
        keys_across(depth * args.key_stride),
        queries(kBlockRows * row_stride),
        logits(kBlockRows * args.key_stride),
        packed_logits(kBlockRows * args.key_stride),
        result((args.tokens > kBlockRows ? args.tokens : kBlockRows) * head_stride) {}

  int64_t token(int64_t row) const { return args.queries ? args.queries[image * args.rows + row] : row; }

  // Rows [first, first + count) of the image, all of one size but the last.
  int64_t block_rows() const {
    const int64_t blocks = ceil_div(args.rows, kBlockRows);
    return blocks ? round_up(ceil_div(args.rows, blocks), 6) : 1;
  }

  // Where q, k or v of a token lies, D numbers.
  int64_t offset(int64_t at, Part part) const {
    return (image * args.tokens + at) * 3 * args.channels() + part * args.channels() + head * args.head_size;
  }

  // Where a row of out lies, D numbers.
  int64_t out_offset(int64_t row) const { return (image * args.rows + row) * args.channels() + head * args.head_size; }

  void load_row(const T* from, Operand* to) const { Operands<Math>::load_row(from, args.head_size, to, row_stride); }

  // Keys or values: (N, D) -> to (N, D), across (D, N).
  void load_tokens(Part part, Operand* to, Operand* across) const {
    for (int64_t n = 0; n < args.tokens; ++n) load_row(args.qkv + offset(n, part), to + n * row_stride);
    if (across) transpose<Operand>(to, args.tokens, row_stride, across, args.key_stride, depth);
  }

  void load_queries() {
    for (int64_t m = 0; m < count; ++m) load_row(args.qkv + offset(token(first + m), kQuery), queries + m * row_stride);
  }

  // to (M, N) = rows (M, D) * across (D, N).
  void multiply_across(const Operand* rows, const Operand* across, Sum* to) const {
    multiply<Math, false, 0>(
        {rows, row_stride, across, args.key_stride, to, args.key_stride, count, args.key_stride / kVector, depth});
  }

  // result (M, D) = from (M, N) * along (N, D), whose rows lie pair by pair where operands are pairs.
  void sum_over_keys(const Sum* from, const Operand* along) {
    const Operand* left = Operands<Math>::sum_over_columns(from, count, args.key_stride, nullptr, packed_logits);
    multiply<Math, false, 0>({left, args.key_stride / Math::kPer, along, head_stride, result, head_stride, count,
                              head_stride / kVector, key_operands});
  }

  // The bias (N) of a row, times log2(e).
  const Sum* bias_row(int64_t m) const {
    return args.has_bias ? args.bias + (head * args.tokens + token(first + m)) * args.key_stride : args.bias;
  }

  // Of two rows (D).
  Sum product(const T* a, const T* b) const {
    Vec<Sum> sums = {};
    int64_t d = 0;
    for (; d + kVector <= args.head_size; d += kVector) sums += widen<Sum>(a + d) * widen<Sum>(b + d);
    Sum sum = sum_of_lanes<Sum>(sums);
    for (; d < args.head_size; ++d) sum += Sum(a[d]) * Sum(b[d]);
    return sum;
  }

  void store_row(const Sum* from, Sum factor, T* to) const {
    int64_t d = 0;
    for (; d + kVector <= args.head_size; d += kVector) narrow<T, Sum>(to + d, load(from + d) * factor);
    for (; d < args.head_size; ++d) to[d] = T(from[d] * factor);
  }

  const Args<T>& args;
  const int64_t depth;         // operands of D
  const int64_t row_stride;    // of loaded rows, operands
  const int64_t head_stride;   // of results, numbers
  const int64_t key_operands;  // operands of N
  int64_t image = 0, head = 0, first = 0, count = 0;
  Buffer<Operand> keys;           // (N, D)
  Buffer<Operand> keys_across;    // (D, N)
  Buffer<Operand> queries;        // (M, D)
  Buffer<Sum> logits;             // (M, N)
  Buffer<Operand> packed_logits;  // (M, N)
  Buffer<Sum> result;             // (M or N, D)
};

template <class Math, typename T>
class Forward {
 public:
  using Sum = typename Math::Sum;
  using Operand = typename Math::Operand;

  explicit Forward(const ForwardArgs<T>& args)
      : args_(args),
        head_(args),
        values_(args.tokens * head_.row_stride),
        packed_values_(round_up(args.tokens, Math::kPer) * head_.head_stride) {}

  void run(int64_t unit) {
    head_.image = unit / args_.heads;
    head_.head = unit % args_.heads;
    head_.load_tokens(kKey, head_.keys, head_.keys_across);
    head_.load_tokens(kValue, values_, nullptr);
    along_ = Operands<Math>::along_rows(values_, args_.tokens, head_.row_stride, packed_values_, head_.head_stride);
    const int64_t block = head_.block_rows();
    for (head_.first = 0; head_.first < args_.rows; head_.first += block) {
      head_.count = args_.rows - head_.first < block ? args_.rows - head_.first : block;
      run_block();
    }
  }

 private:
  void run_block() {
    head_.load_queries();
    head_.multiply_across(head_.queries, head_.keys_across, head_.logits);
    Sum inverse_sums[kBlockRows];
    for (int64_t m = 0; m < head_.count; ++m) inverse_sums[m] = softmax_row(m);
    head_.sum_over_keys(head_.logits, along_);
    for (int64_t m = 0; m < head_.count; ++m)
      head_.store_row(head_.result + m * head_.head_stride, inverse_sums[m],
                      args_.out + head_.out_offset(head_.first + m));
  }

  // A row of products q k' -> exp(logit - the largest logit); returns 1 / their sum.
  Sum softmax_row(int64_t m) {
    constexpr int64_t kVector = kLanes<Sum>;
    Sum* row = head_.logits + m * args_.key_stride;
    const Sum* bias = head_.bias_row(m);
    const Sum factor = args_.scale * Sum(kLog2E);
    Vec<Sum> largest = broadcast(Sum(-__builtin_inf()));
    for (int64_t n = 0; n < args_.key_stride; n += kVector) {
      const Vec<Sum> logit = load(row + n) * factor + load(bias + n);
      store(row + n, logit);
      largest = maximum<Sum>(logit, largest);
    }
    const Sum shift = largest_lane<Sum>(largest);
    Vec<Sum> sums = {};
    for (int64_t n = 0; n < args_.key_stride; n += kVector) {
      const Vec<Sum> power = exp2_or_zero<Sum>(load(row + n) - shift);
      store(row + n, power);
      sums += power;
    }
    const Sum sum = sum_of_lanes<Sum>(sums);
    args_.lse[(head_.image * args_.heads + head_.head) * args_.rows + head_.first + m] =
        shift / Sum(kLog2E) + __builtin_log(sum);
    return 1 / sum;
  }

  const ForwardArgs<T>& args_;
  Head<Math, T> head_;
  Buffer<Operand> values_, packed_values_;  // (N, D)
  const Operand* along_ = nullptr;          // one of the two
};

template <class Math, typename T>
class Backward {
 public:
  using Sum = typename Math::Sum;
  using Operand = typename Math::Operand;
  static constexpr int64_t kVector = kLanes<Sum>;

  explicit Backward(const BackwardArgs<T>& args)
      : args_(args),
        head_(args),
        values_(args.tokens * head_.row_stride),
        values_across_(head_.depth * args.key_stride),
        packed_keys_(round_up(args.tokens, Math::kPer) * head_.head_stride),
        grad_out_(kBlockRows * head_.row_stride),
        packed_rows_(kBlockRows * head_.head_stride),
        grad_logits_(kBlockRows * args.key_stride),
        grad_keys_(args.tokens * head_.head_stride),
        grad_values_(args.tokens * head_.head_stride) {}

  void run(int64_t unit) {
    const int64_t chunk = unit / args_.heads, bias_size = args_.tokens * args_.key_stride;
    head_.head = unit % args_.heads;
    bias_sums_ = args_.bias_sums ? args_.bias_sums + unit * bias_size : nullptr;
    if (bias_sums_) __builtin_memset(bias_sums_, 0, bias_size * sizeof(Sum));
    for (int64_t image = chunk * kChunkImages; image < args_.images && image < (chunk + 1) * kChunkImages; ++image) {
      head_.image = image;
      run_image();
    }
  }

 private:
  void run_image() {
    head_.load_tokens(kValue, values_, values_across_);
    head_.load_tokens(kKey, head_.keys, head_.keys_across);
    along_ = Operands<Math>::along_rows(head_.keys, args_.tokens, head_.row_stride, packed_keys_, head_.head_stride);
    const int64_t size = args_.tokens * head_.head_stride * sizeof(Sum);
    __builtin_memset(grad_keys_, 0, size);
    __builtin_memset(grad_values_, 0, size);
    if (args_.rows < args_.tokens) clear_query_gradients();
    const int64_t block = head_.block_rows();
    for (head_.first = 0; head_.first < args_.rows; head_.first += block) {
      head_.count = args_.rows - head_.first < block ? args_.rows - head_.first : block;
      run_block();
    }
    for (int64_t n = 0; n < args_.tokens; ++n) {
      head_.store_row(grad_keys_ + n * head_.head_stride, args_.scale, args_.grad_qkv + head_.offset(n, kKey));
      head_.store_row(grad_values_ + n * head_.head_stride, 1, args_.grad_qkv + head_.offset(n, kValue));
    }
  }

  void run_block() {
    head_.load_queries();
    for (int64_t m = 0; m < head_.count; ++m)
      head_.load_row(args_.grad_out + head_.out_offset(head_.first + m), grad_out_ + m * head_.row_stride);
    head_.multiply_across(head_.queries, head_.keys_across, head_.logits);
    head_.multiply_across(grad_out_, values_across_, grad_logits_);
    for (int64_t m = 0; m < head_.count; ++m) finish_row(m);
    head_.sum_over_keys(grad_logits_, along_);
    for (int64_t m = 0; m < head_.count; ++m)
      head_.store_row(head_.result + m * head_.head_stride, args_.scale,
                      args_.grad_qkv + head_.offset(head_.token(head_.first + m), kQuery));
    add_over_rows(head_.logits, grad_out_, grad_values_);
    add_over_rows(grad_logits_, head_.queries, grad_keys_);
  }

  // Row m of products -> weights P; of gradients of P -> P (dP - delta), the gradients of the logits and of the bias.
  void finish_row(int64_t m) {
    const int64_t row = head_.first + m, at = head_.out_offset(row);
    const Sum delta = head_.product(args_.out + at, args_.grad_out + at);
    const Sum lse = args_.lse[(head_.image * args_.heads + head_.head) * args_.rows + row] * Sum(kLog2E);
    const Sum factor = args_.scale * Sum(kLog2E);
    const Sum* bias = head_.bias_row(m);
    Sum *weights = head_.logits + m * args_.key_stride, *gradients = grad_logits_ + m * args_.key_stride;
    Sum* sums = bias_sums_ ? bias_sums_ + head_.token(row) * args_.key_stride : nullptr;
    for (int64_t n = 0; n < args_.key_stride; n += kVector) {
      const Vec<Sum> weight = exp2_or_zero<Sum>(load(weights + n) * factor + (load(bias + n) - lse));
      const Vec<Sum> gradient = weight * (load(gradients + n) - delta);
      store(weights + n, weight);
      store(gradients + n, gradient);
      if (sums) store<Sum>(sums + n, load(sums + n) + gradient);
    }
  }

  // to (N, D) += from (M, N)' * rows (M, D).
  void add_over_rows(const Sum* from, const Operand* rows, Sum* to) {
    const int64_t stride = head_.head_stride;
    const Operand* left =
        Operands<Math>::sum_over_rows(from, head_.count, args_.key_stride, nullptr, head_.packed_logits);
    const Operand* right = Operands<Math>::along_rows(rows, head_.count, head_.row_stride, packed_rows_, stride);
    multiply<Math, true, 0>({left, args_.key_stride, right, stride, head_.result, stride, args_.tokens,
                             stride / kVector, ceil_div(head_.count, Math::kPer)});
    for (int64_t i = 0; i < args_.tokens * stride; i += kVector)
      store<Sum>(to + i, load<Sum>(to + i) + load<Sum>(head_.result + i));
  }

  void clear_query_gradients() {
    for (int64_t n = 0; n < args_.tokens; ++n)
      __builtin_memset(args_.grad_qkv + head_.offset(n, kQuery), 0, args_.head_size * sizeof(T));
  }

  const BackwardArgs<T>& args_;
  Head<Math, T> head_;
  Sum* bias_sums_ = nullptr;             // (N, key_stride) of this unit
  Buffer<Operand> values_;               // (N, D)
  Buffer<Operand> values_across_;        // (D, N)
  Buffer<Operand> packed_keys_;          // (N, D)
  const Operand* along_ = nullptr;       // these, or the keys
  Buffer<Operand> grad_out_;             // (M, D)
  Buffer<Operand> packed_rows_;          // (M, D)
  Buffer<Sum> grad_logits_;              // (M, N)
  Buffer<Sum> grad_keys_, grad_values_;  // (N, D)
};

template <class Work, class WorkArgs>
void run_units(const WorkArgs& args, int64_t begin, int64_t end) {
  Work work(args);
  for (int64_t unit = begin; unit < end; ++unit) work.run(unit);
}

template <template <class, typename> class Work, typename T, class WorkArgs>
void run(const WorkArgs& args, int64_t begin, int64_t end) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, BFloat16>)
    if (args.head_size % 2 == 0) return run_units<Work<Pairs, T>>(args, begin, end);
#endif
  run_units<Work<Numbers<T>, T>>(args, begin, end);
}

}  // namespace
}  // namespace simmim_fast::SIMMIM_FAST_LEVEL

namespace simmim_fast::biased_attention {

template <typename T>
template <Simd kAt>
Kernels<T> Kernels<T>::at() {
  namespace level = SIMMIM_FAST_LEVEL;
  return {level::kLanes<Accumulator<T>>, &level::run<level::Forward, T, ForwardArgs<T>>,
          &level::run<level::Backward, T, BackwardArgs<T>>};
}

template Kernels<float> Kernels<float>::at<kLevel>();
template Kernels<double> Kernels<double>::at<kLevel>();
template Kernels<BFloat16> Kernels<BFloat16>::at<kLevel>();
template Kernels<Half> Kernels<Half>::at<kLevel>();

}  // namespace simmim_fast::biased_attention
