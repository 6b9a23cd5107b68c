// What the CUDA kernels share: element conversions and the warp's size. Include it only from a *_cuda.cu.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace xpatch {
namespace {

constexpr int kWarp = 32;

__device__ inline float as_float(float value) { return value; }
__device__ inline float as_float(__half value) { return __half2float(value); }
__device__ inline float as_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline void put(float* target, float value) { *target = value; }
__device__ inline void put(__half* target, float value) { *target = __float2half_rn(value); }
__device__ inline void put(__nv_bfloat16* target, float value) { *target = __float2bfloat16_rn(value); }

__device__ inline float warp_sum(float value) {
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, step);
  return value;
}

}  // namespace
}  // namespace xpatch
