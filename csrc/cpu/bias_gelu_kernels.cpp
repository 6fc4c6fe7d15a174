// Forward and backward of bias_gelu over ranges of work.
// Compiled once per SIMD level.

#include "cpu/bias_gelu.h"
#include "cpu/vector_rows.h"

namespace simmim_fast::SIMMIM_FAST_LEVEL {
namespace {

using bias_gelu::BackwardArgs;
using bias_gelu::ForwardArgs;

// With t = |z|, Phi(-t) = exp(-t^2 / 2) r(t), where r(t) = erfcx(t / sqrt(2)) / 2 is smooth. It is s times a polynomial
// in s = 1 / (1 + 0.35 t), the minimax one in the relative error, 3.2e-8, up to where the exponential underflows; t
// stops there. So Phi is right to a few units in the last place in the lower tail, and phi is at hand.
struct Tail {
  Vec<float> t, exponential, ratio;
};

inline Tail tail(Vec<float> z) {
  constexpr float kRoot = 0.849321800f;  // sqrt(log2(e) / 2)
  constexpr float kUnderflow = 14.8f;
  Vec<float> t = (Vec<float>)((Vec<uint32_t>)z & 0x7FFFFFFF);
  t = t > kUnderflow ? broadcast(kUnderflow) : t;
  const Vec<float> root = t * kRoot, n = (kToInteger - root * root) - kToInteger;
  const Vec<float> s = 1.0f / (t * 0.35f + 1.0f);
  Vec<float> ratio = s * -0.0291580302f + 0.144031611f;
  ratio = ratio * s + -0.255840403f;
  ratio = ratio * s + 0.159321254f;
  ratio = ratio * s + -0.0232133942f;
  ratio = ratio * s + 0.105552927f;
  ratio = ratio * s + 0.119821185f;
  ratio = ratio * s + 0.139863529f;
  ratio = ratio * s + 0.139621306f;
  return {t, power_of_two(-(root * root) - n, n), ratio * s};
}

// z Phi(z), which is -t Phi(-t) below 0 and z - t Phi(-t) above.
inline Vec<float> gelu(Vec<float> z, const Tail& at) {
  return maximum<float>(z, Vec<float>{}) - at.t * (at.exponential * at.ratio);
}

inline Vec<float> gelu(Vec<float> z) { return gelu(z, tail(z)); }

// Phi(z) + z phi(z). Its values at z and -z add up to 1.
inline Vec<float> slope(Vec<float> z, const Tail& at) {
  constexpr float kDensity = 0.398942280f;  // 1 / sqrt(2 pi)
  const Vec<float> below = at.exponential * (at.ratio - at.t * kDensity);
  return z < 0.0f ? below : 1.0f - below;
}

// Phi(z).
inline Vec<double> tail(Vec<double> z) {
  for (int64_t lane = 0; lane < kLanes<double>; ++lane)
    z[lane] = 0.5 * __builtin_erfc(-z[lane] * 0.70710678118654752440);
  return z;
}

inline Vec<double> gelu(Vec<double> z, Vec<double> below) { return z * below; }

inline Vec<double> gelu(Vec<double> z) { return gelu(z, tail(z)); }

inline Vec<double> slope(Vec<double> z, Vec<double> below) {
  constexpr double kDensity = 0.39894228040143267794;
  for (int64_t lane = 0; lane < kLanes<double>; ++lane)
    below[lane] += z[lane] * (kDensity * __builtin_exp(-0.5 * z[lane] * z[lane]));
  return below;
}

template <typename T>
void forward(const ForwardArgs<T>& args, int64_t begin, int64_t end) {
  using Sum = Accumulator<T>;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = args.x + row * args.channels;
    T* out = args.out + row * args.channels;
    over_row<Sum>(args.channels, [&](int64_t c, auto n) {
      const Vec<Sum> z = widen_part(x + c, n) + widen_part(args.bias + c, n);
      narrow_part(out + c, gelu(z), n);
    });
  }
}

template <typename T>
void backward(const BackwardArgs<T>& args, int64_t begin, int64_t end) {
  using Sum = Accumulator<T>;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    Sum* sums = args.partials ? args.partials + chunk * args.channels : nullptr;
    if (sums) std::fill_n(sums, args.channels, Sum(0));
    const int64_t first = chunk * args.chunk_rows(), last = std::min(first + args.chunk_rows(), args.rows);
    for (int64_t row = first; row < last; ++row) {
      const T* x = args.x + row * args.channels;
      const T* grad = args.grad_out + row * args.channels;
      T* grad_x = args.grad_x ? args.grad_x + row * args.channels : nullptr;
      T* out = args.out ? args.out + row * args.channels : nullptr;
      over_row<Sum>(args.channels, [&](int64_t c, auto n) {
        const Vec<Sum> z = widen_part(x + c, n) + widen_part(args.bias + c, n);
        const auto at = tail(z);
        const Vec<Sum> gradient = widen_part(grad + c, n) * slope(z, at);
        if (out) narrow_part(out + c, gelu(z, at), n);
        if (grad_x) narrow_part(grad_x + c, gradient, n);
        if (sums) narrow_part(sums + c, widen_part(sums + c, n) + gradient, n);
      });
    }
  }
}

}  // namespace
}  // namespace simmim_fast::SIMMIM_FAST_LEVEL

namespace simmim_fast::bias_gelu {

template <typename T>
template <Simd kAt>
Kernels<T> Kernels<T>::at() {
  namespace level = SIMMIM_FAST_LEVEL;
  return {&level::forward<T>, &level::backward<T>};
}

template Kernels<float> Kernels<float>::at<kLevel>();
template Kernels<double> Kernels<double>::at<kLevel>();
template Kernels<BFloat16> Kernels<BFloat16>::at<kLevel>();
template Kernels<Half> Kernels<Half>::at<kLevel>();

}  // namespace simmim_fast::bias_gelu
