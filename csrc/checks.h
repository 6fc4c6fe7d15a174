// Argument checks with messages, and dtype dispatch, for the CPU and the CUDA library alike. They protect memory;
// the friendlier errors are raised in Python.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <string>
#include <type_traits>

namespace simmim_fast {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Args>
void check(bool condition, const Args&... message) {
  if (condition) return;
  std::ostringstream text;
  (text << ... << message);
  throw std::runtime_error(text.str());
}

// "(2, 48, 48, 128)"
inline std::string shape_text(IntHeaderOnlyArrayRef sizes) {
  std::string text;
  for (int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "(" + text + ")";
}

inline void check_rank(const Tensor& tensor, const char* name, int64_t rank) {
  check(tensor.dim() == rank, name, ": expected ", rank, " dimensions, got ", shape_text(tensor.sizes()));
}

inline void check_shape(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) {
  const IntHeaderOnlyArrayRef expected(shape.begin(), shape.size());
  check(tensor.sizes().equals(expected), name, ": expected shape ", shape_text(expected), ", got ",
        shape_text(tensor.sizes()));
}

inline void check_dtype(const Tensor& tensor, const char* name, ScalarType dtype) {
  check(tensor.scalar_type() == dtype, name, ": expected dtype ", dtype, ", got ", tensor.scalar_type());
}

inline void check_same_device(const Tensor& tensor, const char* name, const Tensor& other, const char* other_name) {
  check(tensor.device() == other.device(), name, ": expected on the device of ", other_name);
}

template <typename T>
struct Type {
  using type = T;
};

// Sums of half types and float32 are kept in float32, those of float64 in float64.
template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename F>
void dispatch_floating(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(Type<float>{});
    case ScalarType::BFloat16:
      return f(Type<BFloat16>{});
    case ScalarType::Half:
      return f(Type<Half>{});
    case ScalarType::Double:
      return f(Type<double>{});
    default:
      check(false, "expected float32, bfloat16, float16 or float64, got ", dtype);
  }
}

// torch.promote_types for the four floating dtypes.
inline ScalarType promote(ScalarType a, ScalarType b) {
  if (a == b) return a;
  return a == ScalarType::Double || b == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The tensor itself where it is contiguous and of that dtype already, else a copy.
inline Tensor dense(const Tensor& tensor, ScalarType dtype) {
  const Tensor converted = tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
  return converted.is_contiguous() ? converted : torch::stable::contiguous(converted);
}

inline Tensor dense(const Tensor& tensor) { return dense(tensor, tensor.scalar_type()); }

}  // namespace simmim_fast
