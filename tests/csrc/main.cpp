// Native tests of the core, meant to be built with AddressSanitizer and UBSan (XPATCH_SANITIZE=ON): every shape that
// makes a kernel run off its fast path, on buffers of exactly the right size. Run under each XPATCH_ISA.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "core/check.h"
#include "core/dtype.h"
#include "core/isa.h"
#include "core/parallel.h"
#include "ops/patch_ffn.h"

int test_rows();  // rows.cpp

namespace {

#define EXPECT(condition)                                                          \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                \
    }                                                                              \
  } while (false)

using xpatch::Activation;
using xpatch::DType;

std::mt19937 generator(0);

struct Matrix {
  int64_t rows, width, stride;
  std::vector<char> bytes;  // ends with the last element of the last row

  Matrix(int64_t rows, int64_t width, int64_t gap, DType dtype)
      : rows(rows),
        width(width),
        stride(width + gap),
        bytes(static_cast<size_t>(rows > 0 ? ((rows - 1) * stride + width) * xpatch::size_of(dtype) : 0)) {}
};

Matrix random_matrix(int64_t rows, int64_t width, int64_t gap, DType dtype) {
  Matrix matrix(rows, width, gap, dtype);
  std::normal_distribution<float> normal;
  for (size_t at = 0; at < matrix.bytes.size(); at += static_cast<size_t>(xpatch::size_of(dtype))) {
    const float value = normal(generator);
    xpatch::narrow(&value, 1, dtype, matrix.bytes.data() + at);
  }
  return matrix;
}

double element(const Matrix& matrix, DType dtype, int64_t row, int64_t column) {
  float value;
  xpatch::widen(matrix.bytes.data() + (row * matrix.stride + column) * xpatch::size_of(dtype), dtype, 1, &value);
  return value;
}

double activate(Activation activation, double z) {
  switch (activation) {
    case Activation::relu:
      return z < 0 ? 0 : z;
    case Activation::gelu:
      return 0.5 * z * (1 + std::erf(z / std::sqrt(2.0)));
    case Activation::gelu_tanh:
      return 0.5 * z * (1 + std::tanh(std::sqrt(2 / 3.14159265358979323846) * (z + 0.044715 * z * z * z)));
    case Activation::silu:
      return z / (1 + std::exp(-z));
    default:
      return z;
  }
}

void test_patch_ffn(int64_t M, int64_t D, int64_t N, int64_t V, int64_t gap, DType dtype, Activation activation) {
  const Matrix x = random_matrix(M, D, gap, dtype), keys = random_matrix(N, D, gap, dtype);
  const Matrix bias = random_matrix(1, N, 0, dtype), values = random_matrix(N, V, gap, dtype);
  Matrix out(M, V, 0, dtype), again(M, V, 0, dtype);
  xpatch::PatchFfn op;
  op.x = x.bytes.data();
  op.keys = keys.bytes.data();
  op.bias = bias.bytes.data();
  op.values = values.bytes.data();
  op.out = out.bytes.data();
  op.M = M, op.D = D, op.N = N, op.V = V;
  op.x_stride = x.stride, op.keys_stride = keys.stride, op.values_stride = values.stride;
  op.dtype = dtype;
  op.activation = activation;
  xpatch::patch_ffn(op, 1);
  std::vector<uint8_t> fired(static_cast<size_t>(M * N), 2);
  op.out = again.bytes.data();
  op.fired = fired.data();
  xpatch::patch_ffn(op, 4);
  EXPECT(out.bytes == again.bytes);

  const double precision = dtype == DType::fp32 ? 1e-5 : dtype == DType::fp16 ? 2e-3 : 2e-2;
  for (int64_t m = 0; m < M; ++m) {
    std::vector<double> expected(static_cast<size_t>(V)), scale(static_cast<size_t>(V), 1.0);
    for (int64_t n = 0; n < N; ++n) {
      double z = element(bias, dtype, 0, n);
      for (int64_t d = 0; d < D; ++d) z += element(x, dtype, m, d) * element(keys, dtype, n, d);
      if (std::fabs(z) > 1e-4) EXPECT(fired[static_cast<size_t>(m * N + n)] == (z > 0));
      const double h = activate(activation, z);
      for (int64_t v = 0; v < V; ++v) {
        expected[static_cast<size_t>(v)] += h * element(values, dtype, n, v);
        scale[static_cast<size_t>(v)] += std::fabs(h * element(values, dtype, n, v));
      }
    }
    for (int64_t v = 0; v < V; ++v) {
      const double error = std::fabs(element(out, dtype, m, v) - expected[static_cast<size_t>(v)]);
      EXPECT(error <= precision * scale[static_cast<size_t>(v)]);
    }
  }
}

void test_conversions() {
  for (uint32_t code = 0; code < 0x10000; ++code) {
    const auto half = static_cast<uint16_t>(code);
    const float from_fp16 = xpatch::fp32_from_fp16(half), from_bf16 = xpatch::fp32_from_bf16(half);
    if (from_fp16 == from_fp16) EXPECT(xpatch::fp16_from_fp32(from_fp16) == half);
    if (from_bf16 == from_bf16) EXPECT(xpatch::bf16_from_fp32(from_bf16) == half);
  }
  EXPECT(xpatch::fp32_from_fp16(0x3C00) == 1.0f && xpatch::fp32_from_fp16(0x0001) == 0x1p-24f);
  EXPECT(xpatch::fp16_from_fp32(65520.0f) == 0x7C00 && xpatch::fp16_from_fp32(65519.0f) == 0x7BFF);
  EXPECT(xpatch::bf16_from_fp32(1.0f + 0x1p-8f) == 0x3F80);  // tie, to even
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT(std::isnan(xpatch::fp32_from_fp16(xpatch::fp16_from_fp32(nan))));
  EXPECT(std::isnan(xpatch::fp32_from_bf16(xpatch::bf16_from_fp32(nan))));
}

void test_parallel_for() {
  const auto count_once = [] {
    for (int threads : {1, 2, 7}) {
      for (int64_t tasks : {0, 1, 5, 1000}) {
        std::vector<int> hits(static_cast<size_t>(tasks));
        xpatch::parallel_for(tasks, threads, [&](int64_t i) { ++hits[static_cast<size_t>(i)]; });
        for (int hit : hits) EXPECT(hit == 1);
      }
    }
  };
  count_once();
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i)
    callers.emplace_back([&] {
      for (int j = 0; j < 50; ++j) count_once();
    });
  for (auto& caller : callers) caller.join();
}

void test_checks() {
  xpatch::PatchFfn op;
  op.M = 1, op.D = 2, op.x_stride = 2, op.V = 1;
  bool thrown = false;
  try {
    xpatch::patch_ffn(op, 1);
  } catch (const xpatch::Error&) {
    thrown = true;
  }
  EXPECT(thrown);
}

}  // namespace

int main() {
  test_conversions();
  test_parallel_for();
  test_checks();
  int cases = test_rows();
  for (int dtype = 0; dtype < 3; ++dtype) {
    for (int activation = 0; activation < 5; ++activation) {
      for (int64_t M : {0, 1, 3, 6, 33}) {
        for (int64_t D : {1, 7, 16, 35}) {
          for (int64_t N : {0, 1, 9, 40}) {
            for (int64_t V : {1, 18, 67, 131}) {
              test_patch_ffn(M, D, N, V, cases % 3, static_cast<DType>(dtype), static_cast<Activation>(activation));
              ++cases;
            }
          }
        }
      }
    }
  }
  test_patch_ffn(259, 5, 1030, 140, 1, DType::fp16, Activation::relu);
  test_patch_ffn(259, 5, 1030, 140, 0, DType::fp32, Activation::gelu);
  std::printf("%d shapes, %s\n", cases, xpatch::isa_name(xpatch::isa_in_use()));
}
