// Integer arithmetic on the host and in kernels.

#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define SIMMIM_FAST_HOST_DEVICE __host__ __device__
#else
#define SIMMIM_FAST_HOST_DEVICE
#endif

namespace simmim_fast {

SIMMIM_FAST_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
SIMMIM_FAST_HOST_DEVICE constexpr int64_t round_up(int64_t a, int64_t multiple) {
  return ceil_div(a, multiple) * multiple;
}

}  // namespace simmim_fast
