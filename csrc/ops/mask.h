// mask: every row times its language's mask.
//
//     out[m,D] = x[m,D] * masks[language[m / repeat],D]
//
// M rows, D width, L languages. Products are rounded once to the dtype, as the framework's are.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/isa.h"

namespace xpatch {

// x, masks and out share `dtype`. The last axis is dense; `*_stride` is the distance between rows, in elements. `out`
// has row stride D and must not overlap the inputs. `language` has one entry for every `repeat` rows of x.
struct Mask {
  const void* x = nullptr;
  const void* masks = nullptr;        // [L,D]
  const int64_t* language = nullptr;  // [M/repeat], each in [0, L)
  void* out = nullptr;
  int64_t M = 0, D = 0, L = 0, repeat = 1;
  int64_t x_stride = 0, masks_stride = 0;
  DType dtype = DType::fp32;
};

// Throws Error for sizes, strides or pointers that cannot be right.
void check(const Mask& op);

// Runs on the CPU with at most `threads` threads and returns true. Returns false, with `out` untouched, where a
// language is outside [0, L).
bool mask(const Mask& op, int threads);

// Launches on the caller's CUDA stream: no allocation, no synchronisation. A row whose language is outside [0, L)
// becomes NaN. Throws Error when the launch fails or when this build has no CUDA kernels.
void mask_cuda(const Mask& op, void* stream);

struct MaskKernels {
  // out[width] = x[width] * mask[width], all of `dtype`
  void (*multiply)(const void* x, const void* mask, int64_t width, DType dtype, void* out);
};

XPATCH_DECLARE_KERNELS(MaskKernels, mask_kernels)

}  // namespace xpatch
