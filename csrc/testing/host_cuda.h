// Enough of CUDA C++ to run a kernel on the CPU, block after block, for tests on machines without a GPU.
//
// The threads of a block are fibers of one host thread: __syncthreads and the warp functions switch to the next fiber
// until all have arrived. Fibers instead of host threads with std::barrier because a switch takes well under a
// microsecond, and because the order is ours: from barrier to barrier, and from block to block, the threads run upwards
// and downwards in turn, so that a forgotten barrier shows the same way each time. `__shared__` is `static`, which is
// why one launch runs at a time. Warp functions take the full mask only; all of them, and an emulation of mma.sync, are
// built on exchange().

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

using std::max;
using std::min;

namespace host_cuda {

constexpr size_t kStackBytes = 64 * 1024;

struct Copy {
  void* to;
  unsigned char values[16];
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  uint3 index;
  bool done = false;
  std::vector<Copy> copies;  // begun and not waited for
};

// Waits until `expected` threads have arrived.
struct Barrier {
  unsigned expected = 0, arrived = 0, generation = 0;
};

struct Warp {
  Barrier barrier;
  unsigned char values[warpSize][32];  // what each lane has handed in
};

class Block {
 public:
  static Block& instance() {
    static Block block;
    return block;
  }

  // Runs `kernel` once per thread of block number `number`.
  void run(uint3 index, uint64_t number, const std::function<void()>& kernel) {
    const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
    while (fibers_.size() < threads) fibers_.push_back(std::make_unique<Fiber>());
    kernel_ = &kernel;
    blockIdx = index;
    barrier_ = {threads};
    warps_.assign((threads + warpSize - 1) / warpSize, {});
    for (unsigned i = 0; i < threads; ++i) start(i);
    alive_ = threads;
    for (uint64_t pass = number; alive_ > 0; ++pass) {
      progress_ = false;
      for (unsigned i = 0; i < threads; ++i) resume(pass % 2 ? threads - 1 - i : i);
      if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
      if (!progress_) throw std::runtime_error("host_cuda: deadlock, threads wait at different barriers");
    }
  }

  void sync() { wait(barrier_); }
  void sync_warp() { wait(warp().barrier); }
  Warp& warp() { return warps_[current_ / warpSize]; }
  unsigned lane() const { return current_ % warpSize; }
  std::vector<Copy>& copies() { return fibers_[current_]->copies; }

 private:
  void start(unsigned i) {
    Fiber& fiber = *fibers_[i];
    fiber.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    fiber.done = false;
    fiber.copies.clear();
    ++warps_[i / warpSize].barrier.expected;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = &scheduler_;
    makecontext(&fiber.context, &Block::enter, 0);
  }

  static void enter() {
    Block& block = instance();
    try {
      (*block.kernel_)();
    } catch (...) {
      block.error_ = std::current_exception();
    }
    block.fibers_[block.current_]->done = true;
    --block.alive_;
    leave(block.barrier_);
    leave(block.warp().barrier);
    block.progress_ = true;
  }

  void resume(unsigned i) {
    if (fibers_[i]->done) return;
    current_ = i;
    threadIdx = fibers_[i]->index;
    swapcontext(&scheduler_, &fibers_[i]->context);
  }

  void wait(Barrier& barrier) {
    const unsigned generation = barrier.generation;
    progress_ = true;
    ++barrier.arrived;
    release_if_complete(barrier);
    do {
      swapcontext(&fibers_[current_]->context, &scheduler_);
    } while (barrier.generation == generation);
  }

  // A thread that has returned is not waited for.
  static void leave(Barrier& barrier) {
    --barrier.expected;
    release_if_complete(barrier);
  }

  static void release_if_complete(Barrier& barrier) {
    if (barrier.arrived < barrier.expected || barrier.arrived == 0) return;
    barrier.arrived = 0;
    ++barrier.generation;
  }

  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Warp> warps_;
  Barrier barrier_;
  ucontext_t scheduler_;
  const std::function<void()>* kernel_ = nullptr;
  std::exception_ptr error_;
  unsigned current_ = 0, alive_ = 0;
  bool progress_ = false;
};

// What `extern __shared__` names in CUDA: as long as the launch asks for, and at first NaN in every floating dtype.
inline std::vector<std::max_align_t> dynamic_shared;

inline void launch(dim3 grid, dim3 block, const std::function<void()>& kernel, size_t shared_bytes = 0) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  dynamic_shared.resize((shared_bytes + sizeof(std::max_align_t) - 1) / sizeof(std::max_align_t));
  std::memset(dynamic_shared.data(), 0xff, dynamic_shared.size() * sizeof(std::max_align_t));
  gridDim = grid;
  blockDim = block;
  uint64_t number = 0;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) Block::instance().run({x, y, z}, number++, kernel);
}

// Hands in `value` and returns what each lane of this warp has handed in.
template <typename T>
std::array<T, warpSize> exchange(const T& value) {
  static_assert(sizeof(T) <= sizeof(Warp::values[0]));
  Block& block = Block::instance();
  Warp& warp = block.warp();
  std::memcpy(warp.values[block.lane()], &value, sizeof(T));
  block.sync_warp();
  std::array<T, warpSize> result;
  for (int lane = 0; lane < warpSize; ++lane) std::memcpy(&result[lane], warp.values[lane], sizeof(T));
  block.sync_warp();
  return result;
}

inline void check_aligned(const void* pointer, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) throw std::runtime_error("host_cuda: misaligned access");
}

// Hands in `value` and returns what lane `from` of this warp has handed in.
template <typename T>
T exchange(const T& value, unsigned from) {
  return exchange(value)[from % warpSize];
}

// cp.async of 16 bytes, or of zeros. Until this thread waits for its copies there are NaN in every floating dtype.
inline void copy_async(void* to, const void* from, bool exists) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0)
    throw std::runtime_error("host_cuda: cp.async takes aligned addresses");
  Copy copy{to, {}};
  if (exists) std::memcpy(copy.values, from, sizeof(copy.values));
  std::memset(to, 0xff, sizeof(copy.values));
  Block::instance().copies().push_back(copy);
}

inline void wait_for_copies() {
  for (const Copy& copy : Block::instance().copies()) std::memcpy(copy.to, copy.values, sizeof(copy.values));
  Block::instance().copies().clear();
}

// ldmatrix.x4 of 16-bit values: lane 8 i + r names row r (16 bytes) of matrix i; lane 4 g + t gets row g, columns 2 t
// and 2 t + 1, of each matrix or of its transpose.
inline void load_matrices(uint32_t (&to)[4], const void* row, bool transposed) {
  check_aligned(row, 16);
  const std::array<const void*, warpSize> rows = exchange(row);
  const unsigned g = Block::instance().lane() / 4, t = Block::instance().lane() % 4;
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t pair[2];
    for (unsigned i = 0; i < 2; ++i) {
      const unsigned at_row = transposed ? 2 * t + i : g, column = transposed ? g : 2 * t + i;
      std::memcpy(&pair[i], static_cast<const uint16_t*>(rows[8 * matrix + at_row]) + column, sizeof(uint16_t));
    }
    std::memcpy(&to[matrix], pair, sizeof(pair));
  }
}

// mma.sync.m16n8k16 of 16-bit T with float sums: sum (16, 8) += a (16, 16) b (16, 8), k upwards. Lane 4 g + t hands in
// of a: rows g and g + 8, columns 2 t, 2 t + 1 and 2 t + 8, 2 t + 9; of b: the same as rows, of column g; and has of
// sum: rows g and g + 8, columns 2 t and 2 t + 1.
template <typename T>
void mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Fragments {
    T a[8], b[4];
  } mine;
  static_assert(sizeof(T) == 2);
  std::memcpy(mine.a, a, sizeof(mine.a));
  std::memcpy(mine.b, &b0, sizeof(b0));
  std::memcpy(mine.b + 2, &b1, sizeof(b1));
  const std::array<Fragments, warpSize> all = exchange(mine);
  const unsigned g = Block::instance().lane() / 4, t = Block::instance().lane() % 4;
  for (unsigned k = 0; k < 16; ++k)
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned from = k % 8 / 2, column = 2 * t + i % 2;
      const T left = all[4 * g + from].a[k / 8 * 4 + i / 2 * 2 + k % 2];
      const T right = all[4 * column + from].b[k / 8 * 2 + k % 2];
      sum[i] += float(left) * float(right);
    }
}

inline void check_full(unsigned mask) {
  if (mask != 0xffffffffu) throw std::runtime_error("host_cuda: warp functions take the full mask only");
}

}  // namespace host_cuda

inline void __syncthreads() { host_cuda::Block::instance().sync(); }

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  host_cuda::check_full(mask);
  host_cuda::Block::instance().sync_warp();
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  host_cuda::check_full(mask);
  return host_cuda::exchange(value, lane);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  return __shfl_sync(mask, value, host_cuda::Block::instance().lane() ^ lane_mask);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  const unsigned lane = host_cuda::Block::instance().lane();
  return __shfl_sync(mask, value, lane + delta < warpSize ? lane + delta : lane);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
  const unsigned lane = host_cuda::Block::instance().lane();
  return __shfl_sync(mask, value, lane >= delta ? lane - delta : lane);
}

template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}
