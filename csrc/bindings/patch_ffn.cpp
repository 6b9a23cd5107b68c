// Binds one op: addresses, sizes and codes in; codes checked; the GIL released while the core runs.
#include "bindings/bind.h"
#include "core/check.h"
#include "ops/patch_ffn.h"

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

void patch_ffn_cuda(uintptr_t x, uintptr_t keys, uintptr_t bias, uintptr_t values, uintptr_t out, uintptr_t fired,
                    int64_t M, int64_t D, int64_t N, int64_t V, int64_t x_stride, int64_t keys_stride,
                    int64_t values_stride, int dtype, int activation, uintptr_t stream) {
  xpatch::patch_ffn_cuda(patch_ffn_from(x, keys, bias, values, out, fired, M, D, N, V, x_stride, keys_stride,
                                        values_stride, dtype, activation),
                         reinterpret_cast<void*>(stream));
}

}  // namespace

void bind_patch_ffn(py::module_& m) {
  m.def("patch_ffn_cpu", &patch_ffn_cpu, py::call_guard<py::gil_scoped_release>());
  m.def("patch_ffn_cuda", &patch_ffn_cuda, py::call_guard<py::gil_scoped_release>());
}
