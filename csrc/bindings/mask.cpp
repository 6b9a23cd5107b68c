// Binds one op: addresses, sizes and codes in; codes checked; the GIL released while the core runs.
#include "ops/mask.h"

#include "bindings/bind.h"
#include "core/check.h"

namespace {

xpatch::Mask mask_from(uintptr_t x, uintptr_t masks, uintptr_t language, uintptr_t out, int64_t M, int64_t D, int64_t L,
                       int64_t repeat, int64_t x_stride, int64_t masks_stride, int dtype) {
  XPATCH_CHECK(xpatch::is_dtype(dtype), "mask: unknown dtype code " << dtype);
  xpatch::Mask op;
  op.x = reinterpret_cast<const void*>(x);
  op.masks = reinterpret_cast<const void*>(masks);
  op.language = reinterpret_cast<const int64_t*>(language);
  op.out = reinterpret_cast<void*>(out);
  op.M = M;
  op.D = D;
  op.L = L;
  op.repeat = repeat;
  op.x_stride = x_stride;
  op.masks_stride = masks_stride;
  op.dtype = static_cast<xpatch::DType>(dtype);
  return op;
}

bool mask_cpu(uintptr_t x, uintptr_t masks, uintptr_t language, uintptr_t out, int64_t M, int64_t D, int64_t L,
              int64_t repeat, int64_t x_stride, int64_t masks_stride, int dtype, int threads) {
  return xpatch::mask(mask_from(x, masks, language, out, M, D, L, repeat, x_stride, masks_stride, dtype), threads);
}

bool mask_cuda(uintptr_t x, uintptr_t masks, uintptr_t language, uintptr_t out, int64_t M, int64_t D, int64_t L,
               int64_t repeat, int64_t x_stride, int64_t masks_stride, int dtype, uintptr_t stream) {
  xpatch::mask_cuda(mask_from(x, masks, language, out, M, D, L, repeat, x_stride, masks_stride, dtype),
                    reinterpret_cast<void*>(stream));
  return true;
}

}  // namespace

void bind_mask(py::module_& m) {
  m.def("mask_cpu", &mask_cpu, py::call_guard<py::gil_scoped_release>());
  m.def("mask_cuda", &mask_cuda, py::call_guard<py::gil_scoped_release>());
}
