// Included inside one file per SIMD level, as vector.h.

#pragma once

#include <cstdint>
#include <new>

namespace simmim_fast::SIMMIM_FAST_LEVEL {

// Uninitialised memory on a cache line's boundary.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : data_(static_cast<T*>(::operator new(count * sizeof(T), kAlignment))) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { ::operator delete(data_, kAlignment); }
  T* get() const { return data_; }
  operator T*() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  T* data_;
};

}  // namespace simmim_fast::SIMMIM_FAST_LEVEL
