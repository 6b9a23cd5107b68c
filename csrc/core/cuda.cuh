// What CUDA kernels share: element conversions, 16-byte loads with scalar tails, and the launch. With
// XPATCH_CUDA_EMULATED the same kernels compile as plain C++ on top of tests/csrc/cuda_emulator.h.
#pragma once

#if defined(XPATCH_CUDA_EMULATED)
#include "cuda_emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <mma.h>
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/activation.h"

namespace xpatch {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

__device__ inline float as_float(float value) { return value; }
__device__ inline float as_float(__half value) { return __half2float(value); }
__device__ inline float as_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// `value` rounded to nearest even.
template <typename T>
__device__ inline T rounded(float value) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return value;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else {
    return __float2bfloat16_rn(value);
  }
}

// The activation of a code known only when the kernel runs; the same for every thread of a launch.
__device__ inline float activate(Activation activation, float z) {
  switch (activation) {
    case Activation::relu:
      return activate<Activation::relu>(z);
    case Activation::gelu:
      return activate<Activation::gelu>(z);
    case Activation::gelu_tanh:
      return activate<Activation::gelu_tanh>(z);
    case Activation::silu:
      return activate<Activation::silu>(z);
    default:
      return z;
  }
}

// 16 bytes of a row.
template <typename T>
struct alignas(16) Pack {
  static constexpr int size = 16 / static_cast<int>(sizeof(T));
  T e[size];
};

// Elements [at, at + size) of a row of `width` elements; 0 beyond its end. `vector`: every row begins at a multiple of
// 16 bytes; `at` is a multiple of the pack's size.
template <typename T>
__device__ inline Pack<T> load_pack(const T* row, int64_t at, int64_t width, bool vector) {
  Pack<T> pack;
  if (vector && at + Pack<T>::size <= width) {
    const uint4 raw = __ldg(reinterpret_cast<const uint4*>(row + at));
    memcpy(&pack, &raw, sizeof pack);
    return pack;
  }
#pragma unroll
  for (int i = 0; i < Pack<T>::size; ++i) pack.e[i] = at + i < width ? row[at + i] : rounded<T>(0.0f);
  return pack;
}

template <typename T>
__device__ inline Pack<T> zero_pack() {
  Pack<T> pack;
#pragma unroll
  for (int i = 0; i < Pack<T>::size; ++i) pack.e[i] = rounded<T>(0.0f);
  return pack;
}

// Whether rows that are `stride` elements apart all begin at a multiple of 16 bytes.
inline bool rows_aligned(const void* matrix, int64_t stride, int64_t element_bytes) {
  return reinterpret_cast<uintptr_t>(matrix) % 16 == 0 && stride * element_bytes % 16 == 0;
}

#if !defined(XPATCH_CUDA_EMULATED)
template <typename... Parameters>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, cudaStream_t stream, Parameters... arguments) {
  kernel<<<grid, threads, 0, stream>>>(arguments...);
}
#endif

}  // namespace xpatch
