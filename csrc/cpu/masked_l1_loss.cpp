// masked_l1_loss on the CPU: memory-bound, so visible pixels are never read and one byte a pixel is kept for the
// backward.

#include <torch/csrc/stable/library.h>

#include <cmath>

#include "cpu/convert.h"
#include "cpu/simd.h"
#include "masked_loss.h"

namespace simmim_fast::masked_loss {
namespace {

constexpr int64_t kGrain = 32768;  // pixels that are worth a thread
constexpr int64_t kLanes = 32;     // independent sums, so that additions overlap

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
SIMMIM_FAST_SIMD void forward_chunk(const ForwardArgs<P, T>& args, int64_t chunk) {
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
        if (hidden)
          add_run<kSign>(args.prediction + offset, args.target + offset, sign, end - first, level, lanes);
        else if (kSign)
          std::fill_n(sign, end - first, int8_t(0));
      }
    }
  }
  double sum = 0;
  for (const Compute lane : lanes) sum += lane;
  args.sums[chunk] = sum;
  args.counts[chunk] = count;
}

template <typename P>
SIMMIM_FAST_SIMD void backward_pixels(const BackwardArgs<P>& args, int64_t begin, int64_t end) {
  const typename BackwardArgs<P>::Compute factor = *args.grad_loss * *args.scale;
  const int8_t* __restrict sign = args.sign;
  P* __restrict grad = args.grad_prediction;
  for (int64_t i = begin; i < end; ++i) grad[i] = narrow<P>(sign[i] * factor);
}

std::tuple<Tensor, Tensor, Tensor> forward_cpu(const Tensor& prediction, const Tensor& target, const Tensor& mask,
                                               const std::optional<Tensor>& mean, const std::optional<Tensor>& std,
                                               int64_t patch_size, bool keep_sign) {
  const auto run = [](const auto& args) {
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, kChunkRows * args.width));
    torch::stable::parallel_for(0, args.chunks(), grain, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk)
        args.sign ? forward_chunk<true>(args, chunk) : forward_chunk<false>(args, chunk);
    });
  };
  const auto finish = [](const double* sums, const int64_t* counts, int64_t chunks, int64_t channels, auto* loss,
                         auto* scale) {
    double sum = 0;
    int64_t count = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      sum += sums[chunk];
      count += counts[chunk];
    }
    using Compute = std::remove_pointer_t<decltype(loss)>;
    *scale = loss_scale<Compute>(count, channels);
    *loss = Compute(sum * *scale);
  };
  return forward(prediction, target, mask, mean, std, patch_size, keep_sign, run, finish);
}

Tensor backward_cpu(const Tensor& grad_loss, const Tensor& sign, const Tensor& scale, ScalarType prediction_dtype) {
  return backward(grad_loss, sign, scale, prediction_dtype, [](const auto& args) {
    torch::stable::parallel_for(0, args.pixels, kGrain,
                                [&](int64_t begin, int64_t end) { backward_pixels(args, begin, end); });
  });
}

}  // namespace
}  // namespace simmim_fast::masked_loss

STABLE_TORCH_LIBRARY_IMPL(simmim_fast, CPU, m) {
  namespace op = simmim_fast::masked_loss;
  m.impl("masked_l1_loss_native", TORCH_BOX(&op::forward_cpu));
  m.impl("masked_l1_loss_native_backward", TORCH_BOX(&op::backward_cpu));
}
