// The width of the vectors is chosen when the library is loaded: one binary serves every x86-64 processor, with
// AVX-512, with AVX2 (both with fused multiply-add and half conversions) or with the base level.

#pragma once

#if defined(__x86_64__) && !defined(__clang__) && __GNUC__ >= 12
#define SIMMIM_FAST_SIMD __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#define SIMMIM_FAST_HAS_SIMD 1
#else
#define SIMMIM_FAST_SIMD
#define SIMMIM_FAST_HAS_SIMD 0
#endif

// For the loops inside: inlined, they are compiled for each width in turn.
#define SIMMIM_FAST_INLINE inline __attribute__((always_inline))
