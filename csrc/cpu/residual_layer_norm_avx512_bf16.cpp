#include "cpu/simd.h"

#if SIMMIM_FAST_HAS_SIMD
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in the intrinsics of g++ 12
#include <immintrin.h>

#include "cpu/residual_layer_norm.h"
#define SIMMIM_FAST_LEVEL avx512_bf16
#pragma GCC target("arch=x86-64-v4,avx512bf16,prefer-vector-width=512")
#ifndef __AVX512BF16__  // g++ before 13 reads the pragma too late to define them
#define __AVX2__ 1
#define __F16C__ 1
#define __AVX512F__ 1
#define __AVX512BF16__ 1
#endif
#include "cpu/residual_layer_norm_kernels.h"
#endif
