// Tests of the CUDA kernels against float64: on a GPU, or without one on the emulator (XPATCH_CUDA_EMULATED). Buffers
// have exactly the right size; the workspace starts as NaN; what must not be read is NaN or poisoned.
#if defined(XPATCH_CUDA_EMULATED)
#define patch_ffn_cuda emulated_patch_ffn_cuda  // beside the core's own, of whatever build
#define patch_ffn_cuda_workspace emulated_patch_ffn_cuda_workspace
#include "ops/patch_ffn_cuda.cu"
#endif

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "core/check.h"
#include "cuda_problem.h"
#include "ops/patch_ffn.h"

namespace {

int cases = 0;

void test(const Case& c) {
  const Problem problem(c);
  const std::vector<char> first = problem.run(0);
  problem.verify(first);
  EXPECT(first == problem.run(2));
  ++cases;
}

void test_shapes(int most) {
  const int64_t rows[] = {1, 2, 3, 8, 9, 17, 33, 70, 0}, widths[] = {1, 8, 7, 64, 100},
                neurons[] = {0, 1, 31, 64, 100, 600};
  const int64_t outs[] = {1, 8, 19, 64};
  for (int i = 0; i < most; ++i) {
    Case c;
    c.M = rows[generator() % 9], c.D = widths[generator() % 5], c.N = neurons[generator() % 6],
    c.V = outs[generator() % 4];
    c.dtype = static_cast<DType>(i % 3), c.activation = static_cast<Activation>(i % 5);
    c.gap = i % 4 == 0 ? 3 : i % 4 == 1 ? 8 : 0, c.offset = i % 7 == 0 ? 1 : 0;
    c.middle = i % 2 == 0 ? -2.0f : 0.0f;
    c.masks = generator() % 3 == 0;
    c.y = static_cast<int>(generator() % 6) - 3;
    c.y = c.y < 0 ? -1 : c.y;
    c.in_place = c.y >= 0 && generator() % 2 == 0;
    c.nan_row = i % 5 == 3;
    if (generator() % 3 == 1) c.capacity = c.N + static_cast<int64_t>(generator() % 3) * 33, c.epoch = i % 2;
    test(c);
  }
}

void test_large() {
  // Several tiles of columns, several shares of neurons, a second panel of rows; everything fires.
  Case c;
  c.M = 5, c.D = 16, c.N = 1500, c.V = 2100, c.activation = Activation::identity, c.dtype = DType::bf16;
  test(c);
  c = {};
  c.M = 258, c.D = 8, c.N = 70, c.V = 12;
  test(c);
  c.dtype = DType::fp16, c.activation = Activation::gelu, c.capacity = 90, c.epoch = 1;
  test(c);
  // More groups of neurons than shares: a block compacts several, one after the other.
  c = {};
  c.M = 256, c.D = 8, c.N = 4700, c.V = 8, c.activation = Activation::identity, c.dtype = DType::bf16;
  test(c);
  // More neurons than one pass holds.
  c = {};
  c.M = 1, c.D = 4, c.N = 65536 + 700, c.V = 3, c.middle = -2.0f, c.capacity = 65536 + 900, c.y = 1;
  test(c);
}

// The value rows of silent neurons are not read, not even once.
void test_silent_values() {
  Case c;
  c.M = 1, c.D = 16, c.N = 700, c.V = 24, c.middle = -1.0f;
  Problem problem(c);
  int fires = 0;
  for (int64_t n = 0; n < c.N; ++n) {
    double z = problem.bias.get(0, n);
    for (int64_t d = 0; d < c.D; ++d) z += static_cast<double>(problem.x.get(0, d)) * problem.keys.get(n, d);
    if (z < -1e-4) {
      problem.silent.push_back(n);
      for (int64_t v = 0; v < c.V; ++v) problem.values.set(n, v, kNan);
    } else if (z > 1e-4) {
      ++fires;
    }
  }
  EXPECT(fires > 10 && fires < 500);
  const std::vector<char> bytes = problem.run(0);
  for (int64_t v = 0; v < c.V; ++v) {
    float value;
    std::memcpy(&value, bytes.data() + v * 4, 4);
    EXPECT(std::isfinite(value));
  }
}

void test_unknown_language() {
  Case c;
  c.M = 4, c.D = 8, c.N = 40, c.V = 6, c.masks = true;
  Problem problem(c);
  problem.language[2] = 3;
  problem.language[3] = -1;
  Matrix out(c.M, c.V, 0, c.dtype);
  out.bytes = problem.run(0);
  for (int64_t m = 0; m < c.M; ++m) EXPECT(std::isnan(out.get(m, 0)) == (m >= 2));
}

// Live counts that no writer should leave there stay inside the buffers.
void test_live_is_bounded() {
  for (const int64_t live : {int64_t{-5}, int64_t{1} << 40}) {
    Case c;
    c.M = 1, c.D = 4, c.N = 10, c.V = 4;
    const Problem problem(c);
    const Device x(problem.x.bytes), keys(problem.keys.bytes), bias(problem.bias.bytes), values(problem.values.bytes);
    const Device out(std::vector<char>(16));
    const int64_t state[3] = {0, live, live};
    std::vector<char> bytes(sizeof state);
    std::memcpy(bytes.data(), state, sizeof state);
    const Device state_(bytes);
    xpatch::PatchFfn op;
    op.x = x.at(), op.keys = keys.at(), op.bias = bias.at(), op.values = values.at(), op.out = out.at();
    op.M = 1, op.D = 4, op.N = 10, op.V = 4, op.x_stride = 4, op.keys_stride = 4, op.values_stride = 4;
    op.epoch = reinterpret_cast<const int64_t*>(state_.at()), op.live = op.epoch + 1;
    op.workspace_bytes = xpatch::patch_ffn_cuda_workspace(op);
    const Device workspace(std::vector<char>(static_cast<size_t>(op.workspace_bytes), '\xff'));
    op.workspace = workspace.at();
    xpatch::patch_ffn_cuda(op, nullptr);
    if (live > 0) {
      problem.verify(out.bytes());
    } else {
      EXPECT(out.bytes() == std::vector<char>(16, '\0'));
    }
  }
}

void test_checks() {
  const auto refused = [](const xpatch::PatchFfn& op) {
    try {
      xpatch::patch_ffn_cuda(op, nullptr);
    } catch (const xpatch::Error&) {
      return true;
    }
    return false;
  };
  int64_t some = 0;
  xpatch::PatchFfn op;
  op.x = op.keys = op.bias = op.values = op.out = &some;
  op.M = op.D = op.N = op.V = 1;
  EXPECT(refused(op));  // no workspace
  op.M = 0;
  EXPECT(!refused(op));
  op.live = &some;
  EXPECT(refused(op));  // no epoch
  op.live = nullptr, op.M = 1, op.mask_outer = &some;
  EXPECT(refused(op));  // no language
}

}  // namespace

int main(int arguments, char** words) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("skipped: no CUDA device\n");
    return 77;
  }
  test_checks();
  test_live_is_bounded();
  test_unknown_language();
  test_silent_values();
  test_shapes(arguments > 1 ? std::atoi(words[1]) : 150);
  test_large();
  std::printf("%d shapes\n", cases);
}
