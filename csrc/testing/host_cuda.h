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

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  uint3 index;
  bool done = false;
};

// Waits until `expected` threads have arrived.
struct Barrier {
  unsigned expected = 0, arrived = 0, generation = 0;
};

struct Warp {
  Barrier barrier;
  unsigned char values[warpSize][16];  // what each lane has handed in
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

 private:
  void start(unsigned i) {
    Fiber& fiber = *fibers_[i];
    fiber.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    fiber.done = false;
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

inline void launch(dim3 grid, dim3 block, const std::function<void()>& kernel) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  gridDim = grid;
  blockDim = block;
  uint64_t number = 0;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) Block::instance().run({x, y, z}, number++, kernel);
}

// Hands in `value` and returns what lane `from` of this warp has handed in.
template <typename T>
T exchange(const T& value, unsigned from) {
  static_assert(sizeof(T) <= 16);
  Block& block = Block::instance();
  Warp& warp = block.warp();
  std::memcpy(warp.values[block.lane()], &value, sizeof(T));
  block.sync_warp();
  T result;
  std::memcpy(&result, warp.values[from % warpSize], sizeof(T));
  block.sync_warp();
  return result;
}

inline void check_aligned(const void* pointer, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes) throw std::runtime_error("host_cuda: misaligned access");
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
