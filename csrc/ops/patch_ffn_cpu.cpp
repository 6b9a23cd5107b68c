// The exact fp32 kernels, compiled once per instruction set (see core/simd.h). Every element of a result is summed in
// an order that depends only on D and on which neurons fire, never on what is computed beside it.
#include "core/simd.h"
#include "ops/patch_ffn.h"

namespace xpatch {
namespace XPATCH_ISA {
namespace {

constexpr int W = Vec::width;

// h[i] = act(rows[i] . key + bias) for R rows.
template <Activation A, int R>
inline void score_rows(const float* const* rows, const float* key, float bias, int64_t D, float* h) {
  Vec acc[R];
  for (int r = 0; r < R; ++r) acc[r] = zero();
  int64_t d = 0;
  for (; d + W <= D; d += W) {
    const Vec k = load(key + d);
    for (int r = 0; r < R; ++r) acc[r] = multiply_add(load(rows[r] + d), k, acc[r]);
  }
  if (d < D) {
    const Vec k = load_first(key + d, D - d);
    for (int r = 0; r < R; ++r) acc[r] = multiply_add(load_first(rows[r] + d, D - d), k, acc[r]);
  }
  for (int r = 0; r < R; ++r) h[r] = activate<A>(sum(acc[r]) + bias);
}

template <Activation A>
void score_all(const float* const* rows, int64_t count, const float* key, float bias, int64_t D, float* h) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) score_rows<A, 8>(rows + i, key, bias, D, h + i);
  for (; i + 4 <= count; i += 4) score_rows<A, 4>(rows + i, key, bias, D, h + i);
  for (; i < count; ++i) score_rows<A, 1>(rows + i, key, bias, D, h + i);
}

void scores(const float* const* rows, int64_t count, const float* key, float bias, int64_t D, Activation activation,
            float* h) {
  switch (activation) {
    case Activation::relu:
      return score_all<Activation::relu>(rows, count, key, bias, D, h);
    case Activation::gelu:
      return score_all<Activation::gelu>(rows, count, key, bias, D, h);
    case Activation::gelu_tanh:
      return score_all<Activation::gelu_tanh>(rows, count, key, bias, D, h);
    case Activation::silu:
      return score_all<Activation::silu>(rows, count, key, bias, D, h);
    case Activation::identity:
      return score_all<Activation::identity>(rows, count, key, bias, D, h);
  }
}

// C registers of columns; `last` columns are used of the final register.
template <int C>
inline void mix_tile(const float* h, const float* const* values, int64_t count, int64_t column, int64_t last, bool add,
                     float* out) {
  Vec acc[C];
  const auto get = [last](const float* p, int c) {
    return c < C - 1 || last == W ? load(p + c * W) : load_first(p + c * W, last);
  };
  for (int c = 0; c < C; ++c) acc[c] = add ? get(out + column, c) : zero();
  for (int64_t i = 0; i < count; ++i) {
    const Vec weight = fill(h[i]);
    const float* value = values[i] + column;
    for (int c = 0; c < C; ++c) acc[c] = multiply_add(weight, get(value, c), acc[c]);
  }
  for (int c = 0; c < C; ++c) {
    if (c < C - 1 || last == W) {
      store(out + column + c * W, acc[c]);
    } else {
      store_first(out + column + c * W, acc[c], last);
    }
  }
}

void mix(const float* h, const float* const* values, int64_t count, int64_t columns, bool add, float* out) {
  constexpr int C = W == 16 ? 16 : 8;
  int64_t v = 0;
  for (; v + C * W <= columns; v += C * W) mix_tile<C>(h, values, count, v, W, add, out);
  for (; v < columns; v += W) mix_tile<1>(h, values, count, v, columns - v < W ? columns - v : W, add, out);
}

}  // namespace

const PatchFfnKernels patch_ffn_kernels = {scores, mix};

}  // namespace XPATCH_ISA
}  // namespace xpatch
