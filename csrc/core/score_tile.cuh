// A tile of scores, ROWS rows by kTileKeys keys, built up by one block from stages of the width that pass through
// shared memory: plain multiply-adds for fp32, tensor cores with fp32 sums for fp16 and bf16.
#pragma once

#include "core/cuda.cuh"

namespace xpatch {

constexpr int kTileThreads = 256;
constexpr int kTileKeys = 64;
constexpr int kScoreStride = kTileKeys + 4;  // of the finished tile; the gap spreads rows over the banks
constexpr int kStagePacks = 8;               // of 16 bytes, for each row and key of a stage

constexpr int larger(int a, int b) { return a > b ? a : b; }

// put_x / put_key: a pack into the stage. multiply: adds the stage. finish: the tile as float [ROWS, kScoreStride] over
// the stage's memory. The caller puts a barrier between any two of these steps.
template <typename T, int ROWS>
class ScoreTile {  // fp16 and bf16
 public:
  static constexpr int kDepth = kStagePacks * Pack<T>::size;
  static constexpr int kBytes = larger((ROWS + kTileKeys) * (kDepth + 8) * static_cast<int>(sizeof(T)),
                                       ROWS * kScoreStride * static_cast<int>(sizeof(float)));

  __device__ explicit ScoreTile(unsigned char* shared) : x_(reinterpret_cast<T*>(shared)), keys_(x_ + ROWS * kStride) {
#pragma unroll
    for (int i = 0; i < kFragments; ++i) nvcuda::wmma::fill_fragment(sums_[i], 0.0f);
  }

  __device__ void put_x(int row, int pack, const Pack<T>& values) { put(x_ + row * kStride, pack, values); }
  __device__ void put_key(int key, int pack, const Pack<T>& values) { put(keys_ + key * kStride, pack, values); }

  __device__ void multiply() {
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
      const int fragment = fragment_of(i);
      if (fragment >= kAllFragments) break;  // the same for all lanes of a warp
      const T* x = x_ + fragment / kKeyGroups * 16 * kStride;
      const T* keys = keys_ + fragment % kKeyGroups * 16 * kStride;
#pragma unroll
      for (int d = 0; d < kDepth; d += 16) {
        nvcuda::wmma::fragment<nvcuda::wmma::matrix_a, 16, 16, 16, T, nvcuda::wmma::row_major> a;
        nvcuda::wmma::fragment<nvcuda::wmma::matrix_b, 16, 16, 16, T, nvcuda::wmma::col_major> b;
        nvcuda::wmma::load_matrix_sync(a, x + d, kStride);
        nvcuda::wmma::load_matrix_sync(b, keys + d, kStride);
        nvcuda::wmma::mma_sync(sums_[i], a, b, sums_[i]);
      }
    }
  }

  __device__ void finish(float* scores) {
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
      const int fragment = fragment_of(i);
      if (fragment >= kAllFragments) break;
      float* target = scores + fragment / kKeyGroups * 16 * kScoreStride + fragment % kKeyGroups * 16;
      nvcuda::wmma::store_matrix_sync(target, sums_[i], kScoreStride, nvcuda::wmma::mem_row_major);
    }
  }

 private:
  static constexpr int kStride = kDepth + 8;  // 144 bytes: aligned for fragments, and off the same bank
  static constexpr int kWarps = kTileThreads / kWarp;
  static constexpr int kKeyGroups = kTileKeys / 16;
  static constexpr int kAllFragments = ROWS / 16 * kKeyGroups;
  static constexpr int kFragments = (kAllFragments + kWarps - 1) / kWarps;  // of one warp
  static_assert(ROWS % 16 == 0 && kStride * sizeof(T) % 16 == 0 && ROWS * kStride * sizeof(T) % 32 == 0);

  __device__ static int fragment_of(int i) { return static_cast<int>(threadIdx.x) / kWarp + i * kWarps; }

  __device__ static void put(T* row, int pack, const Pack<T>& values) {
    *reinterpret_cast<Pack<T>*>(row + pack * Pack<T>::size) = values;
  }

  T* x_;     // [ROWS, kStride]
  T* keys_;  // [kTileKeys, kStride]
  nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, float> sums_[kFragments];
};

template <int ROWS>
class ScoreTile<float, ROWS> {
 public:
  static constexpr int kDepth = kStagePacks * Pack<float>::size;
  static constexpr int kBytes =
      larger(kDepth * (ROWS + 4 + kScoreStride), ROWS* kScoreStride) * static_cast<int>(sizeof(float));

  __device__ explicit ScoreTile(unsigned char* shared)
      : x_(reinterpret_cast<float*>(shared)), keys_(x_ + kDepth * kXStride) {}

  __device__ void put_x(int row, int pack, const Pack<float>& values) { put(x_ + row, kXStride, pack, values); }
  __device__ void put_key(int key, int pack, const Pack<float>& values) {
    put(keys_ + key, kScoreStride, pack, values);
  }

  __device__ void multiply() {
    const float* x = x_ + first_row();
    const float* keys = keys_ + first_key();
#pragma unroll 8
    for (int d = 0; d < kDepth; ++d) {
      const float4 four = *reinterpret_cast<const float4*>(keys + d * kScoreStride);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float value = x[d * kXStride + r];
        sums_[r][0] = fmaf(value, four.x, sums_[r][0]);
        sums_[r][1] = fmaf(value, four.y, sums_[r][1]);
        sums_[r][2] = fmaf(value, four.z, sums_[r][2]);
        sums_[r][3] = fmaf(value, four.w, sums_[r][3]);
      }
    }
  }

  __device__ void finish(float* scores) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int k = 0; k < 4; ++k) scores[(first_row() + r) * kScoreStride + first_key() + k] = sums_[r][k];
    }
  }

 private:
  static constexpr int kXStride = ROWS + 4;
  static constexpr int kRows = ROWS / 16;  // of one thread, by 4 keys
  static_assert(ROWS % 16 == 0 && kTileThreads == 16 * kTileKeys / 4 && kDepth * kXStride % 4 == 0);

  __device__ static int first_row() { return static_cast<int>(threadIdx.x) / 16 * kRows; }
  __device__ static int first_key() { return static_cast<int>(threadIdx.x) % 16 * 4; }

  __device__ static void put(float* column, int stride, int pack, const Pack<float>& values) {
#pragma unroll
    for (int i = 0; i < Pack<float>::size; ++i) column[(pack * Pack<float>::size + i) * stride] = values.e[i];
  }

  float* x_;     // [kDepth, kXStride]
  float* keys_;  // [kDepth, kScoreStride]
  float sums_[kRows][4] = {};
};

}  // namespace xpatch
