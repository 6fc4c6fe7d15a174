// Forward and backward of shifted_window_attention. qkv is read once in each direction, where the linear layer wrote
// it; what a block needs of a window and head lies in shared memory, and a warp computes 16 rows of the results.

#pragma once

#include "cuda/window_tile.cuh"

namespace simmim_fast::shifted_window_attention {
namespace {

// Whether a window lies at the bottom (1) and at the right (2) of the grid, where the roll joins what does not belong
// together; 0 where nothing is rolled.
__device__ int window_kind(const WindowGrid& grid, int window) {
  if (!grid.shift_h && !grid.shift_w) return 0;
  return (window / grid.columns() == grid.rows() - 1) + 2 * (window % grid.columns() == grid.columns() - 1);
}

// Warps that shall share a multiprocessor: as many as leave a thread the registers that it needs.
template <typename T>
constexpr int forward_warps(int of_block) {
  if (std::is_same_v<T, float>) return 12;
  return of_block < 4 ? 20 : 16;
}

template <typename T>
constexpr int backward_warps(int of_block) {
  if (std::is_same_v<T, float>) return 8;
  return of_block < 3 ? 16 : 12;
}

// out (16, D) += weights of the warp's queries, rounded to T, times the values.
template <typename T, int kWarps>
__device__ __forceinline__ void multiply_weights(float (&out)[kHeadSize / 8][4], const float (&weights)[2 * kWarps][4],
                                                 ForwardTile<T, kWarps>& tile) {
  const auto values = operand<Order::kRows, kRowStride<T>>(tile.values);
  if constexpr (std::is_same_v<T, float>) {
    constexpr int kStride = kWeightStride<T, kWarps>;
    float* rows = tile.weights + threadIdx.x / 32 * 16 * kStride;
    store_result<kStride>(rows, weights);
    __syncwarp();
    multiply<16 * kWarps>(out, operand<Order::kRows, kStride>(rows), values);
  } else {
    multiply<16 * kWarps>(out, weights, values);
  }
}

// Output of one head of consecutive windows, one after the other. Block x: head x % heads, windows from
// x / heads * block_windows on; one warp: 16 queries.
template <typename T, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, forward_warps<T>(kWarps) / kWarps)
    shifted_window_attention_fwd_kernel(const ForwardArgs<T> args) {
  constexpr int kRow = kRowStride<T>;
  using Tile = ForwardTile<T, kWarps>;
  Tile& tile = dynamic_shared<Tile>();
  const int head = blockIdx.x % args.heads, first = threadIdx.x / 32 * 16;
  const uint32_t block = blockIdx.x / args.heads, first_window = block * args.block_windows;
  const uint32_t last_window = min(first_window + args.block_windows, args.windows), in_image = args.grid.windows();
  const bool cosine = args.logit_scale.data;
  const float factor = args.factor(head);
  const float* bias = args.bias + head * args.side * args.side;
  if (args.pad_value.data) place_padding(args, head, tile);
  for (uint32_t window = first_window; window < last_window; ++window) {
    const uint32_t image = window / in_image;
    const int place = window % in_image;
    place_slots(args, image, place, tile);
    if (args.chosen) choose_queries(args, image, tile);
    const bool regions = args.grid.has_regions(place);
    if (regions) place_regions(args, place, tile);
    __syncthreads();
    fetch_window(args, head, tile);
    finish_window(args, tile);
    __syncthreads();
    if (first < args.rows) {
      float weights[2 * kWarps][4] = {}, inverse_sums[2];
      multiply<kHeadSize>(weights, operand<Order::kRows, kRow>(tile.queries + first * kRow),
                          operand<Order::kColumns, kRow>(tile.keys));
      if (cosine) scale_by_norms(weights, tile, factor);
      if (regions)
        softmax<true>(weights, inverse_sums, tile, bias, cosine ? 1 : factor);
      else
        softmax<false>(weights, inverse_sums, tile, bias, cosine ? 1 : factor);
      float out[kHeadSize / 8][4] = {};
      multiply_weights(out, weights, tile);
      const int row = first + lane() / 4;
#pragma unroll
      for (int at = 0; at < 4; ++at) {
        const bool missing = tile.query_tokens[row + at / 2 * 8] == kNoToken;
        const float by = missing ? NAN : inverse_sums[at / 2];
#pragma unroll
        for (int j = 0; j < kHeadSize / 8; ++j) out[j][at] *= by;
      }
      store_result<kRow>(tile.queries + first * kRow, out);
      __syncwarp();
      store_rows(tile.queries, args.out + head * kHeadSize, args.channels(), tile.out_rows);
    }
    __syncthreads();
  }
}

// weights: exponentials of the logits -> softmax; products: gradients of the weights -> gradients of the logits.
template <int J>
__device__ __forceinline__ void softmax_gradient(float (&weights)[J][4], float (&products)[J][4],
                                                 const float (&inverse_sums)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = 0;
#pragma unroll
    for (int j = 0; j < J; ++j) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        weights[j][i] *= inverse_sums[half];
        sum += weights[j][i] * products[j][i];
      }
    }
    sum = sum_over_row(sum);
#pragma unroll
    for (int j = 0; j < J; ++j) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) products[j][i] = weights[j][i] * (products[j][i] - sum);
    }
  }
}

// Gradients of the logits -> of the products of queries and keys.
template <typename T, int kWarps>
__device__ __forceinline__ void scale_products(float (&grads)[2 * kWarps][4], const WindowTile<T, kWarps>& tile,
                                               bool cosine, float factor) {
  if (cosine) return scale_by_norms(grads, tile, factor);
#pragma unroll
  for (int j = 0; j < 2 * kWarps; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) grads[j][i] *= factor;
  }
}

// Notes the warp's share of the gradient of the logit scale, from those of the logits. The cosines are computed again:
// they left their registers to the softmax. The gradients of a row add up to 0, so the cosines' mean under the weights
// is taken off: what all keys of a query err by then drops out.
template <typename T, int kWarps>
__device__ __forceinline__ void add_scale_gradient(const float (&grads)[2 * kWarps][4], GradientTile<T, kWarps>& tile,
                                                   float factor) {
  constexpr int kRow = kRowStride<T>, kWeightRow = kWeightStride<T, kWarps>;
  const int first = threadIdx.x / 32 * 16, row = first + lane() / 4, column = lane() % 4 * 2;
  float total = 0, sums[2] = {}, means[2] = {};  // by row
#pragma unroll
  for (int keys = 0; keys < kWarps; ++keys) {  // 16 at a time
    float cosines[2][4] = {};
    multiply<kHeadSize>(cosines, operand<Order::kRows, kRow>(tile.queries + first * kRow),
                        operand<Order::kColumns, kRow>(tile.keys + 16 * keys * kRow));
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int half = i / 2 % 2, key = 16 * keys + i / 4 * 8 + column + i % 2;
      const float grad = grads[2 * keys + i / 4][i % 4], cosine = cosines[i / 4][i % 4] * tile.key_norms.inverse[key];
      means[half] += float(tile.weights[(row + 8 * half) * kWeightRow + key]) * cosine;
      sums[half] += grad;
      total += grad * cosine * tile.query_norms.inverse[row + 8 * half];
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half)
    total -= sum_over_row(means[half]) * tile.query_norms.inverse[row + 8 * half] * sums[half];
#pragma unroll
  for (int other = 16; other > 0; other /= 2) total += __shfl_xor_sync(kFullWarp, total, other);
  if (lane() == 0) tile.scale_sums[threadIdx.x / 32] = factor * total;
}

// grads (16, D): of queries or keys as if their norm were constant -> with it.
template <typename T, int kSlots>
__device__ __forceinline__ void project(float (&grads)[kHeadSize / 8][4], const T* rows, const Norms<kSlots>& norms) {
  const int first = threadIdx.x / 32 * 16 + lane() / 4, t = lane() % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first + 8 * half;
    float x[kHeadSize / 4], sum = 0;
#pragma unroll
    for (int j = 0; j < kHeadSize / 8; ++j) {
      const Vector<T, 2> pair = load<2>(rows + row * kRowStride<T> + 8 * j + 2 * t);
#pragma unroll
      for (int i = 0; i < 2; ++i) sum += (x[2 * j + i] = float(pair.values[i])) * grads[j][2 * half + i];
    }
    const float inverse = norms.inverse[row], along = inverse * inverse * sum_over_row(sum);
#pragma unroll
    for (int j = 0; j < kHeadSize / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        grads[j][2 * half + i] = norms.power[row] * (grads[j][2 * half + i] - x[2 * j + i] * along);
    }
  }
}

// Stores the sums (2, D) over a window's padding of what `keys` and `values` hold, gradients. One thread: some
// channels.
template <typename T, int kWarps>
__device__ void store_padding(const GradientTile<T, kWarps>& tile, int tokens, float* to, int64_t channels) {
  for (int channel = threadIdx.x; channel < 2 * kHeadSize; channel += 32 * kWarps) {
    const int part = channel / kHeadSize, of_head = channel % kHeadSize;
    const T* rows = (part ? tile.values : tile.keys) + of_head;
    float sum = 0;
    for (int slot = 0; slot < tokens; ++slot)
      if (tile.key_tokens[slot] == kPaddingToken) sum += float(rows[slot * kRowStride<T>]);
    to[part * channels + of_head] = sum;
  }
}

// Stores the warp's 16 rows of sums (N, N).
template <int kWarps>
__device__ __forceinline__ void store_table(const float (&sums)[2 * kWarps][4], int tokens, float* to) {
#pragma unroll
  for (int j = 0; j < 2 * kWarps; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int query = threadIdx.x / 32 * 16 + lane() / 4 + i / 2 * 8, key = 8 * j + lane() % 4 * 2 + i % 2;
      if (query < tokens && key < tokens) to[query * tokens + key] = sums[j][i];
    }
  }
}

// Gradients of one head of consecutive windows, blocks as in the forward; one warp: 16 queries, then 16 keys.
template <typename T, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, backward_warps<T>(kWarps) / kWarps)
    shifted_window_attention_bwd_kernel(const BackwardArgs<T> args) {
  constexpr int kRow = kRowStride<T>, kWeightRow = kWeightStride<T, kWarps>, kTiles = 2 * kWarps;
  using Tile = GradientTile<T, kWarps>;
  Tile& tile = dynamic_shared<Tile>();
  const int head = blockIdx.x % args.heads, first = threadIdx.x / 32 * 16;
  const uint32_t first_window = blockIdx.x / args.heads * args.block_windows, in_image = args.grid.windows();
  const uint32_t last_window = min(first_window + args.block_windows, args.windows);
  const bool cosine = args.logit_scale.data;
  const float factor = args.factor(head);
  const int64_t channels = args.channels();
  const int tokens = args.grid.tokens();
  float table_sums[kTiles][4] = {};
  if (args.pad_value.data) place_padding(args, head, tile);
  for (uint32_t window = first_window; window < last_window; ++window) {
    const uint32_t image = window / in_image;
    const int place = window % in_image, kind = window_kind(args.grid, place);
    const float* bias = args.bias + (kind * args.heads + head) * args.side * args.side;
    place_slots(args, image, place, tile);
    if (args.chosen) place_results(args, image, tile);
    __syncthreads();
    fetch_window(args, head, tile);
    fetch_rows<T, kWarps>(tile.grads, args.grad_out + head * kHeadSize, channels, tile.out_rows);
    finish_window(args, tile);
    __syncthreads();
    float weights[kTiles][4] = {}, grads[kTiles][4] = {}, inverse_sums[2];
    multiply<kHeadSize>(weights, operand<Order::kRows, kRow>(tile.queries + first * kRow),
                        operand<Order::kColumns, kRow>(tile.keys));
    if (cosine) scale_by_norms(weights, tile, factor);
    softmax<false>(weights, inverse_sums, tile, bias, cosine ? 1 : factor);
    multiply<kHeadSize>(grads, operand<Order::kRows, kRow>(tile.grads + first * kRow),
                        operand<Order::kColumns, kRow>(tile.values));
    softmax_gradient(weights, grads, inverse_sums);
    store_result<kWeightRow>(tile.weights + first * kWeightRow, weights);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) table_sums[j][i] += grads[j][i];
    }
    if (args.scale_partials) add_scale_gradient(grads, tile, factor);
    scale_products(grads, tile, cosine, factor);
    store_result<kWeightRow>(tile.weight_grads + first * kWeightRow, grads);
    __syncthreads();
    if (args.scale_partials && threadIdx.x == 0) {
      float sum = 0;
      for (int warp = 0; warp < kWarps; ++warp) sum += tile.scale_sums[warp];
      args.scale_partials[int64_t(window) * args.heads + head] = sum;
    }
    float grad_queries[kHeadSize / 8][4] = {}, grad_keys[kHeadSize / 8][4] = {}, grad_values[kHeadSize / 8][4] = {};
    multiply<16 * kWarps>(grad_values, operand<Order::kColumns, kWeightRow>(tile.weights + first),
                          operand<Order::kRows, kRow>(tile.grads));
    multiply<16 * kWarps>(grad_keys, operand<Order::kColumns, kWeightRow>(tile.weight_grads + first),
                          operand<Order::kRows, kRow>(tile.queries));
    multiply<16 * kWarps>(grad_queries, operand<Order::kRows, kWeightRow>(tile.weight_grads + first * kWeightRow),
                          operand<Order::kRows, kRow>(tile.keys));
    if (cosine) {
      project(grad_queries, tile.queries, tile.query_norms);
      project(grad_keys, tile.keys, tile.key_norms);
    }
    __syncthreads();
    store_result<kRow>(tile.queries + first * kRow, grad_queries);
    store_result<kRow>(tile.keys + first * kRow, grad_keys);
    store_result<kRow>(tile.values + first * kRow, grad_values);
    __syncwarp();
    T* grad_qkv = args.grad_qkv + head * kHeadSize;
    store_rows(tile.queries, grad_qkv, 3 * channels, tile.key_tokens);
    store_rows(tile.keys, grad_qkv + channels, 3 * channels, tile.key_tokens);
    store_rows(tile.values, grad_qkv + 2 * channels, 3 * channels, tile.key_tokens);
    __syncthreads();
    if (!args.pad_partials) continue;
    store_padding(tile, tokens, args.pad_partials + int64_t(window) * 2 * channels + head * kHeadSize, channels);
    __syncthreads();
  }
  if (args.table_partials)
    store_table<kWarps>(table_sums, tokens, args.table_partials + int64_t(blockIdx.x) * tokens * tokens);
}

}  // namespace
}  // namespace simmim_fast::shifted_window_attention
