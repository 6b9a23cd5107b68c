// The CPU kernels, compiled once per instruction set (see core/simd.h). Every element is summed in an order that
// depends only on D and on the ranks, never on how many rows are processed together.
#include "core/simd.h"
#include "ops/lowrank.h"

namespace xpatch {
namespace XPATCH_ISA {
namespace {

constexpr int W = Vec::width;
constexpr int kTileRows = W == 8 ? 2 : 4;  // 4 x 4 sums need 16 registers beside the operands

// h[R,C] = x[R,D] down[C,D]^T
template <int R, int C>
inline void down_tile(const float* const* x, const float* down, int64_t down_stride, int64_t D, float* h,
                      int64_t h_stride) {
  Vec acc[R][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) acc[r][c] = zero();
  }
  int64_t d = 0;
  for (; d + W <= D; d += W) {
    Vec row[R];
    for (int r = 0; r < R; ++r) row[r] = load(x[r] + d);
    for (int c = 0; c < C; ++c) {
      const Vec weight = load(down + c * down_stride + d);
      for (int r = 0; r < R; ++r) acc[r][c] = multiply_add(row[r], weight, acc[r][c]);
    }
  }
  if (d < D) {
    for (int c = 0; c < C; ++c) {
      const Vec weight = load_first(down + c * down_stride + d, D - d);
      for (int r = 0; r < R; ++r) acc[r][c] = multiply_add(load_first(x[r] + d, D - d), weight, acc[r][c]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) h[r * h_stride + c] = sum(acc[r][c]);
  }
}

template <int R>
inline void down_rows(const float* const* x, const float* down, int64_t down_stride, int64_t ranks, int64_t D,
                      float* h) {
  int64_t n = 0;
  for (; n + 4 <= ranks; n += 4) down_tile<R, 4>(x, down + n * down_stride, down_stride, D, h + n, ranks);
  for (; n < ranks; ++n) down_tile<R, 1>(x, down + n * down_stride, down_stride, D, h + n, ranks);
}

void multiply_down(const float* const* x, int64_t rows, const float* down, int64_t down_stride, int64_t ranks,
                   int64_t D, float* h) {
  int64_t m = 0;
  for (; m + kTileRows <= rows; m += kTileRows) {
    down_rows<kTileRows>(x + m, down, down_stride, ranks, D, h + m * ranks);
  }
  for (; m < rows; ++m) down_rows<1>(x + m, down, down_stride, ranks, D, h + m * ranks);
}

// R rows, C registers of columns from column v; `last` columns are used of the final register.
template <int R, int C>
inline void up_tile(const float* h, const float* up, int64_t up_stride, int64_t ranks, int64_t v, int64_t last,
                    float* const* out) {
  const auto get = [last](const float* p, int c) {
    return c == C - 1 && last < W ? load_first(p + c * W, last) : load(p + c * W);
  };
  Vec acc[R][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) acc[r][c] = get(out[r] + v, c);
  }
  for (int64_t n = 0; n < ranks; ++n) {
    Vec weight[R];
    for (int r = 0; r < R; ++r) weight[r] = fill(h[r * ranks + n]);
    for (int c = 0; c < C; ++c) {
      const Vec column = get(up + n * up_stride + v, c);
      for (int r = 0; r < R; ++r) acc[r][c] = multiply_add(weight[r], column, acc[r][c]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) {
      float* target = out[r] + v + c * W;
      if (c == C - 1 && last < W) {
        store_first(target, acc[r][c], last);
      } else {
        store(target, acc[r][c]);
      }
    }
  }
}

template <int R>
inline void up_rows(const float* h, const float* up, int64_t up_stride, int64_t ranks, int64_t V, float* const* out) {
  constexpr int C = 4;
  int64_t v = 0;
  for (; v + C * W <= V; v += C * W) up_tile<R, C>(h, up, up_stride, ranks, v, W, out);
  for (; v < V; v += W) up_tile<R, 1>(h, up, up_stride, ranks, v, V - v < W ? V - v : W, out);
}

void multiply_up(const float* h, int64_t rows, const float* up, int64_t up_stride, int64_t ranks, int64_t V,
                 float* const* out) {
  int64_t m = 0;
  for (; m + kTileRows <= rows; m += kTileRows) {
    up_rows<kTileRows>(h + m * ranks, up, up_stride, ranks, V, out + m);
  }
  for (; m < rows; ++m) up_rows<1>(h + m * ranks, up, up_stride, ranks, V, out + m);
}

}  // namespace

const LowrankKernels lowrank_kernels = {multiply_down, multiply_up};

}  // namespace XPATCH_ISA
}  // namespace xpatch
