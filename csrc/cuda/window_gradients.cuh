// What lies between the table of shifted_window_attention and the kernels over windows: the biases that they read, and
// the gradients of table, logit scale and padding value from sums over all windows. One thread: one value of a result.

#pragma once

#include "cuda/sum_partials.cuh"
#include "cuda/window_tile.cuh"

namespace simmim_fast::shifted_window_attention {
namespace {

// A tensor of any floating dtype that is written.
struct Result {
  void* data;
  ScalarType dtype;

  __device__ void set(int64_t i, float value) const {
    if (dtype == ScalarType::Float) static_cast<float*>(data)[i] = value;
    if (dtype == ScalarType::BFloat16) static_cast<BFloat16*>(data)[i] = BFloat16(value);
    if (dtype == ScalarType::Half) static_cast<Half*>(data)[i] = Half(value);
    if (dtype == ScalarType::Double) static_cast<double*>(data)[i] = value;
  }
};

// Thread of the grid; beyond the results where there are more threads.
__device__ int result_index() { return static_cast<int>(blockIdx.x * kThreads + threadIdx.x); }

// A window of a kind of window_kind.
__device__ int window_of_kind(const WindowGrid& grid, int kind) {
  return (kind % 2 ? grid.rows() - 1 : 0) * grid.columns() + (kind / 2 ? grid.columns() - 1 : 0);
}

// bias (kinds, heads, side * side) as bias_row has it: the table, and the mask of the shift where kinds are told apart.
template <int kWarps>
__global__ void __launch_bounds__(kThreads)
    window_bias_kernel(const WindowGrid grid, const Parameter table, float* bias, int kinds, int heads, int side) {
  constexpr int kSlots = 16 * kWarps;
  const int index = result_index();
  if (index >= kinds * heads * kSlots * kSlots) return;
  const int key = index % kSlots, query = index / kSlots % kSlots, tile = index / kSlots / kSlots;
  const int window = window_of_kind(grid, tile / heads), tokens = grid.tokens();
  float value = key < tokens ? 0 : -INFINITY;
  if (key < tokens && query < tokens) {
    value = table.at(int64_t(grid.table_row(query, key)) * heads + tile % heads);
    if (kinds > 1 && grid.region(window, query) != grid.region(window, key)) value += kBetweenRegions;
  }
  bias[int64_t(tile) * side * side + bias_row<kWarps>(query) + key / 8 * 128 + key % 8 / 2 * 4 + key % 2] = value;
}

// gradient (offsets, heads) from sums (heads, N, N): over the pairs of slots that are an offset apart.
__global__ void __launch_bounds__(kThreads)
    table_gradient_kernel(const WindowGrid grid, int heads, const float* sums, const Result gradient) {
  const int index = result_index();
  if (index >= grid.table_rows() * heads) return;
  const int columns = 2 * grid.window_w - 1, head = index % heads, tokens = grid.tokens();
  const int down = index / heads / columns - (grid.window_h - 1), right = index / heads % columns - (grid.window_w - 1);
  double sum = 0;
  for (int row = max(down, 0); row < min(grid.window_h, grid.window_h + down); ++row)
    for (int column = max(right, 0); column < min(grid.window_w, grid.window_w + right); ++column) {
      const int query = row * grid.window_w + column, key = query - down * grid.window_w - right;
      sum += sums[(int64_t(head) * tokens + query) * tokens + key];
    }
  gradient.set(index, static_cast<float>(sum));
}

// gradient (heads) from sums (heads): none above the clamp.
__global__ void __launch_bounds__(kThreads)
    scale_gradient_kernel(const Parameter logit_scale, int heads, const float* sums, const Result gradient) {
  const int head = result_index();
  if (head < heads) gradient.set(head, logit_scale.at(head) <= kMaxLogitScale ? sums[head] : 0);
}

// gradient (3 C) from sums (2, C) of k and v, or from null where nothing is padded: 0 for q, whose results are dropped.
__global__ void __launch_bounds__(kThreads)
    pad_gradient_kernel(int channels, const float* sums, const Result gradient) {
  const int index = result_index();
  if (index < 3 * channels) gradient.set(index, sums && index >= channels ? sums[index - channels] : 0);
}

}  // namespace
}  // namespace simmim_fast::shifted_window_attention
