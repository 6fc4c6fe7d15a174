// What the CUDA kernels share: 16-byte vectors, launches on the current stream, registration. A .cu file is also C++:
// with SIMMIM_FAST_HOST_CUDA it compiles without nvcc, against csrc/testing/host_cuda.h, and runs on CPU tensors.

#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>

#include "checks.h"

#ifdef SIMMIM_FAST_HOST_CUDA
#include "testing/host_cuda.h"
#define SIMMIM_FAST_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(simmim_fast_hostcuda, CPU, m)
#define SIMMIM_FAST_CHECK_ALIGNED(pointer, bytes) host_cuda::check_aligned(pointer, bytes)
#else
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#define SIMMIM_FAST_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(simmim_fast, CUDA, m)
#define SIMMIM_FAST_CHECK_ALIGNED(pointer, bytes)
#endif

namespace simmim_fast {

// N values that one instruction loads or stores where N * sizeof(T) is 16 bytes or less.
template <typename T, int N>
struct alignas(N * sizeof(T)) Vector {
  T values[N];
};

// On the host, where a misaligned access would pass, it throws.
template <int N, typename T>
__device__ __forceinline__ Vector<T, N> load(const T* from) {
  SIMMIM_FAST_CHECK_ALIGNED(from, N * sizeof(T));
  return *reinterpret_cast<const Vector<T, N>*>(from);
}

template <int N, typename T>
__device__ __forceinline__ void store(T* to, const Vector<T, N>& values) {
  SIMMIM_FAST_CHECK_ALIGNED(to, N * sizeof(T));
  *reinterpret_cast<Vector<T, N>*>(to) = values;
}

// Whether rows of `channels` values can be read and written N at a time.
template <int N, typename... T>
bool is_aligned(int64_t channels, const T*... rows) {
  return channels % N == 0 && ((reinterpret_cast<uintptr_t>(rows) % (N * sizeof(T)) == 0) && ...);
}

inline unsigned blocks_for(int64_t items, int64_t per_block) {
  constexpr int64_t kLargestGrid = 2147483647;
  return static_cast<unsigned>(std::min((items + per_block - 1) / per_block, kLargestGrid));
}

#ifdef SIMMIM_FAST_HOST_CUDA

struct Stream {
  explicit Stream(const Tensor&) {}
};

template <typename... Parameters, typename... Args>
void launch(const Stream&, void (*kernel)(Parameters...), dim3 grid, dim3 block, const Args&... args) {
  host_cuda::launch(grid, block, [&] { kernel(args...); });
}

template <typename Shared, typename... Parameters, typename... Args>
void launch_with(const Stream&, void (*kernel)(Parameters...), dim3 grid, dim3 block, const Args&... args) {
  host_cuda::launch(grid, block, [&] { kernel(args...); }, sizeof(Shared));
}

template <typename Shared>
Shared& dynamic_shared() {
  return *reinterpret_cast<Shared*>(host_cuda::dynamic_shared.data());
}

#else

// The current stream of the tensor's device, which is the current device as long as this lives.
struct Stream {
  explicit Stream(const Tensor& tensor) : guard(tensor.get_device_index()) {
    void* pointer = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &pointer));
    stream = static_cast<cudaStream_t>(pointer);
  }
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
};

template <typename... Parameters, typename... Args>
void launch(const Stream& stream, void (*kernel)(Parameters...), dim3 grid, dim3 block, const Args&... args) {
  kernel<<<grid, block, 0, stream.stream>>>(args...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// A launch whose blocks have one `Shared` in shared memory, beyond the 48 KiB of static memory where they need it.
template <typename Shared, typename... Parameters, typename... Args>
void launch_with(const Stream& stream, void (*kernel)(Parameters...), dim3 grid, dim3 block, const Args&... args) {
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared)));
  kernel<<<grid, block, sizeof(Shared), stream.stream>>>(args...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename Shared>
__device__ __forceinline__ Shared& dynamic_shared() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return *reinterpret_cast<Shared*>(bytes);
}

#endif

}  // namespace simmim_fast
