// ball: GRACE's gate (Hartvigsen et al. 2023, algorithm 1): whether a row's nearest key has it within its own radius.
//
//     out[m] = d(m,j) <= radii[j]   with j = argmin over k of d(m,k),   d(m,k) = ||x[m] - keys[k]||
//
// M rows, D width, K keys. Distances are summed in fp32 for every dtype; of several nearest keys the lowest index
// counts. Without keys, and for a row with NaN, the answer is no. Keys are finite, which is checked when a patch set is
// created; a key with NaN is nearest to nothing on the CPU.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/isa.h"

namespace xpatch {

// x, keys and radii share `dtype`. The last axis is dense; `*_stride` is the distance between rows, in elements.
struct Ball {
  const void* x = nullptr;
  const void* keys = nullptr;
  const void* radii = nullptr;  // [K], dense
  uint8_t* out = nullptr;       // [M], dense, 0 or 1
  int64_t M = 0, D = 0, K = 0;
  int64_t x_stride = 0, keys_stride = 0;
  DType dtype = DType::fp32;

  // Only the CPU reads what follows: what pack_balls (screen/screen.h) wrote for these keys and radii, or null.
  const uint8_t* packed = nullptr;
  int64_t packed_bytes = 0;
  bool always_screen = false;  // also where it does not pay
};

// Throws Error for sizes, strides or pointers that cannot be right.
void check(const Ball& op);

// Runs on the CPU with at most `threads` threads; the same for any thread count, and with or without packed keys.
void ball(const Ball& op, int threads);

// Launches on the caller's CUDA stream: no allocation, no synchronisation. Throws Error when the launch fails or when
// this build has no CUDA kernels.
void ball_cuda(const Ball& op, void* stream);

// The nearest key to a row of those looked at, and its distance; key -1: none.
struct Nearest {
  float distance = 0.0f;
  int64_t key = -1;
};

// The CPU kernels of one instruction set, on fp32.
//
// A squared distance is a sum of squares, so its parts only grow (also when they are rounded): as soon as a part is
// above what would matter, the rest of the key is not read.
struct BallKernels {
  // The nearest of `count` keys among those that have x within their own radius.
  Nearest (*within)(const float* x, const float* keys, int64_t keys_stride, const float* radii, int64_t count,
                    int64_t D);
  // The nearest of `count` keys among those at a distance of at most `bound`.
  Nearest (*nearest)(const float* x, const float* keys, int64_t keys_stride, int64_t count, int64_t D, float bound);
  // The sum of the squares of x[D].
  float (*squares)(const float* x, int64_t D);
};

XPATCH_DECLARE_KERNELS(BallKernels, ball_kernels)

}  // namespace xpatch
