// patch_ffn: what N patch neurons add beside an FFN.
//
//     out[M,V] = act(x[M,D] keys[N,D]^T + bias[N]) values[N,V]
//
// M rows, D input width, N neurons, V output width (D again for a neuron beside a whole FFN). Sums are kept in fp32 for
// every dtype. A relu neuron whose activation is exactly 0 adds nothing and its value row is not read; this equals the
// dense formula as long as `values` is finite, which is checked when a patch set is created. NaN and Inf in x, keys or
// bias propagate as in the dense formula.
//
// On wish it also says which neurons fired: fired[M,N] is 1 where the activation is above zero, which for every one of
// these activations is where the score x keys^T + bias is above zero, and 0 elsewhere (NaN included).
#pragma once

#include <cstdint>

#include "core/activation.h"
#include "core/dtype.h"

namespace xpatch {

// All tensors share `dtype`. The last axis is dense; `*_stride` is the distance between rows, in elements. `out` has
// row stride V and must not overlap the inputs.
struct PatchFfn {
  const void* x = nullptr;
  const void* keys = nullptr;
  const void* bias = nullptr;
  const void* values = nullptr;
  void* out = nullptr;
  uint8_t* fired = nullptr;  // [M,N], dense; null: not wanted
  int64_t M = 0, D = 0, N = 0, V = 0;
  int64_t x_stride = 0, keys_stride = 0, values_stride = 0;
  DType dtype = DType::fp32;
  Activation activation = Activation::relu;
  // Language masks: row m uses row language[m] of both. mask_inner[L,D] and mask_outer[L,V] are dense, either may be
  // null.
  const void* mask_inner = nullptr;
  const void* mask_outer = nullptr;
  const int64_t* language = nullptr;  // [M]
  int64_t L = 0;

  // Only patch_ffn_cuda reads what follows.
  void* workspace = nullptr;  // patch_ffn_cuda_workspace bytes; nothing in it outlives the call
  int64_t workspace_bytes = 0;
  const void* y = nullptr;  // [M,V] of `y_dtype`: out = y + patch in `y_dtype`, rounded once; may be `out` itself
  int64_t y_stride = 0;
  DType y_dtype = DType::fp32;
  // Both or neither, read by the kernels: keys, bias and values have two halves of N neurons, one behind the other;
  // epoch[1] says which half is meant, live[2] how many of its first neurons are in use. The others are never read.
  const int64_t* epoch = nullptr;
  const int64_t* live = nullptr;
};

// Throws Error for sizes, strides or pointers that cannot be right.
void check(const PatchFfn& op);

// Runs on the CPU with at most `threads` threads. The result is bit-identical for any thread count: no sum is ever
// split between threads.
void patch_ffn(const PatchFfn& op, int threads);

// Launches on the caller's CUDA stream: no allocation, no synchronisation. The result depends on the sizes and inputs
// alone, to the bit. Throws Error when the launch fails or when this build has no CUDA kernels.
void patch_ffn_cuda(const PatchFfn& op, void* stream);

// Bytes that patch_ffn_cuda needs at op.workspace: a function of the sizes, the dtype and whether there are masks.
int64_t patch_ffn_cuda_workspace(const PatchFfn& op);

// The CPU kernels of one instruction set (patch_ffn_cpu.cpp, compiled once for each). All arrays are fp32.
struct PatchFfnKernels {
  // h[rows,neurons] = act(x[rows,D] keys[neurons,D]^T + bias[neurons])
  void (*scores)(const float* x, int64_t x_stride, const float* keys, int64_t keys_stride, const float* bias,
                 int64_t rows, int64_t neurons, int64_t D, Activation activation, float* h, int64_t h_stride);
  // out[rows,columns] (+)= h[rows,neurons] values[neurons,columns], adding neurons in ascending order; with
  // `skip_silent` a neuron with h == 0 is passed over.
  void (*mix)(const float* h, int64_t h_stride, const float* values, int64_t values_stride, int64_t rows,
              int64_t neurons, int64_t columns, bool skip_silent, bool accumulate, float* out, int64_t out_stride);
};

namespace portable {
extern const PatchFfnKernels patch_ffn_kernels;
}
namespace avx2 {
extern const PatchFfnKernels patch_ffn_kernels;
}
namespace avx512 {
extern const PatchFfnKernels patch_ffn_kernels;
}

}  // namespace xpatch
