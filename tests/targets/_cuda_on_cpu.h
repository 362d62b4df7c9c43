// Stands in for CUDA's C++ where kernels run on the processor: each thread of a block is a fiber, blocks run one by one.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>
#include <vector>

#define CUDART_INF_F __builtin_inff()
#define CUDART_NAN_F __builtin_nanf("")
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct Triple {
  int x, y, z;
};
static Triple threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

enum State { kReady, kAtBlock, kAtWarp, kDone };

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  Triple index;
  State state;
  uint64_t slot;
};

static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static size_t current;
static const std::function<void()>* body;

inline void Wait(State state) {
  Fiber& fiber = fibers[current];
  fiber.state = state;
  swapcontext(&fiber.context, &scheduler);
}

inline void Enter() {
  (*body)();
  fibers[current].state = kDone;
}

inline bool Release(size_t first, size_t last, State at, State beside) {
  size_t waiting = 0;
  for (size_t k = first; k < last; ++k) {
    if (fibers[k].state == at) {
      ++waiting;
    } else if (fibers[k].state != kDone && fibers[k].state != beside) {
      return false;
    }
  }
  for (size_t k = first; k < last; ++k) {
    if (fibers[k].state == at) fibers[k].state = kReady;
  }
  return waiting > 0;
}

inline void RunBlock(size_t threads) {
  for (size_t k = 0; k < threads; ++k) {
    Fiber& fiber = fibers[k];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, reinterpret_cast<void (*)()>(Enter), 0);
    fiber.state = kReady;
    int number = static_cast<int>(k);
    fiber.index = {number % blockDim.x, number / blockDim.x % blockDim.y, number / blockDim.x / blockDim.y};
  }
  while (true) {
    bool ran = false;
    for (current = 0; current < threads; ++current) {
      if (fibers[current].state != kReady) continue;
      ran = true;
      threadIdx = fibers[current].index;
      swapcontext(&scheduler, &fibers[current].context);
    }
    for (size_t warp = 0; warp < threads; warp += 32) {
      ran |= Release(warp, warp + 32 < threads ? warp + 32 : threads, kAtWarp, kAtBlock);
    }
    ran |= Release(0, threads, kAtBlock, kDone);
    if (ran) continue;
    for (size_t k = 0; k < threads; ++k) {
      if (fibers[k].state != kDone) {
        std::fprintf(stderr, "the threads of a block wait for each other in different places\n");
        std::abort();
      }
    }
    return;
  }
}

inline void Launch(const int64_t* size, const std::function<void()>& kernel) {
  gridDim = {int(size[0]), int(size[1]), int(size[2])};
  blockDim = {int(size[3]), int(size[4]), int(size[5])};
  size_t threads = size_t(blockDim.x) * blockDim.y * blockDim.z;
  if (threads > 1024) std::abort();
  while (fibers.size() < threads) {
    fibers.emplace_back();
    fibers.back().stack.resize(64 << 10);
  }
  body = &kernel;
  for (int z = 0; z < gridDim.z; ++z) {
    for (int y = 0; y < gridDim.y; ++y) {
      for (int x = 0; x < gridDim.x; ++x) {
        blockIdx = {x, y, z};
        RunBlock(threads);
      }
    }
  }
}

// The value of another lane of the warp; lanes outside the group of `width` give their own.
template <typename T>
T FromLane(T value, int lane) {
  static_assert(sizeof(T) <= 8);
  size_t own = current;
  std::memcpy(&fibers[own].slot, &value, sizeof(T));
  Wait(kAtWarp);
  std::memcpy(&value, &fibers[own / 32 * 32 + lane].slot, sizeof(T));
  Wait(kAtWarp);
  return value;
}

}  // namespace emulated

inline void __syncthreads() { emulated::Wait(emulated::kAtBlock); }
inline void __syncwarp(unsigned = 0) { emulated::Wait(emulated::kAtWarp); }
inline unsigned __activemask() { return 0xffffffffu; }

template <typename T>
T __shfl_down_sync(unsigned, T value, int delta, int width = 32) {
  int lane = int(emulated::current % 32);
  return emulated::FromLane(value, lane % width + delta < width ? lane + delta : lane);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int delta, int width = 32) {
  int lane = int(emulated::current % 32);
  return emulated::FromLane(value, lane % width - delta >= 0 ? lane - delta : lane);
}
template <typename T>
T __shfl_sync(unsigned, T value, int from, int width = 32) {
  int lane = int(emulated::current % 32);
  return emulated::FromLane(value, lane / width * width + from % width);
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
template <typename T>
T __ldg(const T* at) {
  return *at;
}
template <typename A, typename B>
auto max(A a, B b) -> std::common_type_t<A, B> {
  if constexpr (std::is_floating_point_v<A>) return std::fmax(a, b);
  return a < b ? b : a;
}
template <typename A, typename B>
auto min(A a, B b) -> std::common_type_t<A, B> {
  if constexpr (std::is_floating_point_v<A>) return std::fmin(a, b);
  return b < a ? b : a;
}
using std::isfinite;
using std::isinf;
using std::isnan;

#define VECTOR(T, name)                                                     \
  struct name##2 {                                                          \
    T x, y;                                                                 \
  };                                                                        \
  struct name##4 {                                                          \
    T x, y, z, w;                                                           \
  };                                                                        \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
VECTOR(float, float)
VECTOR(double, double)
VECTOR(int, int)
VECTOR(unsigned, uint)
VECTOR(signed char, char)
VECTOR(unsigned char, uchar)
VECTOR(short, short)
VECTOR(unsigned short, ushort)
VECTOR(long long, longlong)
VECTOR(unsigned long long, ulonglong)
#undef VECTOR
using uint = unsigned int;
using uchar = unsigned char;
using ushort = unsigned short;
