// simmim_fast._C: what was compiled, and how wide this processor's vectors are. No mathematics, no torch headers.

#include <pybind11/pybind11.h>

#include "build_info.h"  // written by setup.py
#include "cpu/simd.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  for (const auto& [key, value] : BUILD_INFO) info[key] = value;
  return info;
}

const char* simd_level() {
#if SIMMIM_FAST_HAS_SIMD
  const bool avx512 = __builtin_cpu_supports("x86-64-v4");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return "avx512_bf16";
  if (avx512) return "avx512";
  if (__builtin_cpu_supports("x86-64-v3")) return "avx2";
#endif
  return "baseline";
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of the compiled parts, and the vector instructions of this processor.";
  m.def("build_info", &build_info, "What was compiled, with what, against which torch, for which GPUs; all strings.");
  m.def("simd_level", &simd_level, "\"avx512_bf16\", \"avx512\", \"avx2\" or \"baseline\".");
}
