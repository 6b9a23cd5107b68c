// Binds one op: addresses, sizes and codes in; codes checked; the GIL released while the core runs.
#include "ops/lowrank.h"

#include "bindings/bind.h"
#include "core/check.h"

namespace {

xpatch::Lowrank lowrank_from(uintptr_t x, uintptr_t down, uintptr_t up, uintptr_t offsets, uintptr_t rows,
                             uintptr_t out, int64_t M, int64_t D, int64_t R, int64_t V, int64_t G, int64_t repeat,
                             int64_t x_stride, int64_t down_stride, int64_t up_stride, int dtype) {
  XPATCH_CHECK(xpatch::is_dtype(dtype), "lowrank: unknown dtype code " << dtype);
  xpatch::Lowrank op;
  op.x = reinterpret_cast<const void*>(x);
  op.down = reinterpret_cast<const void*>(down);
  op.up = reinterpret_cast<const void*>(up);
  op.offsets = reinterpret_cast<const int64_t*>(offsets);
  op.rows = reinterpret_cast<const uint8_t*>(rows);
  op.out = reinterpret_cast<void*>(out);
  op.M = M;
  op.D = D;
  op.R = R;
  op.V = V;
  op.G = G;
  op.repeat = repeat;
  op.x_stride = x_stride;
  op.down_stride = down_stride;
  op.up_stride = up_stride;
  op.dtype = static_cast<xpatch::DType>(dtype);
  return op;
}

bool lowrank_cpu(uintptr_t x, uintptr_t down, uintptr_t up, uintptr_t offsets, uintptr_t rows, uintptr_t out, int64_t M,
                 int64_t D, int64_t R, int64_t V, int64_t G, int64_t repeat, int64_t x_stride, int64_t down_stride,
                 int64_t up_stride, int dtype, int threads) {
  return xpatch::lowrank(
      lowrank_from(x, down, up, offsets, rows, out, M, D, R, V, G, repeat, x_stride, down_stride, up_stride, dtype),
      threads);
}

bool lowrank_cuda(uintptr_t x, uintptr_t down, uintptr_t up, uintptr_t offsets, uintptr_t rows, uintptr_t out,
                  int64_t M, int64_t D, int64_t R, int64_t V, int64_t G, int64_t repeat, int64_t x_stride,
                  int64_t down_stride, int64_t up_stride, int dtype, uintptr_t stream) {
  xpatch::lowrank_cuda(
      lowrank_from(x, down, up, offsets, rows, out, M, D, R, V, G, repeat, x_stride, down_stride, up_stride, dtype),
      reinterpret_cast<void*>(stream));
  return true;
}

}  // namespace

void bind_lowrank(py::module_& m) {
  m.def("lowrank_cpu", &lowrank_cpu, py::call_guard<py::gil_scoped_release>());
  m.def("lowrank_cuda", &lowrank_cuda, py::call_guard<py::gil_scoped_release>());
}
