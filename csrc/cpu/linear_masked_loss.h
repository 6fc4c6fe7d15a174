// What the operator linear_masked_loss and the kernels of each SIMD level share: sizes, and the tokens with a masked
// pixel. Formulas: simmim_fast/ops/linear_masked_loss.

#pragma once

#include <cmath>
#include <utility>
#include <vector>

#include "cpu/simd.h"
#include "masked_loss.h"

namespace simmim_fast::linear_masked_loss {

// Sizes of a call: tokens (batch, height, width) of `depth` channels, each predicting stride x stride pixels.
struct Sizes {
  int64_t batch, height, width, depth;
  int64_t outputs, channels, stride;
  int64_t patch, mask_height, mask_width;
  int64_t slots;  // tokens of an image that have a row of slopes: all, or those listed
};

// A token that is computed.
struct Row {
  int64_t image, y, x;  // where
  int64_t token;        // row of features
  int64_t slot;         // row of slopes
  bool whole;           // all its pixels are masked
};

// How many of the pixels under a token are masked.
inline int64_t masked_pixels(const Sizes& sizes, const bool* mask, int64_t image, int64_t y, int64_t x) {
  const int64_t top = y * sizes.stride, left = x * sizes.stride, patch = sizes.patch;
  int64_t count = 0;
  for (int64_t row = top / patch; row * patch < top + sizes.stride; ++row) {
    const int64_t rows = std::min((row + 1) * patch, top + sizes.stride) - std::max(row * patch, top);
    const bool* cells = mask + (image * sizes.mask_height + row) * sizes.mask_width;
    for (int64_t cell = left / patch; cell * patch < left + sizes.stride; ++cell)
      if (cells[cell])
        count += rows * (std::min((cell + 1) * patch, left + sizes.stride) - std::max(cell * patch, left));
  }
  return count;
}

// The tokens to compute and the number of masked pixels: those of `tokens` (batch, slots), or all where it is null,
// without those that no masked pixel lies under.
inline std::pair<std::vector<Row>, int64_t> find_rows(const Sizes& sizes, const bool* mask, const int32_t* tokens) {
  std::vector<Row> rows;
  rows.reserve(sizes.batch * sizes.slots);
  int64_t found = 0, all = 0;
  const int64_t grid = sizes.height * sizes.width;
  for (int64_t image = 0; image < sizes.batch; ++image) {
    int64_t previous = -1;
    for (int64_t slot = 0; slot < sizes.slots; ++slot) {
      const int64_t token = tokens ? tokens[image * sizes.slots + slot] : slot;
      check(previous < token && token < grid, "tokens: expected ascending indices below ", grid, ", got ", token,
            " in image ", image);
      previous = token;
      const int64_t y = token / sizes.width, x = token % sizes.width, count = masked_pixels(sizes, mask, image, y, x);
      found += count;
      if (count > 0)
        rows.push_back(
            {image, y, x, image * grid + token, image * sizes.slots + slot, count == sizes.stride * sizes.stride});
    }
  }
  for (int64_t cell = 0; cell < sizes.batch * sizes.mask_height * sizes.mask_width; ++cell) all += mask[cell];
  all *= sizes.patch * sizes.patch;
  check(found == all, "tokens: expected all tokens with a masked pixel, but ", all - found,
        " masked pixels lie elsewhere");
  return {std::move(rows), all};
}

enum class Loss : int64_t { kL1, kL2, kSmoothL1 };

// Slopes are those of the loss at the prediction: int8 for L1, else of F.
template <typename F>
struct ForwardArgs {
  using Compute = Accumulator<F>;

  const Row* rows;
  int64_t row_count;
  const F* features;    // (batch, height, width, depth)
  const F* weight;      // (outputs, depth)
  const Compute* bias;  // (outputs)
  const void* target;   // (batch, channels, height stride, width stride) of bytes, or of Compute
  bool bytes;           // whether the target is
  const bool* mask;     // (batch, mask height, mask width)
  const Compute* mean;  // (channels) or null
  const Compute* std;   // (channels) or null
  void* slope;          // (batch, slots, outputs) or null
  Loss loss;
  Sizes sizes;
};

template <typename F>
struct BackwardArgs {
  const Row* rows;
  int64_t row_count;
  const F* features;  // (batch, height, width, depth)
  const F* weight;    // (outputs, depth)
  const void* slope;  // (batch, slots, outputs)
  Accumulator<F> factor;
  F* grad_features;  // like features, or null: rows of tokens that are not computed are left alone
  F* grad_weight;    // like weight, or null
  F* grad_bias;      // (outputs) or null
  Loss loss;
  Sizes sizes;
};

// They split their work among threads themselves.
template <typename F>
struct Kernels {
  double (*forward)(const ForwardArgs<F>& args);  // the sum of the losses of all masked pixels; fills the slopes
  void (*backward)(const BackwardArgs<F>& args);

  template <Simd kAt>
  static Kernels at();
};

inline Sizes check_sizes(const Tensor& features, const Tensor& weight, const Tensor& mask,
                         const std::optional<Tensor>& tokens, int64_t channels, int64_t patch) {
  check_rank(features, "features", 4);
  check_rank(weight, "weight", 2);
  check_rank(mask, "mask", 3);
  check_dtype(mask, "mask", ScalarType::Bool);
  check(patch > 0, "patch_size: expected a positive integer, got ", patch);
  check(channels > 0, "target: expected channels");
  Sizes sizes{};
  sizes.batch = features.size(0), sizes.height = features.size(1), sizes.width = features.size(2);
  sizes.depth = features.size(3), sizes.outputs = weight.size(0), sizes.channels = channels;
  sizes.patch = patch, sizes.mask_height = mask.size(1), sizes.mask_width = mask.size(2);
  sizes.stride = std::llround(std::sqrt(double(sizes.outputs / channels)));
  check(sizes.stride > 0 && sizes.stride * sizes.stride * channels == sizes.outputs,
        "weight: expected stride^2 x channels rows, got ", sizes.outputs);
  check_shape(weight, "weight", {sizes.outputs, sizes.depth});
  check_dtype(weight, "weight", features.scalar_type());
  check(mask.size(0) == sizes.batch && sizes.mask_height * patch == sizes.height * sizes.stride &&
            sizes.mask_width * patch == sizes.width * sizes.stride,
        "mask: expected an entry per patch of ", shape_text(features.sizes()), " tokens, got ",
        shape_text(mask.sizes()));
  sizes.slots = sizes.height * sizes.width;
  if (!tokens) return sizes;
  check_rank(*tokens, "tokens", 2);
  check_dtype(*tokens, "tokens", ScalarType::Int);
  sizes.slots = tokens->size(1);
  check_shape(*tokens, "tokens", {sizes.batch, sizes.slots});
  return sizes;
}

}  // namespace simmim_fast::linear_masked_loss
