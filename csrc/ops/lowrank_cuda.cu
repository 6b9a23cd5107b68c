// The CUDA kernel: plain and correct for any shape. A block owns one row and a tile of columns and walks through the
// deltas that the row selected: its warps compute one rank's score each, then every thread adds the scored ranks to its
// own columns. Sums stay in fp32 in shared memory until the end.
#include <algorithm>

#include "core/check.h"
#include "core/cuda.cuh"
#include "ops/lowrank.h"

namespace xpatch {
namespace {

constexpr int kThreads = 256;
constexpr int kRanks = 64;      // scored between two barriers
constexpr int kColumns = 4096;  // kColumns + kRanks floats fit in 48 KiB of shared memory

__device__ inline int64_t clamped(int64_t offset, int64_t R) { return offset < 0 ? 0 : offset > R ? R : offset; }

template <typename T>
__global__ void __launch_bounds__(kThreads) lowrank_kernel(Lowrank op, int columns) {
  extern __shared__ float shared[];
  float* acc = shared;          // [columns]
  float* h = shared + columns;  // [kRanks]
  const int64_t row = blockIdx.x;
  const int64_t column0 = static_cast<int64_t>(blockIdx.y) * columns;
  const int width = static_cast<int>(op.V - column0 < columns ? op.V - column0 : columns);
  const T* x = static_cast<const T*>(op.x) + row * op.x_stride;
  const T* down = static_cast<const T*>(op.down);
  const T* up = static_cast<const T*>(op.up) + column0;
  const uint8_t* selected = op.rows + row / op.repeat * op.G;
  const int lane = threadIdx.x % kWarp;

  // A column belongs to one thread throughout, so `acc` needs no barrier.
  for (int c = threadIdx.x; c < width; c += kThreads) acc[c] = 0.0f;
  for (int64_t g = 0; g < op.G; ++g) {
    if (selected[g] == 0) continue;  // the same for every thread of the block
    const int64_t end = clamped(op.offsets[g + 1], op.R);
    for (int64_t rank0 = clamped(op.offsets[g], op.R); rank0 < end; rank0 += kRanks) {
      const int ranks = static_cast<int>(end - rank0 < kRanks ? end - rank0 : kRanks);
      for (int n = threadIdx.x / kWarp; n < ranks; n += kThreads / kWarp) {
        const T* weight = down + (rank0 + n) * op.down_stride;
        float sum = 0.0f;
        for (int64_t d = lane; d < op.D; d += kWarp) sum += as_float(x[d]) * as_float(weight[d]);
        for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
        if (lane == 0) h[n] = sum;
      }
      __syncthreads();
      for (int c = threadIdx.x; c < width; c += kThreads) {
        float sum = acc[c];
        for (int n = 0; n < ranks; ++n) sum += h[n] * as_float(up[(rank0 + n) * op.up_stride + c]);
        acc[c] = sum;
      }
      __syncthreads();
    }
  }
  T* out = static_cast<T*>(op.out) + row * op.V + column0;
  for (int c = threadIdx.x; c < width; c += kThreads) out[c] = rounded<T>(acc[c]);
}

template <typename T>
void launch(const Lowrank& op, cudaStream_t stream) {
  const int columns = static_cast<int>(std::min<int64_t>(op.V, kColumns));
  const dim3 grid(static_cast<unsigned>(op.M), static_cast<unsigned>((op.V + columns - 1) / columns));
  const size_t shared_bytes = static_cast<size_t>(columns + kRanks) * sizeof(float);
  lowrank_kernel<T><<<grid, kThreads, shared_bytes, stream>>>(op, columns);
}

}  // namespace

void lowrank_cuda(const Lowrank& op, void* stream_handle) {
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
  XPATCH_CHECK(status == cudaSuccess, "lowrank: CUDA launch failed: " << cudaGetErrorString(status));
}

}  // namespace xpatch
