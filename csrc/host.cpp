// simmim_fast._C: what was compiled, and how wide the vectors of the kernels are. No mathematics, no torch headers.

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
  constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16"};
  return kNames[static_cast<int>(simmim_fast::kChosenLevel)];
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of the compiled parts, and the vector instructions of the kernels.";
  m.def("build_info", &build_info, "What was compiled, with what, against which torch, for which GPUs; all strings.");
  m.def("simd_level", &simd_level, "\"avx512_bf16\", \"avx512\", \"avx2\" or \"baseline\".");
}
