// patch_ffn: what N patch neurons add beside an FFN.
//
//     out[M,V] = (act((x[M,D] * mask_inner[language]) keys[N,D]^T + bias[N]) values[N,V]) * mask_outer[language]
//
// M rows, D input width, N neurons, V output width (D again for a neuron beside a whole FFN), L languages; the masks
// are optional. Sums are kept in fp32 for every dtype. Where the activation is exactly 0 a neuron adds nothing and its
// value row is not read; this equals the dense formula as long as `values` is finite, which is checked when a patch set
// is created. NaN and Inf in x, keys or bias propagate as in the dense formula.
#pragma once

#include <cstdint>
#include <vector>

#include "core/activation.h"
#include "core/dtype.h"
#include "core/isa.h"

namespace xpatch {

// All tensors share `dtype`. The last axis is dense; `*_stride` is the distance between rows, in elements. `out` has
// row stride V and must not overlap the inputs.
struct PatchFfn {
  const void* x = nullptr;
  const void* keys = nullptr;
  const void* bias = nullptr;
  const void* values = nullptr;
  void* out = nullptr;
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

// Throws Error for sizes, strides or pointers that cannot be right, and for a language outside [0, L).
void check(const PatchFfn& op);

struct PatchFfnResult {
  bool too_many = false;       // so many neurons survive that dense matmuls are quicker; `out` is not written
  int64_t pairs = 0;           // (row, neuron) pairs looked at
  bool coarse = false;         // screened by the coarse stage alone
  int64_t survivors = 0;       // of them, computed in fp32
  std::vector<int64_t> fired;  // row, neuron, row, neuron, ... in ascending order: where the score is above zero
};

// Runs on the CPU with at most `threads` threads, on keys that pack_keys (screen/screen.h) packed: screened in int8,
// what survives computed in fp32. The result does not depend on the number of threads, and its bits are those of
// computing every neuron in fp32. Unless `always`, the call gives up early where screening does not pay. want_fired:
// fill `fired`.
PatchFfnResult patch_ffn(const PatchFfn& op, const uint8_t* packed, int64_t packed_bytes, bool always, bool want_fired,
                         int threads);

// Launches on the caller's CUDA stream: no allocation, no synchronisation. The result depends on the sizes and inputs
// alone, to the bit. Throws Error when the launch fails or when this build has no CUDA kernels.
void patch_ffn_cuda(const PatchFfn& op, void* stream);

// Bytes that patch_ffn_cuda needs at op.workspace: a function of the sizes, the dtype and whether there are masks.
int64_t patch_ffn_cuda_workspace(const PatchFfn& op);

// The CPU kernels of one instruction set (patch_ffn_cpu.cpp, compiled once for each). All arrays are fp32.
struct PatchFfnKernels {
  // h[count] = act(rows[i][D] . key[D] + bias)
  void (*scores)(const float* const* rows, int64_t count, const float* key, float bias, int64_t D,
                 Activation activation, float* h);
  // out[columns] (+)= sum over i of h[i] * values[i][columns], in ascending order of i
  void (*mix)(const float* h, const float* const* values, int64_t count, int64_t columns, bool add, float* out);
};

XPATCH_DECLARE_KERNELS(PatchFfnKernels, patch_ffn_kernels)

}  // namespace xpatch
