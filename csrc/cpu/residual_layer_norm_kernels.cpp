// Forward and backward of residual_layer_norm over ranges of work.
// Compiled once per SIMD level.

#include <cmath>
#include <vector>

#include "cpu/residual_layer_norm.h"
#include "cpu/vector_rows.h"

namespace simmim_fast::SIMMIM_FAST_LEVEL {
namespace {

using residual_layer_norm::Args;
using residual_layer_norm::BackwardArgs;
using residual_layer_norm::ForwardArgs;

// The first n lanes, 0 in the others.
template <typename Sum>
inline Vec<Sum> leading(Vec<Sum> value, int64_t n) {
  for (int64_t lane = n; lane < kLanes<Sum>; ++lane) value[lane] = 0;
  return value;
}

// Room for one row of whole vectors.
template <typename Sum>
std::vector<Sum> row_buffer(int64_t channels) {
  return std::vector<Sum>(channels + kLanes<Sum>);
}

// In place, from what is in the row to its distance from the mean; mean and 1 / deviation are set.
template <typename Sum>
inline void centre(Sum* row, int64_t channels, Vec<Sum> total, Sum eps, Sum* mean, Sum* rstd) {
  *mean = sum_lanes<Sum>(total) / Sum(channels);
  Vec<Sum> squares = {};
  over_row<Sum>(channels, [&](int64_t c, auto n) {
    const Vec<Sum> centred = leading<Sum>(load(row + c) - *mean, n);
    squares += centred * centred;
    store(row + c, centred);
  });
  *rstd = 1 / std::sqrt(sum_lanes<Sum>(squares) / Sum(channels) + eps);
}

// delta + delta_bias of n elements from channel c on.
template <typename Stream, typename Branch, typename Count>
inline Vec<Accumulator<Stream>> branch_of(const Args<Stream, Branch>& args, const Branch* delta, int64_t c, Count n) {
  const Vec<Accumulator<Stream>> branch = widen_part(delta, n);
  return args.delta_bias ? branch + widen_part(args.delta_bias + c, n) : branch;
}

// x + keep gamma (delta + delta_bias) of n elements from channel c on, as the stream rounds it.
template <typename Stream, typename Branch, typename Count>
inline Vec<Accumulator<Stream>> add_branch(const Args<Stream, Branch>& args, Vec<Accumulator<Stream>> x,
                                           const Branch* delta, Accumulator<Stream> keep, int64_t c, Count n) {
  using Sum = Accumulator<Stream>;
  Vec<Sum> branch = branch_of(args, delta, c, n) * keep;
  if (args.gamma) branch *= widen_part(args.gamma + c, n);
  if constexpr (std::is_same_v<Stream, Sum>) return x + branch;
  Stream rounded[kLanes<Sum>] = {};
  narrow_part(rounded, x + branch, n);
  return widen_part(static_cast<const Stream*>(rounded), n);
}

template <typename Stream, typename Branch>
void forward(const ForwardArgs<Stream, Branch>& args, int64_t begin, int64_t end) {
  using Sum = Accumulator<Stream>;
  const int64_t channels = args.channels;
  std::vector<Sum> buffer = row_buffer<Sum>(channels);
  Sum* const values = buffer.data();
  for (int64_t row = begin; row < end; ++row) {
    const int64_t first = row * channels;
    const Sum keep = args.keep_of(row);
    Vec<Sum> total = {};
    over_row<Sum>(channels, [&](int64_t c, auto n) {
      Vec<Sum> value = widen_part(args.x + first + c, n);
      if (args.delta) {
        value = add_branch(args, value, args.delta + first + c, keep, c, n);
        narrow_part(args.stream + first + c, value, n);
      }
      total += value;
      store(values + c, value);
    });
    centre(values, channels, total, args.eps, args.mean + row, args.rstd + row);
    const Sum rstd = args.rstd[row];
    over_row<Sum>(channels, [&](int64_t c, auto n) {
      const Vec<Sum> normed = load(values + c) * rstd * widen_part(args.weight + c, n) + widen_part(args.bias + c, n);
      narrow_part(args.normed + first + c, normed, n);
    });
  }
}

template <typename Stream, typename Branch>
void forward_norms_delta(const ForwardArgs<Stream, Branch>& args, int64_t begin, int64_t end) {
  using Sum = Accumulator<Stream>;
  const int64_t channels = args.channels;
  std::vector<Sum> buffer = row_buffer<Sum>(channels);
  Sum* const values = buffer.data();
  for (int64_t row = begin; row < end; ++row) {
    const int64_t first = row * channels;
    Vec<Sum> total = {};
    over_row<Sum>(channels, [&](int64_t c, auto n) {
      const Vec<Sum> value = branch_of(args, args.delta + first + c, c, n);
      total += value;
      store(values + c, value);
    });
    centre(values, channels, total, args.eps, args.mean + row, args.rstd + row);
    const Sum rstd = args.rstd[row], keep = args.keep_of(row);
    over_row<Sum>(channels, [&](int64_t c, auto n) {
      const Vec<Sum> normed = load(values + c) * rstd * widen_part(args.weight + c, n) + widen_part(args.bias + c, n);
      narrow_part(args.stream + first + c, widen_part(args.x + first + c, n) + normed * keep, n);
    });
  }
}

// Chunks of rows: gradients of source and branch, the norm where it is wanted again, and the chunk's sums for the
// parameters.
template <typename Stream, typename Branch, bool kNormsDelta>
void backward(const BackwardArgs<Stream, Branch>& args, int64_t begin, int64_t end) {
  using Sum = Accumulator<Stream>;
  using Grad = std::conditional_t<kNormsDelta, Stream, Branch>;
  using Source = std::conditional_t<kNormsDelta, Branch, Stream>;
  const int64_t channels = args.channels;
  std::vector<Sum> buffer = row_buffer<Sum>(channels), other_buffer = row_buffer<Sum>(channels);
  Sum *const values = buffer.data(), *const gradients = other_buffer.data();
  const auto add = [](Sum* to, Vec<Sum> value, auto n) { narrow_part(to, widen_part(to, n) + value, n); };
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const auto chunk_sums = [&](Sum* partials) {
      if (partials) std::fill_n(partials + chunk * channels, channels, Sum(0));
      return partials ? partials + chunk * channels : nullptr;
    };
    Sum *const weight_sums = chunk_sums(args.weight_partials), *const bias_sums = chunk_sums(args.bias_partials);
    Sum *const gamma_sums = chunk_sums(args.gamma_partials), *const shift_sums = chunk_sums(args.delta_bias_partials);
    const int64_t last = std::min((chunk + 1) * args.chunk_rows(), args.rows);
    for (int64_t row = chunk * args.chunk_rows(); row < last; ++row) {
      const int64_t first = row * channels;
      const Grad* grad_normed = static_cast<const Grad*>(args.grad_normed) + first;
      const Source* source = static_cast<const Source*>(args.source) + first;
      const Sum mean = args.mean[row], rstd = args.rstd[row], keep = args.keep_of(row);
      Vec<Sum> total = {}, along = {};
      over_row<Sum>(channels, [&](int64_t c, auto n) {
        Vec<Sum> grad = widen_part(grad_normed + c, n);
        if (kNormsDelta) grad *= keep;
        const Vec<Sum> weight = widen_part(args.weight + c, n), scaled = grad * weight;
        Vec<Sum> normed;
        if constexpr (kNormsDelta) {
          normed = branch_of(args, source + c, c, n);
        } else {
          normed = widen_part(source + c, n);
          if (args.adds_delta) normed = add_branch(args, normed, args.delta + first + c, keep, c, n);
        }
        normed = (normed - mean) * rstd;
        if (weight_sums) add(weight_sums + c, grad * normed, n);
        if (bias_sums) add(bias_sums + c, grad, n);
        total += scaled;
        along += scaled * normed;
        if constexpr (!kNormsDelta)
          if (args.normed) narrow_part(args.normed + first + c, normed * weight + widen_part(args.bias + c, n), n);
        store(values + c, normed);
        store(gradients + c, scaled);
      });
      const Sum offset = sum_lanes<Sum>(total) / Sum(channels), slope = sum_lanes<Sum>(along) / Sum(channels);
      over_row<Sum>(channels, [&](int64_t c, auto n) {
        Vec<Sum> grad = (load(gradients + c) - offset - load(values + c) * slope) * rstd;
        if constexpr (kNormsDelta) {
          if (shift_sums) add(shift_sums + c, grad, n);
          if (args.grad_delta) narrow_part(args.grad_delta + first + c, grad, n);
        } else {
          if (args.grad_stream) grad += widen_part(args.grad_stream + first + c, n);
          if (args.grad_x) narrow_part(args.grad_x + first + c, grad, n);
          grad *= keep;
          if (gamma_sums) add(gamma_sums + c, grad * branch_of(args, args.delta + first + c, c, n), n);
          if (args.gamma) grad *= widen_part(args.gamma + c, n);
          if (shift_sums) add(shift_sums + c, grad, n);
          if (args.grad_delta) narrow_part(args.grad_delta + first + c, grad, n);
        }
      });
    }
  }
}

}  // namespace
}  // namespace simmim_fast::SIMMIM_FAST_LEVEL

namespace simmim_fast::residual_layer_norm {

template <typename Stream, typename Branch>
template <Simd kAt>
Kernels<Stream, Branch> Kernels<Stream, Branch>::at() {
  namespace level = SIMMIM_FAST_LEVEL;
  return {&level::forward<Stream, Branch>, &level::backward<Stream, Branch, false>,
          &level::forward_norms_delta<Stream, Branch>, &level::backward<Stream, Branch, true>};
}

template Kernels<float, float> Kernels<float, float>::at<kLevel>();
template Kernels<double, double> Kernels<double, double>::at<kLevel>();
template Kernels<BFloat16, BFloat16> Kernels<BFloat16, BFloat16>::at<kLevel>();
template Kernels<Half, Half> Kernels<Half, Half>::at<kLevel>();
template Kernels<float, BFloat16> Kernels<float, BFloat16>::at<kLevel>();
template Kernels<float, Half> Kernels<float, Half>::at<kLevel>();

}  // namespace simmim_fast::residual_layer_norm
