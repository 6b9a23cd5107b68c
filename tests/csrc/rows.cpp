// Native tests of the operators that choose per row: lowrank, mask and ball.
#include <cmath>
#include <limits>

#include "core/check.h"
#include "core/isa.h"
#include "ops/ball.h"
#include "ops/lowrank.h"
#include "ops/mask.h"
#include "testing.h"

namespace {

using testing::DType;
using testing::element;
using testing::Matrix;

std::mt19937 generator(1);

Matrix random_matrix(int64_t rows, int64_t width, int64_t gap, DType dtype) {
  return testing::random_matrix(generator, rows, width, gap, dtype);
}

void test_lowrank(int64_t M, int64_t D, int64_t V, int64_t G, int64_t repeat, double share, int64_t gap, DType dtype) {
  std::vector<int64_t> offsets{0};
  for (int64_t g = 0; g < G; ++g) offsets.push_back(offsets.back() + static_cast<int64_t>(generator() % 20));
  const int64_t R = offsets.back();
  const Matrix x = random_matrix(M, D, gap, dtype), down = random_matrix(R, D, gap, dtype);
  const Matrix up = random_matrix(R, V, gap, dtype);
  std::vector<uint8_t> rows(static_cast<size_t>(M / repeat * G));
  for (auto& row : rows) row = static_cast<double>(generator() % 1000) < 1000 * share ? 1 : 0;
  Matrix out(M, V, 0, dtype), again(M, V, 0, dtype);
  xpatch::Lowrank op;
  op.x = x.bytes.data();
  op.down = down.bytes.data();
  op.up = up.bytes.data();
  op.offsets = offsets.data();
  op.rows = rows.data();
  op.out = out.bytes.data();
  op.M = M, op.D = D, op.R = R, op.V = V, op.G = G, op.repeat = repeat;
  op.x_stride = x.stride, op.down_stride = down.stride, op.up_stride = up.stride;
  op.dtype = dtype;
  const std::vector<char> untouched = out.bytes;
  const bool done = xpatch::lowrank(op, 1);
  op.out = again.bytes.data();
  EXPECT(xpatch::lowrank(op, 5) == done);
  EXPECT(out.bytes == again.bytes);
  if (!done) {
    EXPECT(out.bytes == untouched);
    return;
  }
  const double precision = dtype == DType::fp32 ? 1e-5 : dtype == DType::fp16 ? 2e-3 : 2e-2;
  for (int64_t m = 0; m < M; ++m) {
    std::vector<double> expected(static_cast<size_t>(V)), scale(static_cast<size_t>(V), 1.0);
    for (int64_t g = 0; g < G; ++g) {
      if (!rows[static_cast<size_t>(m / repeat * G + g)]) continue;
      for (int64_t n = offsets[static_cast<size_t>(g)]; n < offsets[static_cast<size_t>(g + 1)]; ++n) {
        double h = 0;
        for (int64_t d = 0; d < D; ++d) h += element(x, dtype, m, d) * element(down, dtype, n, d);
        for (int64_t v = 0; v < V; ++v) {
          expected[static_cast<size_t>(v)] += h * element(up, dtype, n, v);
          scale[static_cast<size_t>(v)] += std::fabs(h * element(up, dtype, n, v));
        }
      }
    }
    for (int64_t v = 0; v < V; ++v) {
      const double error = std::fabs(element(out, dtype, m, v) - expected[static_cast<size_t>(v)]);
      EXPECT(error <= precision * scale[static_cast<size_t>(v)]);
    }
  }
}

void test_lowrank_offsets() {
  float numbers[64];
  for (int i = 0; i < 64; ++i) numbers[i] = static_cast<float>(i + 1);
  const uint8_t rows[2] = {1, 0};
  float out = 7;
  xpatch::Lowrank op;
  op.x = op.down = op.up = numbers;
  op.rows = rows;
  op.out = &out;
  op.M = op.D = op.V = 1, op.R = 64, op.G = 2;
  op.x_stride = op.down_stride = op.up_stride = 1;
  const int64_t least = std::numeric_limits<int64_t>::min();
  const int64_t wrong[][3] = {{0, 65, 64}, {0, -1, 64}, {1, 1, 64}, {0, 1, 63}, {0, least, 64}, {-1, 0, 64}};
  for (const auto& offsets : wrong) {
    op.offsets = offsets;
    EXPECT(!xpatch::lowrank(op, 1) && out == 7);
  }
  const int64_t right[3] = {0, 1, 64};
  op.offsets = right;
  EXPECT(xpatch::lowrank(op, 1) && out == 1);
}

void test_mask(int64_t M, int64_t D, int64_t L, int64_t repeat, int64_t gap, DType dtype) {
  const Matrix x = random_matrix(M, D, gap, dtype), masks = random_matrix(L, D, gap, dtype);
  std::vector<int64_t> language(static_cast<size_t>(M / repeat));
  for (auto& one : language) one = static_cast<int64_t>(generator() % static_cast<uint32_t>(L));
  Matrix out(M, D, 0, dtype), again(M, D, 0, dtype);
  xpatch::Mask op;
  op.x = x.bytes.data();
  op.masks = masks.bytes.data();
  op.language = language.data();
  op.out = out.bytes.data();
  op.M = M, op.D = D, op.L = L, op.repeat = repeat;
  op.x_stride = x.stride, op.masks_stride = masks.stride;
  op.dtype = dtype;
  EXPECT(xpatch::mask(op, 1));
  op.out = again.bytes.data();
  EXPECT(xpatch::mask(op, 4));
  EXPECT(out.bytes == again.bytes);
  const double precision = dtype == DType::fp32 ? 1e-7 : dtype == DType::fp16 ? 1e-3 : 8e-3;
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t d = 0; d < D; ++d) {
      const double exact =
          element(x, dtype, m, d) * element(masks, dtype, language[static_cast<size_t>(m / repeat)], d);
      EXPECT(std::fabs(element(out, dtype, m, d) - exact) <= precision * std::fabs(exact) + 1e-7);
    }
  }
  for (int64_t wrong : {int64_t{-1}, L, std::numeric_limits<int64_t>::min(), std::numeric_limits<int64_t>::max()}) {
    if (language.empty()) break;
    language.back() = wrong;
    EXPECT(!xpatch::mask(op, 1));
  }
}

void test_ball(int64_t M, int64_t D, int64_t K, int64_t gap, float wide, DType dtype) {
  const Matrix keys = random_matrix(K, D, gap, dtype), near = random_matrix(M, D, gap, dtype);
  Matrix x = near;
  for (int64_t m = 0; m < M && K > 0; m += 2) {  // every other row lies near a key
    const int64_t k = static_cast<int64_t>(generator() % static_cast<uint32_t>(K));
    for (int64_t d = 0; d < D; ++d) {
      const float value = static_cast<float>(element(keys, dtype, k, d) + 0.3 * element(near, dtype, m, d));
      xpatch::narrow(&value, 1, dtype, x.bytes.data() + (m * x.stride + d) * xpatch::size_of(dtype));
    }
  }
  Matrix radii = random_matrix(1, K, 0, dtype);
  for (int64_t k = 0; k < K; ++k) {
    const float value = std::fabs(static_cast<float>(element(radii, dtype, 0, k))) * wide;
    xpatch::narrow(&value, 1, dtype, radii.bytes.data() + k * xpatch::size_of(dtype));
  }
  std::vector<uint8_t> out(static_cast<size_t>(M), 2), again(static_cast<size_t>(M), 2);
  xpatch::Ball op;
  op.x = x.bytes.data();
  op.keys = keys.bytes.data();
  op.radii = radii.bytes.data();
  op.out = out.data();
  op.M = M, op.D = D, op.K = K;
  op.x_stride = x.stride, op.keys_stride = keys.stride;
  op.dtype = dtype;
  xpatch::ball(op, 1);
  op.out = again.data();
  xpatch::ball(op, 4);
  EXPECT(out == again);
  for (int64_t m = 0; m < M; ++m) {
    double best = std::numeric_limits<double>::infinity(), second = best;
    int64_t nearest = -1;
    for (int64_t k = 0; k < K; ++k) {
      double squared = 0;
      for (int64_t d = 0; d < D; ++d) {
        squared += std::pow(element(x, dtype, m, d) - element(keys, dtype, k, d), 2);
      }
      const double distance = std::sqrt(squared);
      if (distance < best) {
        second = best;
        best = distance;
        nearest = k;
      } else if (distance < second) {
        second = distance;
      }
    }
    if (nearest < 0) {
      EXPECT(out[static_cast<size_t>(m)] == 0);
      continue;
    }
    const double radius = element(radii, dtype, 0, nearest);
    if (std::fabs(best - radius) < 1e-5 * (1 + best) || second - best < 1e-5 * (1 + best)) continue;  // fp32 may differ
    EXPECT(out[static_cast<size_t>(m)] == (best <= radius ? 1 : 0));
  }
}

template <typename Run>
bool throws(const Run& run) {
  try {
    run();
  } catch (const xpatch::Error&) {
    return true;
  }
  return false;
}

}  // namespace

int test_rows() {
  int cases = 0;
  for (int code = 0; code < 3; ++code) {
    const auto dtype = static_cast<DType>(code);
    for (int64_t M : {0, 1, 6, 34}) {
      for (int64_t width : {0, 1, 7, 16, 67, 131}) {
        for (int64_t count : {0, 1, 3, 11}) {
          const int64_t repeat = M % 2 == 0 ? 2 : 1, gap = cases % 3;
          test_lowrank(M, width, 1 + width / 2, count, repeat, 0.3, gap, dtype);
          test_lowrank(M, 18, width, count, 1, cases % 2 == 0 ? 0.05 : 1.0, gap, dtype);
          test_mask(M, width, 1 + count, repeat, gap, dtype);
          test_ball(M, width, 25 * count, gap, 0.5f + 2.0f * static_cast<float>(gap), dtype);
          ++cases;
        }
      }
    }
  }
  test_lowrank(300, 40, 50, 30, 1, 0.2, 1, DType::bf16);
  test_mask(300, 600, 3, 1, 1, DType::fp16);
  test_ball(300, 70, 600, 1, 4.0f, DType::fp32);
  test_lowrank_offsets();
  EXPECT(throws([] { xpatch::lowrank(xpatch::Lowrank(), 1); }));  // no offsets
  xpatch::Mask mask;
  mask.M = 1;
  EXPECT(throws([&] { xpatch::mask(mask, 1); }));
  xpatch::Ball ball;
  ball.M = 1;
  EXPECT(throws([&] { xpatch::ball(ball, 1); }));
  return cases;
}
