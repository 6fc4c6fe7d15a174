// One head of one window in shared memory: fetching its rows, the softmax of its logits, storing its rows.
// A block has a warp for every 16 slots; warp w computes rows 16 w to 16 w + 15 of each result.
// Shapes: N slots hold a token or padding, D = 32 channels a head, C = heads * D; README.md of the op has the formulas.

#pragma once

#include "cuda/mma.cuh"
#include "window.h"

namespace simmim_fast::shifted_window_attention {

constexpr int kHeadSize = 32;
constexpr int kMaxTokens = 64;
constexpr float kMaxLogitScale = 4.605170185988092f;  // log 100
constexpr float kSmallestNorm = 1e-12f;
constexpr float kBetweenRegions = -100;
constexpr float kLog2E = 1.4426950408889634f;
constexpr int64_t kPaddingToken = -1, kNoToken = -2;

// A tensor of the caller's in any floating dtype, or none.
struct Parameter {
  const void* data = nullptr;
  ScalarType dtype = ScalarType::Float;

  __device__ float at(int64_t i) const {
    if (dtype == ScalarType::Float) return static_cast<const float*>(data)[i];
    if (dtype == ScalarType::BFloat16) return static_cast<const BFloat16*>(data)[i];
    if (dtype == ScalarType::Half) return static_cast<const Half*>(data)[i];
    return static_cast<float>(static_cast<const double*>(data)[i]);
  }
};

template <typename T>
struct Args {
  WindowGrid grid;
  const T* qkv;            // (images, height * width, 3 C)
  Parameter pad_value;     // (3 C)
  Parameter logit_scale;   // (heads); where it is given, queries and keys are normalised
  const int32_t* queries;  // (images, rows) where they are chosen
  const float* bias;       // (kinds, heads, side * side) as bias_row has it, -inf for keys that are none
  int side;
  int heads;
  int rows;           // queries of a window
  bool chosen;        // whether they are some of the slots, not all
  int block_windows;  // windows, one after the other, of a block
  uint32_t windows;   // of all images
  float scale;

  __device__ int64_t channels() const { return int64_t(heads) * kHeadSize; }
  __device__ float factor(int head) const {
    return logit_scale.data ? expf(min(logit_scale.at(head), kMaxLogitScale)) : scale;
  }
};

template <typename T>
struct ForwardArgs : Args<T> {
  T* out;  // (images, height * width or rows, C)
};

// Partial sums are null where they are not wanted.
template <typename T>
struct BackwardArgs : Args<T> {
  const T* grad_out;      // as out
  T* grad_qkv;            // as qkv
  float* table_partials;  // (blocks of windows, heads, N, N)
  float* scale_partials;  // (windows, heads)
  float* pad_partials;    // (windows, 2, C): of k and v
};

// Rows of head size, and rows of a value for every slot, as they lie in shared memory.
template <typename T>
constexpr int kRowStride = kHeadSize + kPadding<T>;
template <typename T, int kWarps>
constexpr int kWeightStride = 16 * kWarps + kPadding<T>;

// In the cosine form queries and keys x are kept as x 2^-e, whose norm lies between 1 and 2: gradients are multiplied
// by the inverse of the norm, which fp16 could not hold for every x.
template <int kSlots>
struct Norms {
  float inverse[kSlots];  // 1 / max(|x| 2^-e, 1e-12 2^-e)
  float power[kSlots];    // 2^-e, or 0 where |x| < 1e-12: the gradient of such a row is 0
};

template <typename T, int kWarps>
struct WindowTile {
  static constexpr int kSlots = 16 * kWarps;

  alignas(16) T queries[kSlots * kRowStride<T>];
  alignas(16) T keys[kSlots * kRowStride<T>];
  alignas(16) T values[kSlots * kRowStride<T>];
  alignas(16) T padding[3 * kHeadSize];  // q, k and v of a padding token
  alignas(16) Norms<kSlots> query_norms;
  alignas(16) Norms<kSlots> key_norms;
  int64_t query_tokens[kSlots], key_tokens[kSlots];  // rows of qkv, kPaddingToken or kNoToken
  int64_t out_rows[kSlots];                          // rows of out, or kNoToken
  int query_slots[kSlots], regions[kSlots];
};

// Half types keep the weights in registers.
template <typename T, int kWarps>
struct ForwardTile : WindowTile<T, kWarps> {};

template <int kWarps>
struct ForwardTile<float, kWarps> : WindowTile<float, kWarps> {
  alignas(16) float weights[16 * kWarps * kWeightStride<float, kWarps>];
};

template <typename T, int kWarps>
struct GradientTile : WindowTile<T, kWarps> {
  using Base = WindowTile<T, kWarps>;

  alignas(16) T grads[Base::kSlots * kRowStride<T>];  // of out
  alignas(16) T weights[Base::kSlots * kWeightStride<T, kWarps>];
  alignas(16) T weight_grads[Base::kSlots * kWeightStride<T, kWarps>];  // of the products of queries and keys
  float scale_sums[kWarps];
};

// Where the rows of a window come from, and where results go, every slot being a query. One thread: one slot.
template <typename T, int kWarps>
__device__ void place_slots(const Args<T>& args, uint32_t image, int window, WindowTile<T, kWarps>& tile) {
  const int slot = threadIdx.x;
  if (slot >= tile.kSlots) return;
  const WindowGrid& grid = args.grid;
  const bool exists = slot < grid.tokens();
  int64_t token = exists ? grid.token(window, slot) : kNoToken;
  if (token >= 0) token += int64_t(image) * grid.height * grid.width;
  tile.key_tokens[slot] = tile.query_tokens[slot] = token;
  tile.out_rows[slot] = token < 0 || args.chosen ? kNoToken : token;
  tile.query_slots[slot] = slot;
}

template <typename T, int kWarps>
__device__ void place_regions(const Args<T>& args, int window, WindowTile<T, kWarps>& tile) {
  const int slot = threadIdx.x;
  if (slot < tile.kSlots) tile.regions[slot] = slot < args.grid.tokens() ? args.grid.region(window, slot) : 0;
}

template <typename T, int kWarps>
__device__ void place_padding(const Args<T>& args, int head, WindowTile<T, kWarps>& tile) {
  for (int i = threadIdx.x; i < 3 * kHeadSize; i += 32 * kWarps) {
    const int64_t channel = i / kHeadSize * args.channels() + head * kHeadSize + i % kHeadSize;
    tile.padding[i] = T(args.pad_value.at(channel));
  }
}

// Biases of a query and keys 8 j + 2 t + i lie at 128 j + 4 t + i of its row, so that rows g and g + 8 of all lanes are
// 512 neighbouring bytes.
template <int kWarps>
__device__ __forceinline__ int bias_row(int query) {
  return query / 16 * (256 * kWarps) + query % 8 * 16 + query % 16 / 8 * 2;
}

// The chosen queries instead of all, in their order. The same thread as in place_slots.
template <typename T, int kWarps>
__device__ void choose_queries(const Args<T>& args, uint32_t image, WindowTile<T, kWarps>& tile) {
  const int row = threadIdx.x, tokens = args.grid.height * args.grid.width;
  if (row >= tile.kSlots) return;
  const int64_t out_row = int64_t(image) * args.rows + row;
  const int token = row < args.rows ? args.queries[out_row] : -1;
  const bool exists = token >= 0 && token < tokens;
  tile.query_tokens[row] = exists ? int64_t(image) * tokens + token : kNoToken;
  tile.out_rows[row] = row < args.rows ? out_row : kNoToken;
  tile.query_slots[row] = exists ? args.grid.slot(token) : 0;
}

// Results that belong to the slots of the chosen queries. To be called by all threads.
template <typename T, int kWarps>
__device__ void place_results(const Args<T>& args, uint32_t image, WindowTile<T, kWarps>& tile) {
  const int row = threadIdx.x, tokens = args.grid.height * args.grid.width;
  __syncthreads();
  if (row >= args.rows) return;
  const int64_t out_row = int64_t(image) * args.rows + row;
  const int token = args.queries[out_row];
  if (token >= 0 && token < tokens) tile.out_rows[args.grid.slot(token)] = out_row;
}

// The 16-byte pieces of a window's rows that one thread takes; neighbouring lanes share a row.
template <typename T, int kWarps>
struct Pieces {
  static constexpr int kValues = 16 / sizeof(T);
  static constexpr int kOfRow = kHeadSize / kValues;
  static constexpr int kCount = kOfRow / 2;

  __device__ static int row(int i) { return (i * 32 * kWarps + int(threadIdx.x)) / kOfRow; }
  __device__ static int channel() { return threadIdx.x % kOfRow * kValues; }
  __device__ static int at(int i) { return row(i) * kRowStride<T> + channel(); }
};

// Begins to copy rows that are `stride` apart; what is no token is 0.
template <typename T, int kWarps>
__device__ __forceinline__ void fetch_rows(T* to, const T* from, int64_t stride, const int64_t* tokens) {
  using Mine = Pieces<T, kWarps>;
#pragma unroll
  for (int i = 0; i < Mine::kCount; ++i) {
    const int64_t token = tokens[Mine::row(i)];
    copy_async(to + Mine::at(i), from + max(token, int64_t(0)) * stride + Mine::channel(), token >= 0);
  }
}

// Puts the padding where it belongs, after the thread's copies.
template <typename T, int kWarps>
__device__ __forceinline__ void pad_rows(T* rows, const T* padding, const int64_t* tokens) {
  using Mine = Pieces<T, kWarps>;
#pragma unroll
  for (int i = 0; i < Mine::kCount; ++i)
    if (tokens[Mine::row(i)] == kPaddingToken)
      store(rows + Mine::at(i), load<Mine::kValues>(padding + Mine::channel()));
}

// Multiplies every row by a power of two, which leaves its digits, and notes its norm; after the thread's copies.
template <typename T, int kWarps>
__device__ __forceinline__ void normalise(T* rows, Norms<16 * kWarps>& norms) {
  using Mine = Pieces<T, kWarps>;
#pragma unroll
  for (int i = 0; i < Mine::kCount; ++i) {
    Vector<T, Mine::kValues> piece = load<Mine::kValues>(rows + Mine::at(i));
    float sum = 0;
#pragma unroll
    for (int c = 0; c < Mine::kValues; ++c) sum += float(piece.values[c]) * float(piece.values[c]);
#pragma unroll
    for (int other = 1; other < Mine::kOfRow; other *= 2) sum += __shfl_xor_sync(kFullWarp, sum, other);
    const float norm = sqrtf(sum), divisor = max(norm, kSmallestNorm), power = ldexpf(1.0f, -ilogbf(divisor));
#pragma unroll
    for (int c = 0; c < Mine::kValues; ++c) piece.values[c] = T(float(piece.values[c]) * power);
    store(rows + Mine::at(i), piece);
    if (Mine::channel() > 0) continue;
    norms.inverse[Mine::row(i)] = 1 / (divisor * power);
    norms.power[Mine::row(i)] = norm < kSmallestNorm ? 0 : power;
  }
}

// Begins to copy a head's queries, keys and values where their places are known.
template <typename T, int kWarps>
__device__ __forceinline__ void fetch_window(const Args<T>& args, int head, WindowTile<T, kWarps>& tile) {
  const int64_t channels = args.channels();
  const T* from = args.qkv + head * kHeadSize;
  fetch_rows<T, kWarps>(tile.queries, from, 3 * channels, tile.query_tokens);
  fetch_rows<T, kWarps>(tile.keys, from + channels, 3 * channels, tile.key_tokens);
  fetch_rows<T, kWarps>(tile.values, from + 2 * channels, 3 * channels, tile.key_tokens);
}

// Waits for this thread's copies and makes operands of them.
template <typename T, int kWarps>
__device__ __forceinline__ void finish_window(const Args<T>& args, WindowTile<T, kWarps>& tile) {
  wait_for_copies();
  if (args.pad_value.data) {
    pad_rows<T, kWarps>(tile.queries, tile.padding, tile.query_tokens);
    pad_rows<T, kWarps>(tile.keys, tile.padding + kHeadSize, tile.key_tokens);
    pad_rows<T, kWarps>(tile.values, tile.padding + 2 * kHeadSize, tile.key_tokens);
  }
  if (!args.logit_scale.data) return;
  normalise<T, kWarps>(tile.queries, tile.query_norms);
  normalise<T, kWarps>(tile.keys, tile.key_norms);
}

// Values for pairs of queries and keys times what their product is multiplied with in the cosine form.
template <typename T, int kWarps>
__device__ __forceinline__ void scale_by_norms(float (&values)[2 * kWarps][4], const WindowTile<T, kWarps>& tile,
                                               float factor) {
  const int row = threadIdx.x / 32 * 16 + lane() / 4;
  const float row_factors[2] = {factor * tile.query_norms.inverse[row], factor * tile.query_norms.inverse[row + 8]};
#pragma unroll
  for (int j = 0; j < 2 * kWarps; ++j) {
    const Vector<float, 2> key_factors = load<2>(tile.key_norms.inverse + 8 * j + lane() % 4 * 2);
#pragma unroll
    for (int i = 0; i < 4; ++i) values[j][i] *= row_factors[i / 2] * key_factors.values[i % 2];
  }
}

// factor * products (16, slots) of queries and keys -> exp(logit - the row's maximum), and 1 / their sum by row. The
// mask of the shift is in the bias, or comes from the regions.
template <bool kRegions, typename T, int kWarps>
__device__ __forceinline__ void softmax(float (&products)[2 * kWarps][4], float (&inverse_sums)[2],
                                        const WindowTile<T, kWarps>& tile, const float* bias, float factor) {
  const int t = lane() % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int slot = tile.query_slots[threadIdx.x / 32 * 16 + lane() / 4 + 8 * half];
    const float* biases = bias + bias_row<kWarps>(slot) + 4 * t;
    float largest = -INFINITY, sum = 0;
#pragma unroll
    for (int j = 0; j < 2 * kWarps; ++j) {
      const Vector<float, 2> pair = load<2>(biases + 128 * j);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& logit = products[j][2 * half + i];
        logit = logit * factor + pair.values[i];
        if (kRegions && tile.regions[slot] != tile.regions[8 * j + 2 * t + i]) logit += kBetweenRegions;
        largest = max(largest, logit);
      }
    }
    const float offset = max_over_row(largest) * kLog2E;
#pragma unroll
    for (int j = 0; j < 2 * kWarps; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& logit = products[j][2 * half + i];
        logit = power_of_two(logit * kLog2E - offset);
        sum += logit;
      }
    }
    inverse_sums[half] = 1 / sum_over_row(sum);
  }
}

// Stores the warp's 16 rows from shared memory, 16 bytes at a time, to the places that are one.
template <typename T>
__device__ __forceinline__ void store_rows(const T* from, T* to, int64_t stride, const int64_t* places) {
  constexpr int kValues = 16 / sizeof(T), kPieces = kHeadSize / kValues;
  const int first = threadIdx.x / 32 * 16, channel = lane() % kPieces * kValues;
#pragma unroll
  for (int i = 0; i < kPieces / 2; ++i) {
    const int row = first + (32 * i + lane()) / kPieces;
    const int64_t place = places[row];
    if (place >= 0) store(to + place * stride + channel, load<kValues>(from + row * kRowStride<T> + channel));
  }
}

}  // namespace simmim_fast::shifted_window_attention
