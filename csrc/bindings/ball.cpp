// Binds one op: addresses, sizes and codes in; codes checked; the GIL released while the core runs.
#include "ops/ball.h"

#include "bindings/bind.h"
#include "core/check.h"
#include "screen/screen.h"

namespace {

xpatch::Ball ball_from(uintptr_t x, uintptr_t keys, uintptr_t radii, uintptr_t out, int64_t M, int64_t D, int64_t K,
                       int64_t x_stride, int64_t keys_stride, int dtype) {
  XPATCH_CHECK(xpatch::is_dtype(dtype), "ball: unknown dtype code " << dtype);
  xpatch::Ball op;
  op.x = reinterpret_cast<const void*>(x);
  op.keys = reinterpret_cast<const void*>(keys);
  op.radii = reinterpret_cast<const void*>(radii);
  op.out = reinterpret_cast<uint8_t*>(out);
  op.M = M;
  op.D = D;
  op.K = K;
  op.x_stride = x_stride;
  op.keys_stride = keys_stride;
  op.dtype = static_cast<xpatch::DType>(dtype);
  return op;
}

void ball_cpu(uintptr_t x, uintptr_t keys, uintptr_t radii, uintptr_t out, int64_t M, int64_t D, int64_t K,
              int64_t x_stride, int64_t keys_stride, int dtype, uintptr_t packed, int64_t packed_bytes,
              bool always_screen, int threads) {
  xpatch::Ball op = ball_from(x, keys, radii, out, M, D, K, x_stride, keys_stride, dtype);
  op.packed = reinterpret_cast<const uint8_t*>(packed);
  op.packed_bytes = packed_bytes;
  op.always_screen = always_screen;
  xpatch::ball(op, threads);
}

void pack_balls(uintptr_t keys, uintptr_t radii, int64_t K, int64_t D, int64_t keys_stride, int dtype, uintptr_t packed,
                int threads) {
  XPATCH_CHECK(xpatch::is_dtype(dtype), "pack_balls: unknown dtype code " << dtype);
  xpatch::pack_balls(reinterpret_cast<const void*>(keys), keys_stride, reinterpret_cast<const void*>(radii),
                     static_cast<xpatch::DType>(dtype), K, D, reinterpret_cast<uint8_t*>(packed), threads);
}

void ball_cuda(uintptr_t x, uintptr_t keys, uintptr_t radii, uintptr_t out, int64_t M, int64_t D, int64_t K,
               int64_t x_stride, int64_t keys_stride, int dtype, uintptr_t stream) {
  xpatch::ball_cuda(ball_from(x, keys, radii, out, M, D, K, x_stride, keys_stride, dtype),
                    reinterpret_cast<void*>(stream));
}

}  // namespace

void bind_ball(py::module_& m) {
  m.def("ball_cpu", &ball_cpu, py::call_guard<py::gil_scoped_release>());
  m.def("pack_balls_cpu", &pack_balls, py::call_guard<py::gil_scoped_release>());
  m.def("ball_cuda", &ball_cuda, py::call_guard<py::gil_scoped_release>());
}
