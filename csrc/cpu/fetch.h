// Cache lines that are fetched while something else is computed.
// Included inside one file per SIMD level, as vector.h.

#pragma once

#include "cpu/buffer.h"

namespace simmim_fast::SIMMIM_FAST_LEVEL {

constexpr int64_t kCacheLine = 64;

// What one kernel is to read and write soon. A product fetches one line a step (tile_product.h): asked for all at once,
// lines wait for each other, and loads that hit the cache wait behind them.
class FetchList {
 public:
  // For up to `lines` lines, of which a block of a product takes up to `steps` at a time.
  FetchList(int64_t lines, int64_t steps, const char* harmless)
      : steps_(steps), harmless_(harmless), lines_(lines + steps) {
    clear();
    finish();
  }

  void clear() { count_ = 0; }

  void add(const void* row, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += kCacheLine) lines_[count_++] = static_cast<const char*>(row) + at;
  }

  // After the last row.
  void finish() {
    for (int64_t i = 0; i < steps_; ++i) lines_[count_ + i] = harmless_;
  }

  // Starts again from the first line, each of them `bytes` further.
  void rewind(int64_t bytes) {
    next_ = 0;
    offset_ = bytes;
  }

  // The lines of the next `steps` steps.
  const char* const* take(int64_t steps) {
    const char* const* lines = lines_ + next_;
    next_ = next_ + steps < count_ ? next_ + steps : count_;
    return lines;
  }

  int64_t offset() const { return offset_; }

 private:
  int64_t steps_, count_ = 0, next_ = 0, offset_ = 0;
  const char* harmless_;
  Buffer<const char*> lines_;
};

}  // namespace simmim_fast::SIMMIM_FAST_LEVEL
