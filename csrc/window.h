// Index mathematics of shifted windows, shared by the CPU and the CUDA code.
// A slot is a token's place in its window, row by row. The grid is padded at the bottom and right to whole windows,
// rolled up and left by the shift, then cut into windows, row by row.

#pragma once

#include "integers.h"

namespace simmim_fast {

struct WindowGrid {
  int height, width;       // tokens before padding
  int window_h, window_w;  // tokens
  int shift_h, shift_w;    // 0 <= shift < window

  SIMMIM_FAST_HOST_DEVICE int tokens() const { return window_h * window_w; }  // of a window
  SIMMIM_FAST_HOST_DEVICE int rows() const { return (height + window_h - 1) / window_h; }
  SIMMIM_FAST_HOST_DEVICE int columns() const { return (width + window_w - 1) / window_w; }
  SIMMIM_FAST_HOST_DEVICE int windows() const { return rows() * columns(); }
  SIMMIM_FAST_HOST_DEVICE int padded_h() const { return rows() * window_h; }
  SIMMIM_FAST_HOST_DEVICE int padded_w() const { return columns() * window_w; }
  SIMMIM_FAST_HOST_DEVICE bool is_padded() const { return padded_h() != height || padded_w() != width; }
  SIMMIM_FAST_HOST_DEVICE int table_rows() const { return (2 * window_h - 1) * (2 * window_w - 1); }

  // Token y * width + x that a slot holds, or -1 for padding.
  SIMMIM_FAST_HOST_DEVICE int64_t token(int window, int slot) const {
    const int y = unroll(rolled_y(window, slot), shift_h, padded_h());
    const int x = unroll(rolled_x(window, slot), shift_w, padded_w());
    return y < height && x < width ? int64_t(y) * width + x : -1;
  }

  // Slot of a token, where the grid is one window.
  SIMMIM_FAST_HOST_DEVICE int slot(int token) const {
    const int y = unroll(token / width, window_h - shift_h, window_h);
    const int x = unroll(token % width, window_w - shift_w, window_w);
    return y * window_w + x;
  }

  // Slots of one window attend to each other freely where their regions, 0 to 8, are equal.
  SIMMIM_FAST_HOST_DEVICE int region(int window, int slot) const {
    return 3 * band(rolled_y(window, slot), window_h, shift_h, padded_h()) +
           band(rolled_x(window, slot), window_w, shift_w, padded_w());
  }

  // Whether a window holds several regions: it lies at the border that the roll has joined to the opposite one.
  SIMMIM_FAST_HOST_DEVICE bool has_regions(int window) const {
    return (shift_h && window / columns() == rows() - 1) || (shift_w && window % columns() == columns() - 1);
  }

  // Row of the bias table for a query and a key, both slots.
  SIMMIM_FAST_HOST_DEVICE int table_row(int query, int key) const {
    const int dy = query / window_w - key / window_w, dx = query % window_w - key % window_w;
    return (dy + window_h - 1) * (2 * window_w - 1) + dx + window_w - 1;
  }

 private:
  SIMMIM_FAST_HOST_DEVICE int rolled_y(int window, int slot) const {
    return window / columns() * window_h + slot / window_w;
  }
  SIMMIM_FAST_HOST_DEVICE int rolled_x(int window, int slot) const {
    return window % columns() * window_w + slot % window_w;
  }
  SIMMIM_FAST_HOST_DEVICE static int unroll(int at, int shift, int size) {
    return at + shift < size ? at + shift : at + shift - size;
  }
  SIMMIM_FAST_HOST_DEVICE static int band(int at, int window, int shift, int size) {
    return shift ? (at >= size - window) + (at >= size - shift) : 0;
  }
};

}  // namespace simmim_fast
