// Binds one op: addresses, sizes and codes in; codes checked; the GIL released while the core runs.
#include "ops/patch_ffn.h"

#include <algorithm>
#include <string>

#include "bindings/bind.h"
#include "core/check.h"
#include "screen/screen.h"

namespace {

xpatch::DType dtype_from(int code) {
  XPATCH_CHECK(xpatch::is_dtype(code), "patch_ffn: unknown dtype code " << code);
  return static_cast<xpatch::DType>(code);
}

xpatch::Activation activation_from(int code) {
  XPATCH_CHECK(xpatch::is_activation(code), "patch_ffn: unknown activation code " << code);
  return static_cast<xpatch::Activation>(code);
}

xpatch::PatchFfn patch_ffn_from(uintptr_t x, uintptr_t keys, uintptr_t bias, uintptr_t values, uintptr_t out,
                                uintptr_t mask_inner, uintptr_t mask_outer, uintptr_t language, int64_t M, int64_t D,
                                int64_t N, int64_t V, int64_t L, int64_t x_stride, int64_t keys_stride,
                                int64_t values_stride, int dtype, int activation) {
  xpatch::PatchFfn op;
  op.x = reinterpret_cast<const void*>(x);
  op.keys = reinterpret_cast<const void*>(keys);
  op.bias = reinterpret_cast<const void*>(bias);
  op.values = reinterpret_cast<const void*>(values);
  op.out = reinterpret_cast<void*>(out);
  op.mask_inner = reinterpret_cast<const void*>(mask_inner);
  op.mask_outer = reinterpret_cast<const void*>(mask_outer);
  op.language = reinterpret_cast<const int64_t*>(language);
  op.M = M;
  op.D = D;
  op.N = N;
  op.V = V;
  op.L = L;
  op.x_stride = x_stride;
  op.keys_stride = keys_stride;
  op.values_stride = values_stride;
  op.dtype = dtype_from(dtype);
  op.activation = activation_from(activation);
  return op;
}

// (too_many, pairs, survivors, fired, coarse): `fired` holds int64 pairs (row, neuron) as bytes.
py::tuple patch_ffn_cpu(uintptr_t x, uintptr_t keys, uintptr_t bias, uintptr_t values, uintptr_t out,
                        uintptr_t mask_inner, uintptr_t mask_outer, uintptr_t language, int64_t M, int64_t D, int64_t N,
                        int64_t V, int64_t L, int64_t x_stride, int64_t keys_stride, int64_t values_stride, int dtype,
                        int activation, uintptr_t packed, int64_t packed_bytes, bool always, bool want_fired,
                        int threads) {
  const xpatch::PatchFfn op = patch_ffn_from(x, keys, bias, values, out, mask_inner, mask_outer, language, M, D, N, V,
                                             L, x_stride, keys_stride, values_stride, dtype, activation);
  xpatch::PatchFfnResult result;
  {
    const py::gil_scoped_release released;
    result = xpatch::patch_ffn(op, reinterpret_cast<const uint8_t*>(packed), packed_bytes, always, want_fired, threads);
  }
  return py::make_tuple(
      result.too_many, result.pairs, result.survivors,
      py::bytes(reinterpret_cast<const char*>(result.fired.data()), result.fired.size() * sizeof(int64_t)),
      result.coarse);
}

// patch_ffn_cpu on neurons that stay: a call hands over no more than the rows.
class PatchFfnCall {
 public:
  PatchFfnCall(uintptr_t keys, uintptr_t bias, uintptr_t values, int64_t D, int64_t N, int64_t V, int64_t keys_stride,
               int64_t values_stride, int dtype, int activation, uintptr_t packed, int64_t packed_bytes)
      : op_(patch_ffn_from(0, keys, bias, values, 0, 0, 0, 0, 0, D, N, V, 0, D, keys_stride, values_stride, dtype,
                           activation)),
        packed_(reinterpret_cast<const uint8_t*>(packed)),
        packed_bytes_(packed_bytes) {}

  // The pairs (row, neuron) that fired, as bytes; empty unless they are wanted. None: too many survive.
  py::object run(uintptr_t x, int64_t M, uintptr_t out, bool want_fired, int threads) const {
    xpatch::PatchFfn op = op_;
    op.x = reinterpret_cast<const void*>(x);
    op.out = reinterpret_cast<void*>(out);
    op.M = M;
    xpatch::PatchFfnResult result;
    {
      const py::gil_scoped_release released;
      result = xpatch::patch_ffn(op, packed_, packed_bytes_, false, want_fired, threads);
    }
    if (result.too_many) return py::none();
    return py::bytes(reinterpret_cast<const char*>(result.fired.data()), result.fired.size() * sizeof(int64_t));
  }

 private:
  const xpatch::PatchFfn op_;
  const uint8_t* const packed_;
  const int64_t packed_bytes_;
};

void patch_ffn_cuda(uintptr_t x, uintptr_t keys, uintptr_t bias, uintptr_t values, uintptr_t out, uintptr_t mask_inner,
                    uintptr_t mask_outer, uintptr_t language, int64_t M, int64_t D, int64_t N, int64_t V, int64_t L,
                    int64_t x_stride, int64_t keys_stride, int64_t values_stride, int dtype, int activation,
                    uintptr_t y, int64_t y_stride, int y_dtype, uintptr_t epoch, uintptr_t live, uintptr_t workspace,
                    int64_t workspace_bytes, uintptr_t stream) {
  XPATCH_CHECK(xpatch::is_dtype(y_dtype), "patch_ffn: unknown dtype code " << y_dtype);
  xpatch::PatchFfn op = patch_ffn_from(x, keys, bias, values, out, mask_inner, mask_outer, language, M, D, N, V, L,
                                       x_stride, keys_stride, values_stride, dtype, activation);
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

int64_t packed_bytes(int64_t N, int64_t D, int64_t rank) {
  XPATCH_CHECK(N >= 0 && D >= 0 && rank >= 0, "pack_keys: sizes must not be negative, found N=" << N << " D=" << D);
  return xpatch::packed_bytes(N, D, rank);
}

void pack_keys(uintptr_t keys, uintptr_t bias, int64_t N, int64_t D, int64_t keys_stride, int dtype, int activation,
               uintptr_t basis, int64_t rank, uintptr_t packed, int threads) {
  xpatch::pack_keys(reinterpret_cast<const void*>(keys), keys_stride, reinterpret_cast<const void*>(bias),
                    dtype_from(dtype), N, D, activation_from(activation), reinterpret_cast<const float*>(basis), rank,
                    reinterpret_cast<uint8_t*>(packed), threads);
}

bool can_screen(int activation, int64_t D) { return xpatch::can_screen(activation_from(activation), D); }

double int8_peak(int threads) {
  XPATCH_CHECK(threads >= 1, "int8_peak: threads must be at least 1, found " << threads);
  return xpatch::int8_peak(threads);
}

}  // namespace

void bind_patch_ffn(py::module_& m) {
  m.def("patch_ffn_cpu", &patch_ffn_cpu);
  py::class_<PatchFfnCall>(m, "PatchFfnCall")
      .def(py::init<uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t, int64_t, int64_t, int, int, uintptr_t,
                    int64_t>())
      .def("run", &PatchFfnCall::run);
  m.def("patch_ffn_cuda", &patch_ffn_cuda, py::call_guard<py::gil_scoped_release>());
  m.def("can_screen", &can_screen);
  m.def("packed_bytes", &packed_bytes);
  m.def("pack_keys_cpu", &pack_keys, py::call_guard<py::gil_scoped_release>());
  m.def("int8_peak", &int8_peak, py::call_guard<py::gil_scoped_release>());
  m.def("patch_ffn_cuda_workspace", &patch_ffn_cuda_workspace);
}
