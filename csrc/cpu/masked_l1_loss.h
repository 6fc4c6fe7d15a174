// What the operator masked_l1_loss and the kernels of each SIMD level share.

#pragma once

#include "cpu/simd.h"
#include "masked_loss.h"

namespace simmim_fast::masked_loss {

// P is the dtype of the prediction, T that of the target.
template <typename P, typename T>
struct Kernels {
  void (*forward)(const ForwardArgs<P, T>& args, int64_t begin, int64_t end);  // chunks [begin, end)
  void (*backward)(const BackwardArgs<P>& args, int64_t begin, int64_t end);   // pixels

  template <Simd kAt>
  static Kernels at();
};

}  // namespace simmim_fast::masked_loss
