// The CUDA kernel: a thread per element, in strides of the whole grid.
#include <algorithm>

#include "core/check.h"
#include "core/cuda.cuh"
#include "ops/mask.h"

namespace xpatch {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kBlocks = 65535;

template <typename T>
__global__ void __launch_bounds__(kThreads) mask_kernel(Mask op) {
  const T* x = static_cast<const T*>(op.x);
  const T* masks = static_cast<const T*>(op.masks);
  T* out = static_cast<T*>(op.out);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < op.M * op.D; i += step) {
    const int64_t row = i / op.D, d = i - row * op.D;
    const int64_t language = op.language[row / op.repeat];
    const bool known = language >= 0 && language < op.L;
    const float factor = known ? as_float(masks[language * op.masks_stride + d]) : nanf("");
    out[i] = rounded<T>(as_float(x[row * op.x_stride + d]) * factor);
  }
}

template <typename T>
void launch(const Mask& op, cudaStream_t stream) {
  const int64_t wanted = (op.M * op.D + kThreads - 1) / kThreads;
  mask_kernel<T><<<static_cast<unsigned>(std::min(wanted, kBlocks)), kThreads, 0, stream>>>(op);
}

}  // namespace

void mask_cuda(const Mask& op, void* stream_handle) {
  check(op);
  if (op.M == 0 || op.D == 0) return;
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
  XPATCH_CHECK(status == cudaSuccess, "mask: CUDA launch failed: " << cudaGetErrorString(status));
}

}  // namespace xpatch
