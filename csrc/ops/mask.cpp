// Checks, and rows shared out to threads.
#include "ops/mask.h"

#include <algorithm>

#include "core/check.h"
#include "core/workers.h"

namespace xpatch {
namespace {

constexpr int64_t kBlockElements = 1 << 15;  // one task: long enough to be worth a thread

}  // namespace

void check(const Mask& op) {
  XPATCH_CHECK(op.M >= 0 && op.D >= 0 && op.L >= 0,
               "mask: sizes must not be negative, found M=" << op.M << " D=" << op.D << " L=" << op.L);
  XPATCH_CHECK(op.repeat >= 1 && op.M % op.repeat == 0,
               "mask: repeat must be at least 1 and divide M=" << op.M << ", found " << op.repeat);
  XPATCH_CHECK(op.M <= 1 || op.x_stride >= op.D,
               "mask: x row stride must be at least D=" << op.D << ", found " << op.x_stride);
  XPATCH_CHECK(op.L <= 1 || op.masks_stride >= op.D,
               "mask: masks row stride must be at least D=" << op.D << ", found " << op.masks_stride);
  XPATCH_CHECK(op.x != nullptr || op.M * op.D == 0, "mask: x is a null pointer");
  XPATCH_CHECK(op.masks != nullptr || op.L * op.D == 0, "mask: masks is a null pointer");
  XPATCH_CHECK(op.language != nullptr || op.M == 0, "mask: language is a null pointer");
  XPATCH_CHECK(op.out != nullptr || op.M * op.D == 0, "mask: out is a null pointer");
}

bool mask(const Mask& op, int threads) {
  check(op);
  XPATCH_CHECK(threads >= 1, "mask: threads must be at least 1, found " << threads);
  for (int64_t item = 0; item * op.repeat < op.M; ++item) {
    if (op.language[item] < 0 || op.language[item] >= op.L) return false;
  }
  if (op.M == 0 || op.D == 0) return true;
  const MaskKernels& kernel = XPATCH_KERNELS(mask_kernels);
  const int64_t bytes = size_of(op.dtype);
  const int64_t block = std::max<int64_t>(kBlockElements / op.D, 1);
  parallel_for(blocks(op.M, block), threads, [&](int64_t task) {
    const int64_t end = std::min(op.M, (task + 1) * block);
    for (int64_t row = task * block; row < end; ++row) {
      kernel.multiply(static_cast<const char*>(op.x) + row * op.x_stride * bytes,
                      static_cast<const char*>(op.masks) + op.language[row / op.repeat] * op.masks_stride * bytes, op.D,
                      op.dtype, static_cast<char*>(op.out) + row * op.D * bytes);
    }
  });
  return true;
}

#if !defined(XPATCH_HAS_CUDA)
void mask_cuda(const Mask&, void*) { throw Error("mask: this build has no CUDA kernels (build option XPATCH_CUDA)"); }
#endif

}  // namespace xpatch
