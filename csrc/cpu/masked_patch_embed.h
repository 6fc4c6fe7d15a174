// What the operator masked_patch_embed and the kernels of each SIMD level share. Formulas:
// simmim_fast/ops/masked_patch_embed. A token is a patch of an image, P of them an image; a row is a visible token; D
// numbers of a patch, C channels of a token.

#pragma once

#include <vector>

#include "checks.h"
#include "cpu/simd.h"
#include "integers.h"

namespace simmim_fast::masked_patch_embed {

constexpr int64_t kChunkRows = 256;         // rows whose gradients of bias and norm one unit adds up
constexpr int64_t kChunkTokens = 256;       // tokens whose gradients of the mask token one unit adds up
constexpr int64_t kBlockChannels = 48;      // channels of the weight whose gradient is one unit
constexpr int64_t kGroupRows = 1024;        // rows of a group, whose gradients of the weight add up, at the least
constexpr int64_t kGroupNumbers = 1 << 21;  // numbers of the groups' gradients of the weight together, at the most

// How a SIMD level lays out operands.
struct Layout {
  int64_t lanes;          // numbers of a vector of sums
  int64_t panel;          // channels of a panel of the packed weight
  int64_t per;            // numbers of one operand
  int64_t operand_bytes;  // size of one operand
};

template <typename T>
struct Args {
  using Sum = Accumulator<T>;

  Layout layout;
  const void* image;       // (images, planes, grid_h * patch, grid_w * patch)
  ScalarType image_dtype;  // float of any kind, or bytes
  const Sum* scale;        // (planes) of bytes, or null
  const Sum* shift;        // (planes) what is added to scaled bytes, or null
  const bool* mask;        // (images, P)
  const Sum* weight;       // (C, D)
  void* packed;            // (panels, depth, panel) operands of the weight
  const Sum* bias;         // (channel_stride), 0 past the last channel, as the next two
  const Sum* norm_weight;  // or null
  const Sum* norm_bias;    // or null
  double eps;
  int64_t images, planes, grid_h, grid_w, patch, channels;

  int64_t positions() const { return grid_h * grid_w; }
  int64_t tokens() const { return images * positions(); }
  int64_t numbers() const { return planes * patch * patch; }
  int64_t depth() const { return ceil_div(numbers(), layout.per); }
  int64_t panels() const { return ceil_div(channels, layout.panel); }
  int64_t channel_stride() const { return panels() * layout.panel; }
  int64_t number_stride() const { return round_up(numbers(), layout.lanes * layout.per); }
};

template <typename T>
struct ForwardArgs : Args<T> {
  using Sum = Accumulator<T>;

  const Sum* mask_token;  // (channel_stride)
  const Sum* pos_embed;   // (P, C) or null
  void* out;              // (images, P, C)
  ScalarType out_dtype;
};

template <typename T>
struct BackwardArgs : Args<T> {
  using Sum = Accumulator<T>;

  const void* grad_out;  // (images, P, C)
  ScalarType grad_dtype;
  const int64_t* rows;  // (row_count) tokens
  int64_t row_count;
  void* pixels = nullptr;     // (row_stride, number_stride) numbers as operands of sums over rows, or null
  void* grad_rows = nullptr;  // (row_stride, channel_stride) likewise: gradients of the projection
  Sum* row_sums = nullptr;  // (row chunks, 3, channel_stride): gradients of bias, norm_weight and the token's embedding
  Sum* weight_sums = nullptr;  // (groups, C, number_stride)
  Sum* token_sums = nullptr;   // (token chunks, channel_stride) or null
  Sum* pos_sums = nullptr;     // (P, C) or null

  int64_t row_stride() const { return round_up(row_count, 2); }
  int64_t row_chunks() const { return ceil_div(row_count, kChunkRows); }
  int64_t blocks() const { return ceil_div(this->channels, kBlockChannels); }
  int64_t groups() const {
    const int64_t most = std::max<int64_t>(1, kGroupNumbers / (this->channels * this->number_stride()));
    return std::clamp<int64_t>(row_count / kGroupRows, 1, most);
  }
  int64_t group_rows() const { return round_up(ceil_div(row_count, groups()), kChunkRows); }
  // With gradients of the positions a chunk of tokens is some positions in all images, otherwise a run of tokens.
  int64_t chunk_images() const { return pos_sums ? this->images : 1; }
  int64_t chunk_positions() const { return std::max<int64_t>(1, kChunkTokens / std::max<int64_t>(1, chunk_images())); }
  int64_t image_tokens() const { return pos_sums ? this->positions() : this->tokens(); }
  int64_t token_chunks() const { return ceil_div(image_tokens(), chunk_positions()); }
};

template <typename T>
struct Kernels {
  Layout layout;
  void (*pack)(const Args<T>& args, int64_t begin, int64_t end);                     // panels [begin, end)
  void (*forward)(const ForwardArgs<T>& args, int64_t begin, int64_t end);           // tokens
  void (*backward_rows)(const BackwardArgs<T>& args, int64_t begin, int64_t end);    // chunks of rows
  void (*backward_weight)(const BackwardArgs<T>& args, int64_t begin, int64_t end);  // groups x blocks
  void (*backward_tokens)(const BackwardArgs<T>& args, int64_t begin, int64_t end);  // chunks of tokens

  template <Simd kAt>
  static Kernels at();
};

}  // namespace simmim_fast::masked_patch_embed
