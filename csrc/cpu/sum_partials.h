// The second stage of sums over chunks.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "checks.h"
#include "cpu/grain.h"

namespace simmim_fast {
namespace {

// Columns [begin, end) of partials (count, width), summed in float64 in the order of the chunks.
template <typename T>
void sum_columns(const T* partials, T* out, int64_t count, int64_t width, int64_t begin, int64_t end) {
  constexpr int64_t kBlock = 64;  // columns whose sums stay in registers or the first cache
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t size = std::min(kBlock, end - first);
    double sums[kBlock] = {};
    for (int64_t chunk = 0; chunk < count; ++chunk)
      for (int64_t c = 0; c < size; ++c) sums[c] += partials[chunk * width + first + c];
    for (int64_t c = 0; c < size; ++c) out[first + c] = T(sums[c]);
  }
}

// Partials (count, ...) added up over the first axis.
inline Tensor sum_partials(const Tensor& partials) {
  const IntHeaderOnlyArrayRef shape = partials.sizes().slice(1);
  const Tensor out = torch::stable::new_empty(partials, shape);
  const int64_t count = partials.size(0), width = out.numel();
  const auto sum = [&](auto type) {
    using T = typename decltype(type)::type;
    const T* from = partials.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    torch::stable::parallel_for(0, width, grain(count),
                                [&](int64_t begin, int64_t end) { sum_columns(from, to, count, width, begin, end); });
  };
  partials.scalar_type() == ScalarType::Double ? sum(Type<double>{}) : sum(Type<float>{});
  return out;
}

}  // namespace
}  // namespace simmim_fast
