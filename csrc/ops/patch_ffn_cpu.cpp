// The CPU kernels, compiled once per instruction set (see core/simd.h). Every element of the result is summed in an
// order that depends only on D and N, never on where a block begins or on how many rows are processed together.
#include "core/simd.h"
#include "ops/patch_ffn.h"

namespace xpatch {
namespace XPATCH_ISA {
namespace {

constexpr int W = Vec::width;

// sums[R][C] = x[R,D] keys[C,D]^T
template <int R, int C>
inline void dot_tile(const float* x, int64_t x_stride, const float* keys, int64_t keys_stride, int64_t D,
                     float (&sums)[R][C]) {
  Vec acc[R][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) acc[r][c] = zero();
  }
  int64_t d = 0;
  for (; d + W <= D; d += W) {
    Vec row[R];
    for (int r = 0; r < R; ++r) row[r] = load(x + r * x_stride + d);
    for (int c = 0; c < C; ++c) {
      const Vec key = load(keys + c * keys_stride + d);
      for (int r = 0; r < R; ++r) acc[r][c] = multiply_add(row[r], key, acc[r][c]);
    }
  }
  if (d < D) {
    for (int c = 0; c < C; ++c) {
      const Vec key = load_first(keys + c * keys_stride + d, D - d);
      for (int r = 0; r < R; ++r) acc[r][c] = multiply_add(load_first(x + r * x_stride + d, D - d), key, acc[r][c]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) sums[r][c] = sum(acc[r][c]);
  }
}

// R rows against all neurons of the block; C neurons at a time, the rest one by one.
template <Activation A, int R, int C>
inline void score_rows(const float* x, int64_t x_stride, const float* keys, int64_t keys_stride, const float* bias,
                       int64_t neurons, int64_t D, float* h, int64_t h_stride) {
  int64_t n = 0;
  for (; n + C <= neurons; n += C) {
    float sums[R][C];
    dot_tile<R, C>(x, x_stride, keys + n * keys_stride, keys_stride, D, sums);
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < C; ++c) h[r * h_stride + n + c] = activate<A>(sums[r][c] + bias[n + c]);
    }
  }
  for (; n < neurons; ++n) {
    float sums[R][1];
    dot_tile<R, 1>(x, x_stride, keys + n * keys_stride, keys_stride, D, sums);
    for (int r = 0; r < R; ++r) h[r * h_stride + n] = activate<A>(sums[r][0] + bias[n]);
  }
}

template <Activation A>
void score_block(const float* x, int64_t x_stride, const float* keys, int64_t keys_stride, const float* bias,
                 int64_t rows, int64_t neurons, int64_t D, float* h, int64_t h_stride) {
  // 4 x 4 sums need 16 registers beside the operands: AVX-512 and NEON have them.
  constexpr int R = W == 8 ? 2 : 4;
  int64_t m = 0;
  for (; m + R <= rows; m += R) {
    score_rows<A, R, 4>(x + m * x_stride, x_stride, keys, keys_stride, bias, neurons, D, h + m * h_stride, h_stride);
  }
  for (; m < rows; ++m) {
    score_rows<A, 1, 8>(x + m * x_stride, x_stride, keys, keys_stride, bias, neurons, D, h + m * h_stride, h_stride);
  }
}

void scores(const float* x, int64_t x_stride, const float* keys, int64_t keys_stride, const float* bias, int64_t rows,
            int64_t neurons, int64_t D, Activation activation, float* h, int64_t h_stride) {
  switch (activation) {
    case Activation::relu:
      return score_block<Activation::relu>(x, x_stride, keys, keys_stride, bias, rows, neurons, D, h, h_stride);
    case Activation::gelu:
      return score_block<Activation::gelu>(x, x_stride, keys, keys_stride, bias, rows, neurons, D, h, h_stride);
    case Activation::gelu_tanh:
      return score_block<Activation::gelu_tanh>(x, x_stride, keys, keys_stride, bias, rows, neurons, D, h, h_stride);
    case Activation::silu:
      return score_block<Activation::silu>(x, x_stride, keys, keys_stride, bias, rows, neurons, D, h, h_stride);
    case Activation::identity:
      return score_block<Activation::identity>(x, x_stride, keys, keys_stride, bias, rows, neurons, D, h, h_stride);
  }
}

// R rows, C registers of columns; `last` columns are used of the final register.
template <int R, int C>
inline void mix_tile(const float* h, int64_t h_stride, const float* values, int64_t values_stride, int64_t neurons,
                     bool skip_silent, bool accumulate, int64_t last, float* out, int64_t out_stride) {
  const auto get = [last](const float* p, int c) {
    return c == C - 1 && last < W ? load_first(p + c * W, last) : load(p + c * W);
  };
  Vec acc[R][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) acc[r][c] = accumulate ? get(out + r * out_stride, c) : zero();
  }
  for (int64_t n = 0; n < neurons; ++n) {
    if (R == 1 && skip_silent && h[n] == 0.0f) continue;  // NaN is not equal to 0, so it is never passed over
    const float* value = values + n * values_stride;
    Vec weight[R];
    for (int r = 0; r < R; ++r) weight[r] = fill(h[r * h_stride + n]);
    for (int c = 0; c < C; ++c) {
      const Vec column = get(value, c);
      for (int r = 0; r < R; ++r) acc[r][c] = multiply_add(weight[r], column, acc[r][c]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) {
      float* target = out + r * out_stride + c * W;
      if (c == C - 1 && last < W) {
        store_first(target, acc[r][c], last);
      } else {
        store(target, acc[r][c]);
      }
    }
  }
}

template <int R, int C>
inline void mix_rows(const float* h, int64_t h_stride, const float* values, int64_t values_stride, int64_t neurons,
                     int64_t columns, bool skip_silent, bool accumulate, float* out, int64_t out_stride) {
  int64_t v = 0;
  for (; v + C * W <= columns; v += C * W) {
    mix_tile<R, C>(h, h_stride, values + v, values_stride, neurons, skip_silent, accumulate, W, out + v, out_stride);
  }
  for (; v < columns; v += W) {
    const int64_t last = columns - v < W ? columns - v : W;
    mix_tile<R, 1>(h, h_stride, values + v, values_stride, neurons, skip_silent, accumulate, last, out + v, out_stride);
  }
}

void mix(const float* h, int64_t h_stride, const float* values, int64_t values_stride, int64_t rows, int64_t neurons,
         int64_t columns, bool skip_silent, bool accumulate, float* out, int64_t out_stride) {
  constexpr int R = W == 8 ? 2 : 4;
  int64_t m = 0;
  // Rows are silent for different neurons, so skipping works on one row at a time.
  for (; !skip_silent && m + R <= rows; m += R) {
    mix_rows<R, 4>(h + m * h_stride, h_stride, values, values_stride, neurons, columns, skip_silent, accumulate,
                   out + m * out_stride, out_stride);
  }
  for (; m < rows; ++m) {
    mix_rows<1, 8>(h + m * h_stride, h_stride, values, values_stride, neurons, columns, skip_silent, accumulate,
                   out + m * out_stride, out_stride);
  }
}

}  // namespace

const PatchFfnKernels patch_ffn_kernels = {scores, mix};

}  // namespace XPATCH_ISA
}  // namespace xpatch
