// The CUDA kernel: plain and correct for any shape. A block owns kRows rows and a tile of columns. Its warps compute
// one neuron's score for all its rows at a time, then every thread adds the scored neurons to its own columns. Sums
// stay in fp32 in shared memory until the end.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "core/check.h"
#include "ops/patch_ffn.h"

namespace xpatch {
namespace {

constexpr int kRows = 4;
constexpr int kNeurons = 64;  // scored between two barriers
constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kColumns = 2048;  // kRows * kColumns + kRows * kNeurons floats fit in 48 KiB of shared memory

__device__ inline float as_float(float value) { return value; }
__device__ inline float as_float(__half value) { return __half2float(value); }
__device__ inline float as_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline void put(float* target, float value) { *target = value; }
__device__ inline void put(__half* target, float value) { *target = __float2half_rn(value); }
__device__ inline void put(__nv_bfloat16* target, float value) { *target = __float2bfloat16_rn(value); }

template <typename T, Activation A>
__global__ void __launch_bounds__(kThreads) patch_ffn_kernel(PatchFfn op, int columns) {
  extern __shared__ float shared[];
  float* acc = shared;                  // [kRows, columns]
  float* h = shared + kRows * columns;  // [kRows, kNeurons]
  const T* keys = static_cast<const T*>(op.keys);
  const T* bias = static_cast<const T*>(op.bias);
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kRows;
  const int64_t column0 = static_cast<int64_t>(blockIdx.y) * columns;
  const int rows = static_cast<int>(op.M - row0 < kRows ? op.M - row0 : kRows);
  const int width = static_cast<int>(op.V - column0 < columns ? op.V - column0 : columns);
  const T* x = static_cast<const T*>(op.x) + row0 * op.x_stride;
  const T* values = static_cast<const T*>(op.values) + column0;
  const int lane = threadIdx.x % kWarp;

  // A column belongs to one thread throughout, so `acc` needs no barrier.
  for (int c = threadIdx.x; c < width; c += kThreads) {
    for (int r = 0; r < kRows; ++r) acc[r * columns + c] = 0.0f;
  }
  for (int64_t neuron0 = 0; neuron0 < op.N; neuron0 += kNeurons) {
    const int neurons = static_cast<int>(op.N - neuron0 < kNeurons ? op.N - neuron0 : kNeurons);
    for (int n = threadIdx.x / kWarp; n < neurons; n += kThreads / kWarp) {
      const T* key = keys + (neuron0 + n) * op.keys_stride;
      float sums[kRows] = {};
      for (int64_t d = lane; d < op.D; d += kWarp) {
        const float k = as_float(key[d]);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (r < rows) sums[r] += as_float(x[r * op.x_stride + d]) * k;
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        for (int step = kWarp / 2; step > 0; step /= 2) sums[r] += __shfl_xor_sync(0xFFFFFFFFu, sums[r], step);
        if (lane == 0) {
          const float score = activate<A>(sums[r] + as_float(bias[neuron0 + n]));
          h[r * kNeurons + n] = score;
        }
      }
    }
    __syncthreads();
    for (int c = threadIdx.x; c < width; c += kThreads) {
      float sums[kRows];
      for (int r = 0; r < kRows; ++r) sums[r] = acc[r * columns + c];
      for (int n = 0; n < neurons; ++n) {
        bool silent = A == Activation::relu;
        for (int r = 0; r < rows; ++r) silent = silent && h[r * kNeurons + n] == 0.0f;
        if (silent) continue;  // the same for every thread of the block
        const float value = as_float(values[(neuron0 + n) * op.values_stride + c]);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const float weight = h[r * kNeurons + n];
          if (A != Activation::relu || weight != 0.0f) sums[r] += weight * value;
        }
      }
      for (int r = 0; r < kRows; ++r) acc[r * columns + c] = sums[r];
    }
    __syncthreads();
  }
  T* out = static_cast<T*>(op.out) + row0 * op.V + column0;
  for (int c = threadIdx.x; c < width; c += kThreads) {
    for (int r = 0; r < rows; ++r) put(out + r * op.V + c, acc[r * columns + c]);
  }
}

template <typename T, Activation A>
void launch(const PatchFfn& op, cudaStream_t stream) {
  const int columns = static_cast<int>(std::max<int64_t>(std::min<int64_t>(op.V, kColumns), 1));
  const dim3 grid(static_cast<unsigned>((op.M + kRows - 1) / kRows),
                  static_cast<unsigned>(std::max<int64_t>((op.V + columns - 1) / columns, 1)));
  const size_t shared_bytes = static_cast<size_t>(kRows) * (columns + kNeurons) * sizeof(float);
  patch_ffn_kernel<T, A><<<grid, kThreads, shared_bytes, stream>>>(op, columns);
}

template <typename T>
void launch(const PatchFfn& op, cudaStream_t stream) {
  switch (op.activation) {
    case Activation::relu:
      return launch<T, Activation::relu>(op, stream);
    case Activation::gelu:
      return launch<T, Activation::gelu>(op, stream);
    case Activation::gelu_tanh:
      return launch<T, Activation::gelu_tanh>(op, stream);
    case Activation::silu:
      return launch<T, Activation::silu>(op, stream);
    case Activation::identity:
      return launch<T, Activation::identity>(op, stream);
  }
}

}  // namespace

void patch_ffn_cuda(const PatchFfn& op, void* stream_handle) {
  check(op);
  if (op.M == 0 || op.V == 0) return;
  auto* stream = static_cast<cudaStream_t>(stream_handle);
  switch (op.dtype) {
    case DType::fp32:
      launch<float>(op, stream);
      break;
    case DType::fp16:
      launch<__half>(op, stream);
      break;
    case DType::bf16:
      launch<__nv_bfloat16>(op, stream);
      break;
  }
  const cudaError_t status = cudaGetLastError();
  XPATCH_CHECK(status == cudaSuccess, "patch_ffn: CUDA launch failed: " << cudaGetErrorString(status));
}

}  // namespace xpatch
