// lowrank: what G low-rank deltas add beside one linear layer, each only on the rows that selected it.
//
//     out[m,V] = sum over g with rows[m,g] of (x[m,D] down_g[R_g,D]^T) up_g[R_g,V]
//
// M rows, D input width, V output width, G deltas; delta g owns the ranks offsets[g] .. offsets[g+1] of R in all. Sums
// are kept in fp32 for every dtype and add the deltas in ascending order. What a row did not select is neither read nor
// computed for it, so a row that selected nothing is exactly 0. (Grouped as in S-LoRA, Sheng et al. 2023, and Punica,
// Chen et al. 2023.)
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/isa.h"

namespace xpatch {

// x, down, up and out share `dtype`. The last axis is dense; `*_stride` is the distance between rows, in elements.
// `out` has row stride V and must not overlap the inputs. `rows` has one line of G bytes for every `repeat` rows of x.
struct Lowrank {
  const void* x = nullptr;
  const void* down = nullptr;        // [R,D]
  const void* up = nullptr;          // [R,V]
  const int64_t* offsets = nullptr;  // [G+1], ascending from 0 to R
  const uint8_t* rows = nullptr;     // [M/repeat,G], dense
  void* out = nullptr;
  int64_t M = 0, D = 0, R = 0, V = 0, G = 0, repeat = 1;
  int64_t x_stride = 0, down_stride = 0, up_stride = 0;
  DType dtype = DType::fp32;
};

// Throws Error for sizes, strides or pointers that cannot be right.
void check(const Lowrank& op);

// Runs on the CPU with at most `threads` threads and returns true; bit-identical for any thread count. Returns false,
// with `out` untouched, where two dense matmuls over all R ranks are faster, or where `offsets` is not ascending from 0
// to R.
bool lowrank(const Lowrank& op, int threads);

// Launches on the caller's CUDA stream: no allocation, no synchronisation. Offsets outside [0, R] are clamped. Throws
// Error when the launch fails or when this build has no CUDA kernels.
void lowrank_cuda(const Lowrank& op, void* stream);

// The CPU kernels of one instruction set, on fp32. The rows of x and out are given one by one: those that selected a
// delta lie anywhere.
struct LowrankKernels {
  // h[rows,ranks] = x[rows,D] down[ranks,D]^T, h dense
  void (*down)(const float* const* x, int64_t rows, const float* down, int64_t down_stride, int64_t ranks, int64_t D,
               float* h);
  // out[rows,V] += h[rows,ranks] up[ranks,V], adding ranks in ascending order
  void (*up)(const float* h, int64_t rows, const float* up, int64_t up_stride, int64_t ranks, int64_t V,
             float* const* out);
};

XPATCH_DECLARE_KERNELS(LowrankKernels, lowrank_kernels)

}  // namespace xpatch
