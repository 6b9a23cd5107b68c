// Screening: which neurons may reach their activation's cut-off for a row, decided in int8 with a proven bound.
//
// A key and a row are rotated (a fixed orthogonal map that spreads outlier coordinates) and rounded to bytes. The int8
// dot product, plus a bound on everything that rounding may have done, is an upper bound of the fp32 score; a neuron is
// passed over only when that bound is certainly below the cut-off, where the activation is exactly 0. PROOF.md derives
// it. What survives is for the caller to compute exactly.
#pragma once

#include <cstdint>

#include "core/activation.h"
#include "core/dtype.h"
#include "core/isa.h"

namespace xpatch {

constexpr int64_t kGroup = 16;                // keys that lie side by side
constexpr int64_t kStepBytes = 4 * kGroup;    // four coordinates of each
constexpr int64_t kPanel = 32;                // directions of the basis that lie side by side
constexpr int64_t kMaxScreenedWidth = 32768;  // sums of 255 * 127 * D fit 32 bits

// Keys as bytes. Per group of 16: [steps][16][4] bytes of the rotated, scaled, rounded keys with 128 added, then four
// rows of 16 floats: a >= |k8|, b >= |k - k8| and all fp32 rounding, c >= bias - cut, e >= what the bytes leave out of
// the key, all in the key's scale. A key that cannot be screened (not finite, or of extreme size) has a = b = e = 0, c
// = inf and survives always; lanes beyond N have c = -max.
struct Stage {
  const uint8_t* groups = nullptr;
  int64_t steps = 0;   // of four coordinates
  int64_t stride = 0;  // bytes from one group to the next
  int64_t width() const { return 4 * steps; }
};

// A view of packed keys (pack.cpp writes them). Two stages: `full` holds all D coordinates; `coarse`, where there is a
// basis, holds the `rank` coordinates along it, and Cauchy-Schwarz bounds the rest: far fewer bytes, more survivors.
struct PackedKeys {
  int64_t N = 0, D = 0;
  int64_t count = 0;  // groups
  Activation activation = Activation::relu;
  Stage full, coarse;
  const float* basis = nullptr;  // panels [rank / kPanel][D][kPanel] of orthonormal directions; null: no coarse stage
  int64_t rank = 0;
  float skew = 0.0f;  // >= |basis basis^T - I|
};

// Below this score the activation is exactly 0 in fp32; -inf where there is no such score (PROOF.md, section 5).
float cut_off(Activation activation);

bool can_screen(Activation activation, int64_t D);

// Bytes that pack_keys writes; rank 0: without a coarse stage.
int64_t packed_bytes(int64_t N, int64_t D, int64_t rank);

// keys[N,D] with row stride `keys_stride` and bias[N], both `dtype`; basis[rank,D] with rows that are orthonormal but
// for rounding. Any such basis is right; one along which keys and rows are long is quick. Throws Error where can_screen
// is false, and for a basis that is not orthonormal.
void pack_keys(const void* keys, int64_t keys_stride, const void* bias, DType dtype, int64_t N, int64_t D,
               Activation activation, const float* basis, int64_t rank, uint8_t* packed, int threads);

// Throws Error unless the bytes are what pack_keys wrote for these sizes and this activation.
PackedKeys read_packed(const uint8_t* packed, int64_t bytes, int64_t N, int64_t D, Activation activation);

// The same for balls: keys[K,D] with row stride `keys_stride` and radii[K], both `dtype`, 1 <= D <= kMaxScreenedWidth.
// packed_bytes(K, D, 0) bytes, no coarse stage; c bounds (radius^2 - |key|^2) / 2 and e is the key's scale, rounded
// down, so that a row whose `rest` is ball_rest() is passed over only where its fp32 distance is above the radius. A
// key whose radius is not finite survives always. pack.cpp derives it.
void pack_balls(const void* keys, int64_t keys_stride, const void* radii, DType dtype, int64_t K, int64_t D,
                uint8_t* packed, int threads);

// Throws Error unless the bytes are what pack_balls wrote for these sizes.
PackedKeys read_packed_balls(const uint8_t* packed, int64_t bytes, int64_t K, int64_t D);

// `rest` of a row of the given scale for balls: -|row|^2 / 2 in the row's scale, rounded towards zero. `squares`: the
// sum of the row's D squares in fp32.
float ball_rest(float squares, float scale, int64_t D);

// A rounded row: row * scale = bytes + error, up to fp32 rounding that `norm` bounds through the keys' b.
struct RowBound {
  float scale = 1.0f;
  float error = 0.0f;  // >= |row * scale - bytes|
  float norm = 0.0f;   // >= |row * scale|
  float rest = 0.0f;   // >= |what the bytes leave out of row * scale|; for balls ball_rest()
  int32_t sum = 0;     // of the bytes
  bool odd = false;    // not finite or of extreme size: cannot be screened
};

// int8 multiply-adds a second of nothing but dot products in registers, all threads together.
double int8_peak(int threads);

// The kernels of one instruction set (screen_cpu.cpp, compiled once for each).
struct ScreenKernels {
  // row[D] -> bytes[D rounded up to 4] and its bound; `work` has room for D floats.
  void (*quantise)(const float* row, int64_t D, float* work, int8_t* bytes, RowBound* bound);
  // out[count][rank] = rows[count][D] basis[rank][D]^T, the basis in panels.
  void (*project)(const float* const* rows, int64_t count, int64_t D, const float* panels, int64_t rank, float* out);
  // row[D] and its projected[rank] (overwritten) -> bytes and bound of the coarse stage.
  void (*coarsen)(const float* row, int64_t D, float* projected, int64_t rank, float skew, float* work, int8_t* bytes,
                  RowBound* bound);
  // masks[count][rows]: bit i is set where neuron 16 * group + i may reach the cut-off. Returns the number of set bits.
  // `stage` begins at the first of `count` groups; rows' bytes are stage.width() apart.
  int64_t (*screen)(const int8_t* bytes, const RowBound* bounds, int64_t rows, const Stage& stage, int64_t count,
                    uint16_t* masks);
  // int8 multiply-adds done in `rounds` rounds of nothing but dot products in registers, to measure the peak.
  int64_t (*peak)(int64_t rounds, int32_t* sink);
};

XPATCH_DECLARE_KERNELS(ScreenKernels, screen_kernels)

}  // namespace xpatch
