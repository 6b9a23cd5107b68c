// The CUDA kernels of patch_ffn; csrc/CUDA.md has the design. For a panel of rows and a range of neurons:
//
//   mask    (with masks) x ⊙ its language's mask
//   scores  every key is read once for a tile of rows; a neuron that fires leaves its activation in h[rows,neurons] and
//           its bit in bits[rows,neurons/32]
//   mix     the neurons that fire for any of a few rows are compacted, in ascending order; only their value rows are
//           read, and added to this block's share of partial[splits,rows,V]
//   finish  out = y + mask ⊙ the sum of the partials, in fixed order, rounded once
#include <algorithm>
#include <cmath>

#include "core/check.h"
#include "core/cuda.cuh"
#include "core/score_tile.cuh"
#include "ops/patch_ffn.h"

namespace xpatch {
namespace {

constexpr int64_t kPanelRows = 256;      // rows whose activations are held at once
constexpr int64_t kPassNeurons = 65536;  // neurons whose activations are held at once
constexpr int kThreads = 256;
constexpr int kStreamKeys = 32;   // of one block: one word of bits
constexpr int kStreamRows = 8;    // at most
constexpr int kMixThreads = 128;  // each owns one pack of columns
constexpr int kMixRows = 8;
constexpr int kMixNeurons = 512;  // compacted at a time
constexpr int kMixWords = kMixNeurons / 32;
constexpr int64_t kMixBlocks = 256;  // enough to fill a GPU; fixed, so that no sum depends on the device
static_assert(kMixWords * kMixRows == kMixThreads && kTileThreads == kThreads);

// The rows and neurons that one round of launches works on, and its workspace.
struct Pass {
  int64_t row0 = 0, rows = 0, neuron0 = 0, neurons = 0;
  const void* x = nullptr;  // from row `row0` on; masked
  int64_t x_stride = 0;
  bool vector_x = false, vector_keys = false, vector_values = false;
  float* h = nullptr;        // [rows, h_stride], written where a bit is set
  uint32_t* bits = nullptr;  // [rows, word_stride]
  float* partial = nullptr;  // [splits, panel, V]
  int64_t h_stride = 0, word_stride = 0, panel = 0, splits = 0;
};

// The pass's neurons that are in use: `count` of them, from row `first` of keys, bias and values on.
struct InUse {
  int64_t first, count;
};

__device__ inline InUse neurons_in_use(const PatchFfn& op, const Pass& pass) {
  int64_t half = 0, live = op.N;
  if (op.live != nullptr) {
    half = *op.epoch != 0 ? 1 : 0;
    live = op.live[half] < op.N ? op.live[half] : op.N;
  }
  const int64_t left = live - pass.neuron0;
  return {half * op.N + pass.neuron0, left < 0 ? 0 : left < pass.neurons ? left : pass.neurons};
}

// One warp, one row, 32 neurons from a multiple of 32 on: lane i decides about neuron `neuron` with its score x·k.
// An activation that is exactly 0 in fp32 is silent: relu at and below 0, the others where they underflow (CUDA.md).
template <typename T>
__device__ inline void emit(const PatchFfn& op, const Pass& pass, const InUse& in_use, int64_t row, int64_t neuron,
                            float score) {
  const bool real = neuron < in_use.count;
  float h = 0.0f;
  if (real) h = activate(op.activation, score + as_float(static_cast<const T*>(op.bias)[in_use.first + neuron]));
  const bool fires = h != 0.0f;  // NaN does
  const unsigned word = __ballot_sync(kAllLanes, fires);
  if (real && threadIdx.x % kWarp == 0) pass.bits[row * pass.word_stride + neuron / 32] = word;
  if (fires) pass.h[row * pass.h_stride + neuron] = h;
}

// The row of masks [L,width] for row `row` of x; null for a language that is not there.
template <typename T>
__device__ inline const T* mask_row(const PatchFfn& op, const void* masks, int64_t width, int64_t row) {
  const int64_t language = op.language[row];
  return language < 0 || language >= op.L ? nullptr : static_cast<const T*>(masks) + language * width;
}

// masked[rows,stride] = x ⊙ mask_inner[language], rounded as the framework rounds a product; NaN for an unknown
// language, which a kernel has no other way to tell.
template <typename T>
__global__ void __launch_bounds__(kThreads) mask_rows(PatchFfn op, Pass pass, T* masked, int64_t stride) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= pass.rows * op.D) return;
  const int64_t row = at / op.D, d = at % op.D;
  const T* mask = mask_row<T>(op, op.mask_inner, op.D, pass.row0 + row);
  const float value = as_float(static_cast<const T*>(op.x)[(pass.row0 + row) * op.x_stride + d]);
  masked[row * stride + d] = rounded<T>(mask == nullptr ? NAN : value * as_float(mask[d]));
}

// Few rows: a warp reads 4 keys at a time, straight from memory to registers, for all R rows.
template <typename T, int R>
__global__ void __launch_bounds__(kThreads) stream_scores(PatchFfn op, Pass pass) {
  constexpr int K = kStreamKeys / (kThreads / kWarp);
  constexpr int C = Pack<T>::size;
  __shared__ float scores[R][kStreamKeys];
  const InUse in_use = neurons_in_use(op, pass);
  const int64_t neuron0 = static_cast<int64_t>(blockIdx.x) * kStreamKeys;
  if (neuron0 >= in_use.count) return;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;

  // A block's last rows and keys are repeated to its full size; nobody looks at those scores.
  const T* keys[K];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int64_t neuron = neuron0 + warp * K + k;
    const int64_t real = neuron < in_use.count ? neuron : in_use.count - 1;
    keys[k] = static_cast<const T*>(op.keys) + (in_use.first + real) * op.keys_stride;
  }
  const T* x = static_cast<const T*>(pass.x);
  const int last_row = static_cast<int>(pass.rows) - 1;
  float sums[R][K] = {};
  for (int64_t d = lane * C; d < op.D; d += kWarp * C) {
    float key[K][C];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const Pack<T> pack = load_pack(keys[k], d, op.D, pass.vector_keys);
#pragma unroll
      for (int c = 0; c < C; ++c) key[k][c] = as_float(pack.e[c]);
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const Pack<T> pack = load_pack(x + (r < last_row ? r : last_row) * pass.x_stride, d, op.D, pass.vector_x);
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const float value = as_float(pack.e[c]);
#pragma unroll
        for (int k = 0; k < K; ++k) sums[r][k] = fmaf(value, key[k][c], sums[r][k]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
#pragma unroll
      for (int step = kWarp / 2; step > 0; step /= 2) sums[r][k] += __shfl_xor_sync(kAllLanes, sums[r][k], step);
      if (lane == 0) scores[r][warp * K + k] = sums[r][k];
    }
  }
  __syncthreads();
  if (warp <= last_row) emit<T>(op, pass, in_use, warp, neuron0 + lane, scores[warp < R ? warp : 0][lane]);
}

// Many rows: tiles of ROWS by kTileKeys. While a stage is multiplied the next one is on its way into registers.
template <typename T, int ROWS>
__global__ void __launch_bounds__(kThreads) tile_scores(PatchFfn op, Pass pass) {
  using Tile = ScoreTile<T, ROWS>;
  constexpr int C = Pack<T>::size;
  constexpr int kXPacks = (ROWS * kStagePacks + kThreads - 1) / kThreads;
  constexpr int kKeyPacks = kTileKeys * kStagePacks / kThreads;
  __shared__ __align__(32) unsigned char shared[Tile::kBytes];
  const InUse in_use = neurons_in_use(op, pass);
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * ROWS;
  const int64_t neuron0 = static_cast<int64_t>(blockIdx.y) * kTileKeys;
  if (neuron0 >= in_use.count) return;
  const T* x = static_cast<const T*>(pass.x) + row0 * pass.x_stride;
  const T* keys = static_cast<const T*>(op.keys) + (in_use.first + neuron0) * op.keys_stride;
  const int64_t rows_left = pass.rows - row0, keys_left = in_use.count - neuron0;

  Pack<T> next_x[kXPacks], next_keys[kKeyPacks];
  const auto fetch = [&](int64_t depth0) {
#pragma unroll
    for (int i = 0; i < kXPacks; ++i) {
      const int at = threadIdx.x + i * kThreads, row = at / kStagePacks;
      const bool real = row < ROWS && row < rows_left;
      next_x[i] = real ? load_pack(x + row * pass.x_stride, depth0 + at % kStagePacks * C, op.D, pass.vector_x)
                       : zero_pack<T>();
    }
#pragma unroll
    for (int i = 0; i < kKeyPacks; ++i) {
      const int at = threadIdx.x + i * kThreads, key = at / kStagePacks;
      next_keys[i] = key < keys_left
                         ? load_pack(keys + key * op.keys_stride, depth0 + at % kStagePacks * C, op.D, pass.vector_keys)
                         : zero_pack<T>();
    }
  };
  Tile tile(shared);
  fetch(0);
  for (int64_t depth0 = 0; depth0 < op.D; depth0 += Tile::kDepth) {
#pragma unroll
    for (int i = 0; i < kXPacks; ++i) {
      const int at = threadIdx.x + i * kThreads;
      if (at / kStagePacks < ROWS) tile.put_x(at / kStagePacks, at % kStagePacks, next_x[i]);
    }
#pragma unroll
    for (int i = 0; i < kKeyPacks; ++i) {
      const int at = threadIdx.x + i * kThreads;
      tile.put_key(at / kStagePacks, at % kStagePacks, next_keys[i]);
    }
    __syncthreads();
    if (depth0 + Tile::kDepth < op.D) fetch(depth0 + Tile::kDepth);
    tile.multiply();
    __syncthreads();
  }
  float* scores = reinterpret_cast<float*>(shared);  // [ROWS, kScoreStride]
  tile.finish(scores);
  __syncthreads();
  const int lane = threadIdx.x % kWarp;
  for (int row = threadIdx.x / kWarp; row < ROWS && row < rows_left; row += kThreads / kWarp) {
    for (int key = lane; key < kTileKeys; key += kWarp) {
      emit<T>(op, pass, in_use, row0 + row, neuron0 + key, scores[row * kScoreStride + key]);
    }
  }
}

// Up to R rows, one tile of columns, every splits-th group of kMixNeurons neurons.
template <typename T, int R>
__global__ void __launch_bounds__(kMixThreads) mix(PatchFfn op, Pass pass) {
  constexpr int C = Pack<T>::size;
  constexpr int kAhead = 4;  // value rows on their way at once
  __shared__ uint32_t words[R][kMixWords];
  __shared__ uint32_t any[kMixWords];
  __shared__ uint16_t list[kMixNeurons];
  __shared__ float weights[kMixNeurons][R];
  const InUse in_use = neurons_in_use(op, pass);
  const int64_t row0 = static_cast<int64_t>(blockIdx.y) * R;
  const int rows = static_cast<int>(pass.rows - row0 < R ? pass.rows - row0 : R);
  const int64_t column0 = (static_cast<int64_t>(blockIdx.z) * kMixThreads + threadIdx.x) * C;
  const int columns = static_cast<int>(column0 >= op.V ? 0 : op.V - column0 < C ? op.V - column0 : C);
  const T* values = static_cast<const T*>(op.values) + in_use.first * op.values_stride;
  float* partial = pass.partial + (static_cast<int64_t>(blockIdx.x) * pass.panel + row0) * op.V + column0;

  float sums[R][C] = {};
  if (pass.neuron0 > 0) {  // a later pass goes on where the one before stopped
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int c = 0; c < C; ++c) {
        if (r < rows && c < columns) sums[r][c] = partial[r * op.V + c];
      }
    }
  }
  for (int64_t group = static_cast<int64_t>(blockIdx.x) * kMixNeurons; group < in_use.count;
       group += pass.splits * kMixNeurons) {
    if (threadIdx.x < R * kMixWords) {
      const int r = threadIdx.x / kMixWords, word = threadIdx.x % kMixWords;
      const bool real = r < rows && group + word * 32 < in_use.count;
      words[r][word] = real ? pass.bits[(row0 + r) * pass.word_stride + group / 32 + word] : 0u;
    }
    __syncthreads();
    if (threadIdx.x < kMixWords) {
      uint32_t fires = 0;
#pragma unroll
      for (int r = 0; r < R; ++r) fires |= words[r][threadIdx.x];
      any[threadIdx.x] = fires;
    }
    __syncthreads();

    // A thread looks at kMixNeurons / kMixThreads neighbours, whose bits lie in one word.
    constexpr int kEach = kMixNeurons / kMixThreads;
    const int word = threadIdx.x * kEach / 32, bit0 = threadIdx.x * kEach % 32;
    int count = 0, place = 0;
#pragma unroll
    for (int w = 0; w < kMixWords; ++w) {
      if (w == word) place = count + __popc(any[w] & ((1u << bit0) - 1u));
      count += __popc(any[w]);
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int bit = bit0 + i;
      if ((any[word] >> bit & 1u) == 0) continue;
      list[place] = static_cast<uint16_t>(word * 32 + bit);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const bool fires = (words[r][word] >> bit & 1u) != 0;
        weights[place][r] = fires ? pass.h[(row0 + r) * pass.h_stride + group + word * 32 + bit] : 0.0f;
      }
      ++place;
    }
    __syncthreads();

    for (int first = 0; columns > 0 && first < count; first += kAhead) {
      Pack<T> ahead[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (first + i >= count) break;
        const T* value = values + (group + list[first + i]) * op.values_stride;
        ahead[i] = load_pack(value, column0, op.V, pass.vector_values);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (first + i >= count) break;
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const float weight = weights[first + i][r];
          if (weight == 0.0f) continue;  // the same for every thread of the block
#pragma unroll
          for (int c = 0; c < C; ++c) sums[r][c] = fmaf(weight, as_float(ahead[i].e[c]), sums[r][c]);
        }
      }
    }
    // The next group touches `list` and `weights` only behind two more barriers.
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int c = 0; c < C; ++c) {
      if (r < rows && c < columns) partial[r * op.V + c] = sums[r][c];
    }
  }
}

template <typename T, typename O>
__global__ void __launch_bounds__(kThreads) finish(PatchFfn op, Pass pass) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= pass.rows * op.V) return;
  const int64_t row = at / op.V, column = at % op.V;
  float sum = 0.0f;
#pragma unroll 8
  for (int64_t split = 0; split < pass.splits; ++split) sum += pass.partial[split * pass.panel * op.V + at];
  if (op.mask_outer != nullptr) {
    const T* mask = mask_row<T>(op, op.mask_outer, op.V, pass.row0 + row);
    sum = mask == nullptr ? NAN : sum * as_float(mask[column]);
  }
  if (op.y != nullptr) sum += as_float(static_cast<const O*>(op.y)[(pass.row0 + row) * op.y_stride + column]);
  static_cast<O*>(op.out)[(pass.row0 + row) * op.V + column] = rounded<O>(sum);
}

int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }
int64_t aligned(int64_t bytes) { return blocks(bytes, 256) * 256; }

// How the work is cut and what the workspace holds; a function of sizes and dtype only.
struct Plan {
  int64_t panel, pass, h_stride, word_stride, row_groups, column_tiles, splits;
  int64_t masked_stride;  // elements
  int64_t bits_at, partial_at, masked_at, bytes;

  explicit Plan(const PatchFfn& op)
      : panel(std::min(op.M, kPanelRows)),
        pass(std::min(op.N, kPassNeurons)),
        h_stride(blocks(pass, 32) * 32),
        word_stride(blocks(pass, 32)),
        row_groups(panel == 1 ? 1 : blocks(panel, kMixRows)),
        column_tiles(blocks(op.V * size_of(op.dtype), 16 * kMixThreads)),
        splits(0),
        masked_stride(op.mask_inner == nullptr ? 0 : blocks(op.D * size_of(op.dtype), 16) * 16 / size_of(op.dtype)) {
    if (panel > 0 && pass > 0 && op.V > 0) {
      splits = std::min(blocks(kMixBlocks, column_tiles * row_groups), blocks(pass, kMixNeurons));
    }
    bits_at = aligned(panel * h_stride * 4);
    partial_at = bits_at + aligned(panel * word_stride * 4);
    masked_at = partial_at + aligned(splits * panel * op.V * 4);
    bytes = masked_at + aligned(panel * masked_stride * size_of(op.dtype));
  }
};

dim3 grid(int64_t x, int64_t y = 1, int64_t z = 1) {
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
}

template <typename T>
void launch_scores(const PatchFfn& op, const Pass& pass, cudaStream_t stream) {
  const dim3 keys = grid(blocks(pass.neurons, kStreamKeys));
  const auto tiles = [&](int rows) { return grid(blocks(pass.rows, rows), blocks(pass.neurons, kTileKeys)); };
  if (pass.rows == 1) return launch(stream_scores<T, 1>, keys, kThreads, stream, op, pass);
  if (pass.rows == 2) return launch(stream_scores<T, 2>, keys, kThreads, stream, op, pass);
  if (pass.rows <= 4) return launch(stream_scores<T, 4>, keys, kThreads, stream, op, pass);
  if (pass.rows <= kStreamRows) return launch(stream_scores<T, kStreamRows>, keys, kThreads, stream, op, pass);
  if (pass.rows <= 16) return launch(tile_scores<T, 16>, tiles(16), kThreads, stream, op, pass);
  if (pass.rows <= 32) return launch(tile_scores<T, 32>, tiles(32), kThreads, stream, op, pass);
  launch(tile_scores<T, 64>, tiles(64), kThreads, stream, op, pass);
}

template <typename T>
void launch_finish(const PatchFfn& op, const Pass& pass, cudaStream_t stream) {
  const dim3 elements = grid(blocks(pass.rows * op.V, kThreads));
  switch (op.y != nullptr ? op.y_dtype : op.dtype) {
    case DType::fp32:
      return launch(finish<T, float>, elements, kThreads, stream, op, pass);
    case DType::fp16:
      return launch(finish<T, __half>, elements, kThreads, stream, op, pass);
    case DType::bf16:
      return launch(finish<T, __nv_bfloat16>, elements, kThreads, stream, op, pass);
  }
}

template <typename T>
void launch_all(const PatchFfn& op, cudaStream_t stream) {
  const Plan plan(op);
  char* workspace = static_cast<char*>(op.workspace);
  const auto bytes = static_cast<int64_t>(sizeof(T));
  Pass pass;
  pass.h = reinterpret_cast<float*>(workspace);
  pass.bits = reinterpret_cast<uint32_t*>(workspace + plan.bits_at);
  pass.partial = reinterpret_cast<float*>(workspace + plan.partial_at);
  pass.h_stride = plan.h_stride, pass.word_stride = plan.word_stride;
  pass.panel = plan.panel, pass.splits = plan.splits;
  pass.x_stride = op.x_stride;
  pass.vector_x = rows_aligned(op.x, op.x_stride, bytes);
  pass.vector_keys = rows_aligned(op.keys, op.keys_stride, bytes);
  pass.vector_values = rows_aligned(op.values, op.values_stride, bytes);
  T* masked = reinterpret_cast<T*>(workspace + plan.masked_at);
  for (pass.row0 = 0; pass.row0 < op.M; pass.row0 += plan.panel) {
    pass.rows = std::min(plan.panel, op.M - pass.row0);
    pass.x = static_cast<const T*>(op.x) + pass.row0 * op.x_stride;
    if (op.mask_inner != nullptr && op.D > 0) {
      launch(mask_rows<T>, grid(blocks(pass.rows * op.D, kThreads)), kThreads, stream, op, pass, masked,
             plan.masked_stride);
      pass.x = masked, pass.x_stride = plan.masked_stride, pass.vector_x = true;
    }
    for (pass.neuron0 = 0; pass.neuron0 < op.N; pass.neuron0 += plan.pass) {
      pass.neurons = std::min(plan.pass, op.N - pass.neuron0);
      launch_scores<T>(op, pass, stream);
      const dim3 shares = grid(plan.splits, plan.row_groups, plan.column_tiles);
      plan.panel == 1 ? launch(mix<T, 1>, shares, kMixThreads, stream, op, pass)
                      : launch(mix<T, kMixRows>, shares, kMixThreads, stream, op, pass);
    }
    launch_finish<T>(op, pass, stream);
  }
}

}  // namespace

int64_t patch_ffn_cuda_workspace(const PatchFfn& op) { return Plan(op).bytes; }

void patch_ffn_cuda(const PatchFfn& op, void* stream_handle) {
  PatchFfn on_host = op;  // languages lie in device memory, where nothing can be checked from here
  on_host.mask_inner = on_host.mask_outer = nullptr, on_host.language = nullptr;
  check(on_host);
  XPATCH_CHECK((op.epoch == nullptr) == (op.live == nullptr), "patch_ffn: epoch and live come together");
  XPATCH_CHECK((op.mask_inner == nullptr && op.mask_outer == nullptr) || op.M == 0 || op.language != nullptr,
               "patch_ffn: language is a null pointer, but there are masks");
  XPATCH_CHECK(op.y == nullptr || op.M <= 1 || op.y_stride >= op.V,
               "patch_ffn: y row stride must be at least V=" << op.V << ", found " << op.y_stride);
  if (op.M == 0 || op.V == 0) return;
  const int64_t needed = patch_ffn_cuda_workspace(op);
  XPATCH_CHECK(op.workspace_bytes >= needed && (needed == 0 || op.workspace != nullptr),
               "patch_ffn: expected a workspace of " << needed << " bytes, found " << op.workspace_bytes);
  XPATCH_CHECK(reinterpret_cast<uintptr_t>(op.workspace) % 16 == 0, "patch_ffn: the workspace must be aligned to 16");
  auto* stream = static_cast<cudaStream_t>(stream_handle);
  switch (op.dtype) {
    case DType::fp32:
      launch_all<float>(op, stream);
      break;
    case DType::fp16:
      launch_all<__half>(op, stream);
      break;
    case DType::bf16:
      launch_all<__nv_bfloat16>(op, stream);
      break;
  }
  const cudaError_t status = cudaGetLastError();
  XPATCH_CHECK(status == cudaSuccess, "patch_ffn: CUDA launch failed: " << cudaGetErrorString(status));
}

}  // namespace xpatch
