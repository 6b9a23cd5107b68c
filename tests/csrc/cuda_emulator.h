// Runs CUDA kernels, compiled as plain C++, one block after the other on one CPU thread. Every CUDA thread is a fiber
// with its own stack; barriers, shuffles and votes switch between fibers, in an order the test chooses. It checks what
// a GPU leaves undefined: all threads of a block must meet at the same barrier, all lanes of a warp at the same
// warp-wide operation. With AddressSanitizer every access to global and shared memory is checked too.
//
// It says nothing about speed, caches, real concurrency between warps or blocks, or the rounding of tensor cores.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <type_traits>
#include <vector>

#include "core/dtype.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __shared__ static  // blocks run one at a time
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(threads)
#define threadIdx (emulated::thread_index())
#define blockIdx (emulated::machine().block)
#define __syncthreads() emulated::wait(emulated::Wait::block, __LINE__)
#define __shfl_xor_sync(lanes, value, step) emulated::shuffle_xor(value, step, __LINE__)
#define __ballot_sync(lanes, vote) emulated::ballot(vote, __LINE__)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __half2float(__half value) { return xpatch::fp32_from_fp16(value.bits); }
inline float __bfloat162float(__nv_bfloat16 value) { return xpatch::fp32_from_bf16(value.bits); }
inline __half __float2half_rn(float value) { return {xpatch::fp16_from_fp32(value)}; }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return {xpatch::bf16_from_fp32(value)}; }
inline int __popc(unsigned word) { return __builtin_popcount(word); }

namespace emulated {

[[noreturn]] inline void fail(const char* what, int line) {
  std::fprintf(stderr, "emulated kernel, line %d: %s\n", line, what);
  std::_Exit(1);  // what runs at exit must not run on a fiber's stack
}

enum class Wait { none, warp, block, finished };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  void* fake_stack = nullptr;
  Wait wait = Wait::none;
  int line = 0;
  int operations = 0;      // of the warp so far: consecutive ones use two slots in turn
  uint64_t slots[2] = {};  // what this lane shows the others
};

constexpr size_t kStack = 256 * 1024;
constexpr int kLanes = 32;

struct Machine {
  dim3 block;
  int order = 0;  // of threads and blocks: 0 as numbered, 1 backwards, others shuffled
  std::vector<Fiber> fibers;
  int running = 0;
  ucontext_t scheduler;
  const void* bottom = nullptr;
  size_t size = 0;
  void* fake_stack = nullptr;
  std::function<void()> body;
};

inline Machine& machine() {
  static Machine one;
  return one;
}

inline dim3 thread_index() { return dim3(static_cast<unsigned>(machine().running), 0, 0); }

inline void leave(Fiber& fiber, bool for_good) {
  Machine& m = machine();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.fake_stack, m.bottom, m.size);
#endif
  (void)for_good;
  swapcontext(&fiber.context, &m.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
#endif
}

inline void enter(int index) {
  Machine& m = machine();
  m.running = index;
  Fiber& fiber = m.fibers[static_cast<size_t>(index)];
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&m.fake_stack, fiber.stack.get(), kStack);
#endif
  swapcontext(&m.scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(m.fake_stack, nullptr, nullptr);
#endif
}

inline void fiber_main() {
  Machine& m = machine();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &m.bottom, &m.size);
#endif
  m.body();
  Fiber& fiber = m.fibers[static_cast<size_t>(m.running)];
  fiber.wait = Wait::finished;
  fiber.line = 0;
  leave(fiber, true);
}

inline void wait(Wait what, int line) {
  Fiber& fiber = machine().fibers[static_cast<size_t>(machine().running)];
  fiber.wait = what;
  fiber.line = line;
  leave(fiber, false);
}

// Shows `value` to the warp and returns all lanes' values.
inline void exchange(uint64_t value, int line, uint64_t (&all)[kLanes]) {
  Machine& m = machine();
  const int first = m.running / kLanes * kLanes;
  Fiber& fiber = m.fibers[static_cast<size_t>(m.running)];
  const int slot = fiber.operations++ % 2;
  fiber.slots[slot] = value;
  wait(Wait::warp, line);
  for (int lane = 0; lane < kLanes; ++lane) all[lane] = m.fibers[static_cast<size_t>(first + lane)].slots[slot];
}

inline float shuffle_xor(float value, int step, int line) {
  uint64_t word = 0, all[kLanes];
  std::memcpy(&word, &value, sizeof value);
  const int lane = machine().running % kLanes;
  exchange(word, line, all);
  std::memcpy(&value, &all[lane ^ step], sizeof value);
  return value;
}

inline unsigned ballot(bool vote, int line) {
  uint64_t all[kLanes];
  exchange(vote ? 1 : 0, line, all);
  unsigned word = 0;
  for (int lane = 0; lane < kLanes; ++lane) word |= static_cast<unsigned>(all[lane]) << lane;
  return word;
}

// Whether threads [first, end) all wait for the same thing; a mixture that can never resolve fails.
inline bool all_wait(int first, int end, Wait what) {
  const auto& fibers = machine().fibers;
  int waiting = 0, elsewhere = 0, line = 0;
  for (int i = first; i < end; ++i) {
    const Fiber& fiber = fibers[static_cast<size_t>(i)];
    if (fiber.wait != what) {
      ++elsewhere;
    } else if (waiting++ > 0 && fiber.line != line) {
      fail("threads wait at different places", fiber.line);
    } else {
      line = fiber.line;
    }
  }
  return waiting > 0 && elsewhere == 0;
}

inline void release(int first, int end) {
  for (int i = first; i < end; ++i) machine().fibers[static_cast<size_t>(i)].wait = Wait::none;
}

inline void run_block(int threads, std::mt19937& random) {
  Machine& m = machine();
  if (threads % kLanes != 0) fail("blocks of whole warps only", 0);
  if (m.fibers.size() < static_cast<size_t>(threads)) m.fibers.resize(static_cast<size_t>(threads));
  std::vector<int> order(static_cast<size_t>(threads));
  std::iota(order.begin(), order.end(), 0);
  if (m.order == 1) std::reverse(order.begin(), order.end());
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = m.fibers[static_cast<size_t>(i)];
    if (!fiber.stack) fiber.stack.reset(new char[kStack]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    fiber.wait = Wait::none;
    fiber.operations = 0;
    makecontext(&fiber.context, fiber_main, 0);
  }
  for (;;) {
    if (m.order > 1) std::shuffle(order.begin(), order.end(), random);
    bool moved = false;
    for (int i : order) {
      if (m.fibers[static_cast<size_t>(i)].wait != Wait::none) continue;
      enter(i);
      moved = true;
    }
    for (int first = 0; first < threads; first += kLanes) {
      if (all_wait(first, first + kLanes, Wait::warp)) release(first, first + kLanes), moved = true;
    }
    if (all_wait(0, threads, Wait::block)) release(0, threads), moved = true;
    if (all_wait(0, threads, Wait::finished)) return;
    if (!moved) fail("some threads wait where others never come", m.fibers[0].line);
  }
}

}  // namespace emulated

// 16-byte loads fault on a GPU when they are not aligned; UBSan says so here.
inline uint4 __ldg(const uint4* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) emulated::fail("a 16-byte load that is not aligned", __LINE__);
  return *from;
}

namespace xpatch {

template <typename... Parameters>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, void*, Parameters... arguments) {
  emulated::Machine& m = emulated::machine();
  std::mt19937 random(static_cast<unsigned>(m.order));
  m.body = [&] { kernel(arguments...); };
  std::vector<dim3> blocks;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) emulated::fail("grid size", 0);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) blocks.emplace_back(x, y, z);
    }
  }
  if (m.order == 1) std::reverse(blocks.begin(), blocks.end());
  if (m.order > 1) std::shuffle(blocks.begin(), blocks.end(), random);
  for (const dim3& block : blocks) {
    m.block = block;
    emulated::run_block(threads, random);
  }
}

}  // namespace xpatch

// Tensor cores: lane 0 holds whole 16 x 16 matrices. Pointers and strides are checked as the API demands.
namespace nvcuda::wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major, mem_col_major };

template <typename Use, int M, int N, int K, typename T, typename Layout = void>
struct fragment {
  float at[16][16];
};

inline bool first_lane() { return emulated::machine().running % emulated::kLanes == 0; }

template <typename F>
void fill_fragment(F& target, float value) {
  for (auto& row : target.at) {
    for (float& element : row) element = value;
  }
}

inline void check_access(const void* address, unsigned stride, size_t element) {
  if (reinterpret_cast<uintptr_t>(address) % 32 != 0 || stride * element % 16 != 0) {
    emulated::fail("a fragment whose address or stride is not aligned", __LINE__);
  }
}

template <typename Use, typename T, typename Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& target, const T* source, unsigned stride) {
  check_access(source, stride, sizeof(T));
  if (!first_lane()) return;
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) {
      const T element = source[static_cast<unsigned>(i) * stride + static_cast<unsigned>(j)];
      float wide;
      if constexpr (std::is_same_v<T, __half>) {
        wide = __half2float(element);
      } else {
        wide = __bfloat162float(element);
      }
      (std::is_same_v<Layout, row_major> ? target.at[i][j] : target.at[j][i]) = wide;
    }
  }
}

template <typename D, typename A, typename B, typename C>
void mma_sync(D& target, const A& a, const B& b, const C& c) {
  if (!first_lane()) return;
  D sums = c;
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 16; ++k) {
      for (int j = 0; j < 16; ++j) sums.at[i][j] += a.at[i][k] * b.at[k][j];
    }
  }
  target = sums;
}

template <typename F>
void store_matrix_sync(float* target, const F& source, unsigned stride, layout_t) {
  check_access(target, stride, sizeof(float));
  if (!first_lane()) return;
  for (unsigned i = 0; i < 16; ++i) {
    for (unsigned j = 0; j < 16; ++j) target[i * stride + j] = source.at[i][j];
  }
}

}  // namespace nvcuda::wmma

// The part of the runtime that the tests use.
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaMalloc(void** memory, size_t bytes) { return *memory = std::malloc(bytes), cudaSuccess; }
inline cudaError_t cudaFree(void* memory) { return std::free(memory), cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaMemcpy(void* target, const void* source, size_t bytes, cudaMemcpyKind) {
  if (bytes > 0) std::memcpy(target, source, bytes);
  return cudaSuccess;
}
