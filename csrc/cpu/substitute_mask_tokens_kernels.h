// What the operator substitute_mask_tokens and the kernels of each SIMD level share.

#pragma once

#include "cpu/simd.h"
#include "substitute_mask_tokens.h"

namespace simmim_fast::substitute_mask_tokens {

// X is the dtype of x, Out that of the result.
template <typename X, typename Out>
struct Kernels {
  void (*forward)(const ForwardArgs<X, Out>& args, int64_t begin, int64_t end);    // rows [begin, end)
  void (*backward)(const BackwardArgs<X, Out>& args, int64_t begin, int64_t end);  // chunks

  template <Simd kAt>
  static Kernels at();
};

}  // namespace simmim_fast::substitute_mask_tokens
