// A tile of visible patches: gathered from the image, projected and normalised.
// Included inside one file per SIMD level, as vector.h.

#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/masked_patch_embed.h"
#include "cpu/operands.h"
#include "cpu/vector_rows.h"

namespace simmim_fast::SIMMIM_FAST_LEVEL {
namespace {

using masked_patch_embed::Args;

constexpr int64_t kTileRows = 48;
template <typename Sum>
constexpr int64_t kPanel = (kRegisters == 32 ? 4 : 3) * kLanes<Sum>;  // channels

// Calls f(Type<T>) for a dtype that is summed in Sum.
template <typename Sum, typename F>
void with_dtype(ScalarType dtype, F&& f) {
  dispatch_floating(dtype, [&](auto type) {
    if constexpr (std::is_same_v<Accumulator<typename decltype(type)::type>, Sum>) f(type);
  });
}

template <class Math, typename T>
class Rows {
 public:
  using Sum = typename Math::Sum;
  using Operand = typename Math::Operand;

  explicit Rows(const Args<T>& args) : args_(args) {
    std::fill_n(pixels.get(), kTileRows * args.number_stride(), Sum(0));
    std::fill_n(results.get(), kTileRows * args.channel_stride(), Sum(0));
  }

  // pixels: those of each patch.
  void gather(const int64_t* tokens, int64_t count) {
    if (args_.image_dtype == ScalarType::Byte) return gather_from<uint8_t>(tokens, count);
    dispatch_floating(args_.image_dtype, [&](auto type) { gather_from<typename decltype(type)::type>(tokens, count); });
  }

  // pixels, and results: weight patch + bias of each.
  void project(const int64_t* tokens, int64_t count) {
    gather(tokens, count);
    const int64_t stride = args_.number_stride(), depth = args_.depth(), channel_stride = args_.channel_stride();
    const Operand* patches = Operands<Math>::sum_over_columns(pixels, count, stride, nullptr, operands_);
    for (int64_t panel = 0; panel < args_.panels(); ++panel) {
      const Operand* weight = static_cast<const Operand*>(args_.packed) + panel * depth * kPanel<Sum>;
      const int64_t channels = std::min(kPanel<Sum>, args_.channels - panel * kPanel<Sum>);
      multiply<Math, false, 0>({patches, stride / Math::kPer, weight, kPanel<Sum>, results + panel * kPanel<Sum>,
                                channel_stride, count, ceil_div(channels, kLanes<Sum>), depth});
    }
    for (int64_t r = 0; r < count; ++r) {
      Sum* row = results + r * channel_stride;
      for (int64_t c = 0; c < args_.channels; c += kLanes<Sum>) store(row + c, load(row + c) + load(args_.bias + c));
    }
  }

  // In place: (row - mean) / deviation, 0 past the last channel, then scaled and shifted if asked to. Returns 1 /
  // deviation.
  Sum normalise(Sum* row, bool affine) const {
    const int64_t channels = args_.channels, whole = channels / kLanes<Sum> * kLanes<Sum>;
    Vec<Sum> sum = {}, squares = {};
    for (int64_t c = 0; c < channels; c += kLanes<Sum>) sum += load(row + c);
    const Sum mean = sum_lanes<Sum>(sum) / Sum(channels);
    for (int64_t c = 0; c < channels; c += kLanes<Sum>) {
      Vec<Sum> centred = load(row + c) - mean;
      if (c == whole)
        for (int64_t lane = channels - whole; lane < kLanes<Sum>; ++lane) centred[lane] = 0;
      squares += centred * centred;
      store(row + c, centred);
    }
    const Sum inverse = 1 / std::sqrt(sum_lanes<Sum>(squares) / Sum(channels) + Sum(args_.eps));
    for (int64_t c = 0; c < channels; c += kLanes<Sum>) {
      const Vec<Sum> normed = load(row + c) * inverse;
      store(row + c, affine ? normed * load(args_.norm_weight + c) + load(args_.norm_bias + c) : normed);
    }
    return inverse;
  }

 private:
  template <typename Pixel>
  void gather_from(const int64_t* tokens, int64_t count) {
    if (args_.patch == 4) return gather_patches<Pixel, 4>(tokens, count);
    if (args_.patch == 16) return gather_patches<Pixel, 16>(tokens, count);
    gather_patches<Pixel, 0>(tokens, count);
  }

  // kPatch is the patch's side where it is known when compiling, else 0.
  template <typename Pixel, int64_t kPatch>
  void gather_patches(const int64_t* tokens, int64_t count) {
    const int64_t patch = kPatch ? kPatch : args_.patch, width = args_.grid_w * patch, height = args_.grid_h * patch;
    for (int64_t r = 0; r < count; ++r) {
      const int64_t image = tokens[r] / args_.positions(), position = tokens[r] % args_.positions();
      const int64_t corner = position / args_.grid_w * patch * width + position % args_.grid_w * patch;
      Sum* to = pixels + r * args_.number_stride();
      for (int64_t plane = 0; plane < args_.planes; ++plane) {
        const int64_t first = (image * args_.planes + plane) * height * width + corner;
        const Pixel* from = static_cast<const Pixel*>(args_.image) + first;
        for (int64_t y = 0; y < patch; ++y, from += width, to += patch)
          for (int64_t x = 0; x < patch; ++x) to[x] = Sum(from[x]);
        if (!args_.scale) continue;
        for (Sum* pixel = to - patch * patch; pixel < to; ++pixel)
          *pixel = *pixel * args_.scale[plane] + args_.shift[plane];
      }
    }
  }

  const Args<T>& args_;

 public:
  Buffer<Sum> pixels{kTileRows * args_.number_stride()};
  Buffer<Sum> results{kTileRows * args_.channel_stride()};

 private:
  Buffer<Operand> operands_{kTileRows * args_.number_stride() / Math::kPer};
};

}  // namespace
}  // namespace simmim_fast::SIMMIM_FAST_LEVEL
