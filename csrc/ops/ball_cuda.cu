// The CUDA kernel: plain and correct for any shape. A block owns one row; each of its warps measures every eighth key
// and remembers the nearest. A distance that is NaN makes the row's answer no, as it does in the framework.
#include "core/check.h"
#include "core/cuda.cuh"
#include "ops/ball.h"

namespace xpatch {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

template <typename T>
__global__ void __launch_bounds__(kThreads) ball_kernel(Ball op) {
  __shared__ float distances[kWarps];
  __shared__ int64_t nearest[kWarps];  // -1: no key; -2: some distance was NaN
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(op.x) + row * op.x_stride;
  const T* keys = static_cast<const T*>(op.keys);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;

  float best = 0.0f;
  int64_t key = -1;
  for (int64_t k = warp; k < op.K; k += kWarps) {
    float sum = 0.0f;
    for (int64_t d = lane; d < op.D; d += kWarp) {
      const float difference = as_float(x[d]) - as_float(keys[k * op.keys_stride + d]);
      sum += difference * difference;
    }
    for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    const float distance = sqrtf(sum);  // the same in every lane
    if (distance != distance) {
      key = -2;
      break;
    }
    if (key < 0 || distance < best) {
      best = distance;
      key = k;
    }
  }
  if (lane == 0) {
    distances[warp] = best;
    nearest[warp] = key;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  bool ordered = key != -2;
  for (int w = 1; w < kWarps; ++w) {
    if (nearest[w] == -2) ordered = false;
    if (nearest[w] < 0) continue;
    if (key < 0 || distances[w] < best || (distances[w] == best && nearest[w] < key)) {
      best = distances[w];
      key = nearest[w];
    }
  }
  op.out[row] = ordered && key >= 0 && best <= as_float(static_cast<const T*>(op.radii)[key]);
}

template <typename T>
void launch(const Ball& op, cudaStream_t stream) {
  ball_kernel<T><<<static_cast<unsigned>(op.M), kThreads, 0, stream>>>(op);
}

}  // namespace

void ball_cuda(const Ball& op, void* stream_handle) {
  check(op);
  if (op.M == 0) return;
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
  XPATCH_CHECK(status == cudaSuccess, "ball: CUDA launch failed: " << cudaGetErrorString(status));
}

}  // namespace xpatch
