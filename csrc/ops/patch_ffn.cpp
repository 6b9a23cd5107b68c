// Checks, choice of kernel, and the blocking of the CPU path.
#include "ops/patch_ffn.h"

#include <algorithm>
#include <memory>

#include "core/check.h"
#include "core/isa.h"
#include "core/parallel.h"

namespace xpatch {
namespace {

// Work is cut the same way whatever the number of threads; these sizes keep one block's operands in the L2 cache.
constexpr int64_t kPanelRows = 256;      // rows whose activations are held at once
constexpr int64_t kChunkNeurons = 1024;  // neurons whose activations are held at once
constexpr int64_t kBlockRows = 32;
constexpr int64_t kBlockNeurons = 32;
constexpr int64_t kBlockColumns = 128;
constexpr double kSerialWork = 1 << 17;  // multiply-adds below which waking threads costs more than it saves

int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

const PatchFfnKernels& kernels() {
  switch (isa_in_use()) {
#if defined(XPATCH_HAS_AVX512)
    case Isa::avx512:
      return avx512::patch_ffn_kernels;
#endif
#if defined(XPATCH_HAS_AVX2)
    case Isa::avx2:
      return avx2::patch_ffn_kernels;
#endif
    default:
      return portable::patch_ffn_kernels;
  }
}

using Buffer = std::unique_ptr<float[]>;

Buffer allocate(int64_t count) { return Buffer(new float[static_cast<size_t>(std::max<int64_t>(count, 1))]); }

// Rows [first, first + rows) of a matrix as fp32: the matrix itself, or a widened copy in `buffer`.
struct Rows {
  const float* data;
  int64_t stride;
};

Rows rows_as_fp32(const void* matrix, DType dtype, int64_t stride, int64_t first, int64_t rows, int64_t width,
                  const Buffer& buffer, int threads) {
  const char* start = static_cast<const char*>(matrix) + first * stride * size_of(dtype);
  if (dtype == DType::fp32) return {reinterpret_cast<const float*>(start), stride};
  parallel_for(blocks(rows, kBlockRows), threads, [&](int64_t block) {
    const int64_t end = std::min(rows, (block + 1) * kBlockRows);
    for (int64_t row = block * kBlockRows; row < end; ++row) {
      widen(start + row * stride * size_of(dtype), dtype, width, buffer.get() + row * width);
    }
  });
  return {buffer.get(), width};
}

// fired[rows,neurons] = h[rows,neurons] > 0
void mark_fired(const float* h, int64_t h_stride, int64_t rows, int64_t neurons, uint8_t* fired, int64_t fired_stride) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t n = 0; n < neurons; ++n) fired[row * fired_stride + n] = h[row * h_stride + n] > 0.0f;
  }
}

}  // namespace

void check(const PatchFfn& op) {
  XPATCH_CHECK(
      op.M >= 0 && op.D >= 0 && op.N >= 0 && op.V >= 0,
      "patch_ffn: sizes must not be negative, found M=" << op.M << " D=" << op.D << " N=" << op.N << " V=" << op.V);
  XPATCH_CHECK(op.M <= 1 || op.x_stride >= op.D,
               "patch_ffn: x row stride must be at least D=" << op.D << ", found " << op.x_stride);
  XPATCH_CHECK(op.N <= 1 || op.keys_stride >= op.D,
               "patch_ffn: keys row stride must be at least D=" << op.D << ", found " << op.keys_stride);
  XPATCH_CHECK(op.N <= 1 || op.values_stride >= op.V,
               "patch_ffn: values row stride must be at least V=" << op.V << ", found " << op.values_stride);
  XPATCH_CHECK(op.x != nullptr || op.M * op.D == 0, "patch_ffn: x is a null pointer");
  XPATCH_CHECK(op.keys != nullptr || op.N * op.D == 0, "patch_ffn: keys is a null pointer");
  XPATCH_CHECK(op.bias != nullptr || op.N == 0, "patch_ffn: bias is a null pointer");
  XPATCH_CHECK(op.values != nullptr || op.N * op.V == 0, "patch_ffn: values is a null pointer");
  XPATCH_CHECK(op.out != nullptr || op.M * op.V == 0, "patch_ffn: out is a null pointer");
}

void patch_ffn(const PatchFfn& op, int threads) {
  check(op);
  XPATCH_CHECK(threads >= 1, "patch_ffn: threads must be at least 1, found " << threads);
  if (op.M == 0 || (op.V == 0 && op.fired == nullptr)) return;

  const bool wide = op.dtype == DType::fp32;
  const double work = static_cast<double>(op.M) * static_cast<double>(op.N) * static_cast<double>(op.D + op.V);
  if (work < kSerialWork) threads = 1;
  const int64_t panel = std::min(op.M, kPanelRows), chunk = std::min(op.N, kChunkNeurons);
  const Buffer h = allocate(panel * chunk);
  const Buffer bias = allocate(op.N);
  const Buffer x_copy = wide ? nullptr : allocate(panel * op.D);
  const Buffer keys_copy = wide ? nullptr : allocate(chunk * op.D);
  const Buffer values_copy = wide ? nullptr : allocate(chunk * op.V);
  const Buffer out_copy = wide ? nullptr : allocate(panel * op.V);
  if (op.N > 0) widen(op.bias, op.dtype, op.N, bias.get());
  const PatchFfnKernels& kernel = kernels();
  const bool skip_silent = op.activation == Activation::relu;

  for (int64_t row0 = 0; row0 < op.M; row0 += panel) {
    const int64_t rows = std::min(panel, op.M - row0);
    const int64_t row_blocks = blocks(rows, kBlockRows);
    float* out = wide ? static_cast<float*>(op.out) + row0 * op.V : out_copy.get();
    if (op.N == 0) std::fill(out, out + rows * op.V, 0.0f);
    const Rows x = rows_as_fp32(op.x, op.dtype, op.x_stride, row0, rows, op.D, x_copy, threads);

    for (int64_t neuron0 = 0; neuron0 < op.N; neuron0 += chunk) {
      const int64_t neurons = std::min(chunk, op.N - neuron0);
      const Rows keys = rows_as_fp32(op.keys, op.dtype, op.keys_stride, neuron0, neurons, op.D, keys_copy, threads);
      const Rows values =
          rows_as_fp32(op.values, op.dtype, op.values_stride, neuron0, neurons, op.V, values_copy, threads);

      parallel_for(row_blocks * blocks(neurons, kBlockNeurons), threads, [&](int64_t task) {
        const int64_t row = task % row_blocks * kBlockRows, neuron = task / row_blocks * kBlockNeurons;
        kernel.scores(x.data + row * x.stride, x.stride, keys.data + neuron * keys.stride, keys.stride,
                      bias.get() + neuron0 + neuron, std::min(kBlockRows, rows - row),
                      std::min(kBlockNeurons, neurons - neuron), op.D, op.activation, h.get() + row * chunk + neuron,
                      chunk);
        if (op.fired != nullptr) {
          mark_fired(h.get() + row * chunk + neuron, chunk, std::min(kBlockRows, rows - row),
                     std::min(kBlockNeurons, neurons - neuron), op.fired + (row0 + row) * op.N + neuron0 + neuron,
                     op.N);
        }
      });
      parallel_for(row_blocks * blocks(op.V, kBlockColumns), threads, [&](int64_t task) {
        const int64_t row = task % row_blocks * kBlockRows, column = task / row_blocks * kBlockColumns;
        kernel.mix(h.get() + row * chunk, chunk, values.data + column, values.stride, std::min(kBlockRows, rows - row),
                   neurons, std::min(kBlockColumns, op.V - column), skip_silent, neuron0 > 0, out + row * op.V + column,
                   op.V);
      });
    }
    if (!wide) narrow(out, rows * op.V, op.dtype, static_cast<char*>(op.out) + row0 * op.V * size_of(op.dtype));
  }
}

#if !defined(XPATCH_HAS_CUDA)
void patch_ffn_cuda(const PatchFfn&, void*) {
  throw Error("patch_ffn: this build has no CUDA kernels (build option XPATCH_CUDA)");
}

int64_t patch_ffn_cuda_workspace(const PatchFfn&) { return 0; }
#endif

}  // namespace xpatch
