// The width of the vectors is chosen when the library is loaded: one binary serves every x86-64 processor. What depends
// on it is in cpu/<op>_kernels.cpp. setup.py compiles those files once per level, each into the namespace
// SIMMIM_FAST_LEVEL, so that no function is shared between levels.
//
// Not target_clones: the loader picks the clone from the processor alone, so narrower ones could not be tested, and
// kernels that need to know their level (vectors, bfloat16 products) had to be compiled by hand beside it.

#pragma once

#include <cstdlib>
#include <string_view>

namespace simmim_fast {

// Each has all that the one before it has. The numbers are setup.py's.
enum class Simd {
  baseline,     // what every processor of the architecture has
  avx2,         // x86-64-v3: with fused multiply-add and half conversions
  avx512,       // x86-64-v4
  avx512_bf16,  // and products of bfloat16
};

#ifdef SIMMIM_FAST_LEVEL
constexpr Simd kLevel = Simd::SIMMIM_FAST_LEVEL;
#else

// The highest level that the processor has and that ATEN_CPU_CAPABILITY allows: "default", "avx2" or "avx512" as in
// PyTorch, or "avx512_bf16". Other values count as none, also as in PyTorch.
inline Simd choose_level() {
#ifdef SIMMIM_FAST_X86_LEVELS
  const char* value = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view wish = value ? value : "";
  const Simd highest = wish == "default"  ? Simd::baseline
                       : wish == "avx2"   ? Simd::avx2
                       : wish == "avx512" ? Simd::avx512
                                          : Simd::avx512_bf16;
  const bool avx512 = __builtin_cpu_supports("x86-64-v4");
  if (highest >= Simd::avx512_bf16 && avx512 && __builtin_cpu_supports("avx512bf16")) return Simd::avx512_bf16;
  if (highest >= Simd::avx512 && avx512) return Simd::avx512;
  if (highest >= Simd::avx2 && __builtin_cpu_supports("x86-64-v3")) return Simd::avx2;
#endif
  return Simd::baseline;
}

inline const Simd kChosenLevel = choose_level();

// The table of kernels of the chosen level. Every level defines its Kernels::at() in a file of its own.
template <class Kernels>
Kernels choose_kernels() {
#ifdef SIMMIM_FAST_X86_LEVELS
  switch (kChosenLevel) {
    case Simd::avx512_bf16:
      return Kernels::template at<Simd::avx512_bf16>();
    case Simd::avx512:
      return Kernels::template at<Simd::avx512>();
    case Simd::avx2:
      return Kernels::template at<Simd::avx2>();
    case Simd::baseline:
      break;
  }
#endif
  return Kernels::template at<Simd::baseline>();
}

#endif

}  // namespace simmim_fast
