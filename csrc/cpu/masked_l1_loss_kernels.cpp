// Forward and backward of masked_l1_loss over ranges of work: memory-bound, so visible pixels are never read and one
// byte a pixel is kept for the backward. Compiled once per SIMD level.

#include "cpu/masked_l1_loss.h"

#include <cmath>

#include "cpu/convert.h"

namespace simmim_fast::SIMMIM_FAST_LEVEL {
namespace {

using masked_loss::BackwardArgs;
using masked_loss::ForwardArgs;
using masked_loss::kChunkRows;
using masked_loss::Level;

constexpr int64_t kLanes = 32;  // independent sums, so that additions overlap
constexpr int64_t kAhead = 12;  // rows: runs are too short for the processor to fetch the next by itself

template <typename T>
inline __attribute__((always_inline)) void fetch(const T* from, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(from + i);
}

// Adds the absolute residuals of n <= kLanes pixels to the lanes, and keeps their signs if asked to.
template <bool kSign, typename P, typename T>
inline __attribute__((always_inline)) void add_residuals(const P* __restrict prediction, const T* __restrict target,
                                                         int8_t* __restrict sign, int64_t n,
                                                         Level<Accumulator<P>> level,
                                                         Accumulator<P>* __restrict lanes) {
#pragma GCC unroll 1
  for (int64_t i = 0; i < n; ++i) {
    const auto residual = widen(prediction[i]) - (Accumulator<P>(widen(target[i])) * level.scale + level.shift);
    lanes[i] += std::abs(residual);
    if (kSign) sign[i] = int8_t(residual > 0) - int8_t(residual < 0);
  }
}

// The same for any n.
template <bool kSign, typename P, typename T>
inline __attribute__((always_inline)) void add_run(const P* prediction, const T* target, int8_t* sign, int64_t n,
                                                   Level<Accumulator<P>> level, Accumulator<P>* lanes) {
  int64_t x = 0;
  for (; x + kLanes <= n; x += kLanes)
    add_residuals<kSign>(prediction + x, target + x, kSign ? sign + x : nullptr, kLanes, level, lanes);
  if (x < n) add_residuals<kSign>(prediction + x, target + x, kSign ? sign + x : nullptr, n - x, level, lanes);
}

// A chunk's rows go in bands that share a row of the mask, so that its runs of hidden pixels are found once.
template <bool kSign, typename P, typename T>
void forward_chunk(const ForwardArgs<P, T>& args, int64_t chunk) {
  using Compute = Accumulator<P>;
  const int64_t width = args.width, patch = args.patch, last = std::min((chunk + 1) * kChunkRows, args.rows);
  alignas(64) Compute lanes[kLanes] = {};
  int64_t count = 0;
  for (int64_t row = chunk * kChunkRows, band_end; row < last; row = band_end) {
    band_end = std::min(last, row + patch - row % args.height % patch);
    const bool* mask = args.mask_row(row);
    const int64_t channel = args.channel(row);
    const Level<Compute> level = masked_loss::level(args.mean, args.std, channel);
    for (int64_t first = 0, cell = 0, end; first < width; first = end) {
      const bool hidden = mask[cell];
      for (end = first; end < width && mask[cell] == hidden; ++cell) end += patch;
      if (hidden && channel == 0) count += (end - first) * (band_end - row);
      for (int64_t offset = row * width + first; offset < band_end * width; offset += width) {
        int8_t* sign = kSign ? args.sign + offset : nullptr;
        if (hidden) {
          fetch(args.prediction + offset + kAhead * width, end - first);
          fetch(args.target + offset + kAhead * width, end - first);
          add_run<kSign>(args.prediction + offset, args.target + offset, sign, end - first, level, lanes);
        } else if (kSign) {
          std::fill_n(sign, end - first, int8_t(0));
        }
      }
    }
  }
  double sum = 0;
  for (const Compute lane : lanes) sum += lane;
  args.sums[chunk] = sum;
  args.counts[chunk] = count;
}

template <typename P>
void backward(const BackwardArgs<P>& args, int64_t begin, int64_t end) {
  const typename BackwardArgs<P>::Compute factor = *args.grad_loss * *args.scale;
  const int8_t* __restrict sign = args.sign;
  P* __restrict grad = args.grad_prediction;
  for (int64_t i = begin; i < end; ++i) grad[i] = narrow<P>(sign[i] * factor);
}

template <typename P, typename T>
void forward(const ForwardArgs<P, T>& args, int64_t begin, int64_t end) {
  for (int64_t chunk = begin; chunk < end; ++chunk)
    args.sign ? forward_chunk<true>(args, chunk) : forward_chunk<false>(args, chunk);
}

}  // namespace
}  // namespace simmim_fast::SIMMIM_FAST_LEVEL

namespace simmim_fast::masked_loss {

template <typename P, typename T>
template <Simd kAt>
Kernels<P, T> Kernels<P, T>::at() {
  namespace level = SIMMIM_FAST_LEVEL;
  return {&level::forward<P, T>, &level::backward<P>};
}

template Kernels<float, float> Kernels<float, float>::at<kLevel>();
template Kernels<float, uint8_t> Kernels<float, uint8_t>::at<kLevel>();
template Kernels<double, double> Kernels<double, double>::at<kLevel>();
template Kernels<double, uint8_t> Kernels<double, uint8_t>::at<kLevel>();
template Kernels<BFloat16, BFloat16> Kernels<BFloat16, BFloat16>::at<kLevel>();
template Kernels<BFloat16, float> Kernels<BFloat16, float>::at<kLevel>();
template Kernels<BFloat16, uint8_t> Kernels<BFloat16, uint8_t>::at<kLevel>();
template Kernels<Half, Half> Kernels<Half, Half>::at<kLevel>();
template Kernels<Half, float> Kernels<Half, float>::at<kLevel>();
template Kernels<Half, uint8_t> Kernels<Half, uint8_t>::at<kLevel>();

}  // namespace simmim_fast::masked_loss
