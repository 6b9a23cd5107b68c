// The CPU kernel, compiled once per instruction set; the loops are the compiler's to vectorise.
#include "core/simd.h"
#include "ops/mask.h"

namespace xpatch {
namespace XPATCH_ISA {
namespace {

constexpr int64_t kChunk = 256;  // elements of a 16-bit dtype widened at once

void multiply_fp32(const float* x, const float* mask, int64_t width, float* out) {
  for (int64_t d = 0; d < width; ++d) out[d] = x[d] * mask[d];
}

void multiply(const void* x, const void* mask, int64_t width, DType dtype, void* out) {
  if (dtype == DType::fp32) {
    return multiply_fp32(static_cast<const float*>(x), static_cast<const float*>(mask), width,
                         static_cast<float*>(out));
  }
  float left[kChunk], right[kChunk];
  for (int64_t d = 0; d < width; d += kChunk) {
    const int64_t count = width - d < kChunk ? width - d : kChunk;
    widen(static_cast<const uint16_t*>(x) + d, dtype, count, left);
    widen(static_cast<const uint16_t*>(mask) + d, dtype, count, right);
    multiply_fp32(left, right, count, left);
    narrow(left, count, dtype, static_cast<uint16_t*>(out) + d);
  }
}

}  // namespace

const MaskKernels mask_kernels = {multiply};

}  // namespace XPATCH_ISA
}  // namespace xpatch
