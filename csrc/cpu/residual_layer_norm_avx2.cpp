#include "cpu/simd.h"

#if SIMMIM_FAST_HAS_SIMD
#include <immintrin.h>

#include "cpu/residual_layer_norm.h"
#define SIMMIM_FAST_LEVEL avx2
#pragma GCC target("arch=x86-64-v3")
#ifndef __F16C__  // g++ before 13 reads the pragma too late to define them
#define __AVX2__ 1
#define __F16C__ 1
#endif
#include "cpu/residual_layer_norm_kernels.h"
#endif
