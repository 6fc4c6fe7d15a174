// How much work is worth a thread.

#pragma once

#include <algorithm>
#include <cstdint>

namespace simmim_fast {

// Steps of so many elements that one thread takes at the least.
inline int64_t grain(int64_t elements_per_step) {
  constexpr int64_t kElements = 32768;
  return std::max<int64_t>(1, kElements / std::max<int64_t>(1, elements_per_step));
}

}  // namespace simmim_fast
