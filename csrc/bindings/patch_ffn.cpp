// Binds one op: addresses, sizes and codes in; codes checked; the GIL released while the core runs.
#include "ops/patch_ffn.h"

#include "bindings/bind.h"
#include "core/check.h"

namespace {

xpatch::PatchFfn patch_ffn_from(uintptr_t x, uintptr_t keys, uintptr_t bias, uintptr_t values, uintptr_t out,
                                uintptr_t fired, int64_t M, int64_t D, int64_t N, int64_t V, int64_t x_stride,
                                int64_t keys_stride, int64_t values_stride, int dtype, int activation) {
  XPATCH_CHECK(xpatch::is_dtype(dtype), "patch_ffn: unknown dtype code " << dtype);
  XPATCH_CHECK(xpatch::is_activation(activation), "patch_ffn: unknown activation code " << activation);
  xpatch::PatchFfn op;
  op.x = reinterpret_cast<const void*>(x);
  op.keys = reinterpret_cast<const void*>(keys);
  op.bias = reinterpret_cast<const void*>(bias);
  op.values = reinterpret_cast<const void*>(values);
  op.out = reinterpret_cast<void*>(out);
  op.fired = reinterpret_cast<uint8_t*>(fired);
  op.M = M;
  op.D = D;
  op.N = N;
  op.V = V;
  op.x_stride = x_stride;
  op.keys_stride = keys_stride;
  op.values_stride = values_stride;
  op.dtype = static_cast<xpatch::DType>(dtype);
  op.activation = static_cast<xpatch::Activation>(activation);
  return op;
}

void patch_ffn_cpu(uintptr_t x, uintptr_t keys, uintptr_t bias, uintptr_t values, uintptr_t out, uintptr_t fired,
                   int64_t M, int64_t D, int64_t N, int64_t V, int64_t x_stride, int64_t keys_stride,
                   int64_t values_stride, int dtype, int activation, int threads) {
  xpatch::patch_ffn(patch_ffn_from(x, keys, bias, values, out, fired, M, D, N, V, x_stride, keys_stride, values_stride,
                                   dtype, activation),
                    threads);
}

void patch_ffn_cuda(uintptr_t x, uintptr_t keys, uintptr_t bias, uintptr_t values, uintptr_t out, uintptr_t mask_inner,
                    uintptr_t mask_outer, uintptr_t language, int64_t M, int64_t D, int64_t N, int64_t V, int64_t L,
                    int64_t x_stride, int64_t keys_stride, int64_t values_stride, int dtype, int activation,
                    uintptr_t y, int64_t y_stride, int y_dtype, uintptr_t epoch, uintptr_t live, uintptr_t workspace,
                    int64_t workspace_bytes, uintptr_t stream) {
  XPATCH_CHECK(xpatch::is_dtype(y_dtype), "patch_ffn: unknown dtype code " << y_dtype);
  xpatch::PatchFfn op = patch_ffn_from(x, keys, bias, values, out, 0, M, D, N, V, x_stride, keys_stride, values_stride,
                                       dtype, activation);
  op.mask_inner = reinterpret_cast<const void*>(mask_inner);
  op.mask_outer = reinterpret_cast<const void*>(mask_outer);
  op.language = reinterpret_cast<const int64_t*>(language);
  op.L = L;
  op.y = reinterpret_cast<const void*>(y);
  op.y_stride = y_stride;
  op.y_dtype = static_cast<xpatch::DType>(y_dtype);
  op.epoch = reinterpret_cast<const int64_t*>(epoch);
  op.live = reinterpret_cast<const int64_t*>(live);
  op.workspace = reinterpret_cast<void*>(workspace);
  op.workspace_bytes = workspace_bytes;
  xpatch::patch_ffn_cuda(op, reinterpret_cast<void*>(stream));
}

int64_t patch_ffn_cuda_workspace(int64_t M, int64_t D, int64_t N, int64_t V, int dtype, bool mask_inner) {
  XPATCH_CHECK(xpatch::is_dtype(dtype), "patch_ffn: unknown dtype code " << dtype);
  xpatch::PatchFfn op;
  op.M = M, op.D = D, op.N = N, op.V = V;
  op.dtype = static_cast<xpatch::DType>(dtype);
  op.mask_inner = mask_inner ? &op : nullptr;
  return xpatch::patch_ffn_cuda_workspace(op);
}

}  // namespace

void bind_patch_ffn(py::module_& m) {
  m.def("patch_ffn_cpu", &patch_ffn_cpu, py::call_guard<py::gil_scoped_release>());
  m.def("patch_ffn_cuda", &patch_ffn_cuda, py::call_guard<py::gil_scoped_release>());
  m.def("patch_ffn_cuda_workspace", &patch_ffn_cuda_workspace);
}
