// Native tests of the core, meant to be built with AddressSanitizer and UBSan (XPATCH_SANITIZE=ON): every shape that
// makes a kernel run off its fast path, on buffers of exactly the right size. Run under each XPATCH_ISA. With an
// argument only a tenth of the shapes run: for ThreadSanitizer, which is slow.
#include <cmath>
#include <limits>
#include <thread>

#include "core/check.h"
#include "core/isa.h"
#include "core/parallel.h"
#include "ops/patch_ffn.h"
#include "screen/screen.h"
#include "testing.h"

int test_rows();  // rows.cpp

namespace {

using testing::DType;
using testing::element;
using testing::Matrix;
using xpatch::Activation;

std::mt19937 generator(0);
constexpr float kInfinity = std::numeric_limits<float>::infinity();

Matrix random_matrix(int64_t rows, int64_t width, int64_t gap, DType dtype) {
  return testing::random_matrix(generator, rows, width, gap, dtype);
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

// [rank, D], orthonormal in fp32: Gram and Schmidt, twice.
std::vector<float> random_basis(int64_t rank, int64_t D) {
  std::normal_distribution<double> normal;
  std::vector<double> rows(static_cast<size_t>(rank * D));
  for (int64_t i = 0; i < rank; ++i) {
    double* row = rows.data() + i * D;
    for (int64_t d = 0; d < D; ++d) row[d] = normal(generator);
    for (int pass = 0; pass < 2; ++pass) {
      for (int64_t j = 0; j <= i; ++j) {
        const double* other = rows.data() + j * D;
        double product = 0;
        for (int64_t d = 0; d < D; ++d) product += row[d] * other[d];
        const double length = std::sqrt(product);
        for (int64_t d = 0; d < D; ++d) row[d] = j == i ? row[d] / length : row[d] - product * other[d];
      }
    }
  }
  return std::vector<float>(rows.begin(), rows.end());
}

std::vector<uint8_t> pack(const Matrix& keys, const void* bias, DType dtype, Activation activation, int64_t rank,
                          int threads) {
  const std::vector<float> basis = random_basis(rank, keys.width);
  std::vector<uint8_t> packed(static_cast<size_t>(xpatch::packed_bytes(keys.rows, keys.width, rank)));
  xpatch::pack_keys(keys.bytes.data(), keys.stride, bias, dtype, keys.rows, keys.width, activation,
                    rank > 0 ? basis.data() : nullptr, rank, packed.data(), threads);
  return packed;
}

struct Shape {
  int64_t M, D, N, V, gap, rank, L;
  float offset;  // added to the biases: how many neurons fire
};

void test_patch_ffn(const Shape& shape, DType dtype, Activation activation) {
  const int64_t M = shape.M, D = shape.D, N = shape.N, V = shape.V, L = shape.L;
  const Matrix x = random_matrix(M, D, shape.gap, dtype), keys = random_matrix(N, D, shape.gap, dtype);
  const Matrix values = random_matrix(N, V, shape.gap, dtype);
  const Matrix inner = random_matrix(L, D, 0, dtype), outer = random_matrix(L, V, 0, dtype);
  Matrix bias = random_matrix(1, N, 0, dtype), infinite(1, N, 0, dtype);
  for (int64_t n = 0; n < N; ++n) {
    const float value =
        static_cast<float>(element(bias, dtype, 0, n)) + shape.offset * std::sqrt(static_cast<float>(D));
    xpatch::narrow(&value, 1, dtype, bias.bytes.data() + n * xpatch::size_of(dtype));
    xpatch::narrow(&kInfinity, 1, dtype, infinite.bytes.data() + n * xpatch::size_of(dtype));
  }
  std::vector<int64_t> language(static_cast<size_t>(M));
  for (auto& one : language) one = L > 0 ? static_cast<int64_t>(generator() % static_cast<uint32_t>(L)) : 0;

  Matrix out(M, V, 0, dtype);
  xpatch::PatchFfn op;
  op.x = x.bytes.data();
  op.keys = keys.bytes.data();
  op.bias = bias.bytes.data();
  op.values = values.bytes.data();
  op.out = out.bytes.data();
  op.M = M, op.D = D, op.N = N, op.V = V, op.L = L;
  op.x_stride = x.stride, op.keys_stride = keys.stride, op.values_stride = values.stride;
  op.dtype = dtype;
  op.activation = activation;
  if (L > 0) {
    op.mask_inner = inner.bytes.data();
    op.mask_outer = outer.bytes.data();
    op.language = language.data();
  }
  const std::vector<uint8_t> packed = pack(keys, bias.bytes.data(), dtype, activation, shape.rank, 1);
  const auto bytes = static_cast<int64_t>(packed.size());
  const xpatch::PatchFfnResult found = xpatch::patch_ffn(op, packed.data(), bytes, true, true, 1);
  EXPECT(!found.too_many && found.pairs == M * N && found.survivors <= found.pairs);

  // The same on more threads, and with every neuron computed.
  Matrix again(M, V, 0, dtype);
  op.out = again.bytes.data();
  const xpatch::PatchFfnResult threaded = xpatch::patch_ffn(op, packed.data(), bytes, true, true, 4);
  EXPECT(out.bytes == again.bytes && found.fired == threaded.fired && found.survivors == threaded.survivors);
  const std::vector<uint8_t> whole = pack(keys, infinite.bytes.data(), dtype, activation, 0, 3);
  again = Matrix(M, V, 0, dtype);
  op.out = again.bytes.data();
  const xpatch::PatchFfnResult all =
      xpatch::patch_ffn(op, whole.data(), static_cast<int64_t>(whole.size()), true, true, 2);
  EXPECT(out.bytes == again.bytes && found.fired == all.fired && all.survivors == M * N);
  again = Matrix(M, V, 0, dtype);
  op.out = again.bytes.data();
  const xpatch::PatchFfnResult free = xpatch::patch_ffn(op, packed.data(), bytes, false, false, 1);
  EXPECT(free.too_many || out.bytes == again.bytes);
  EXPECT(free.fired.empty());

  const double precision = dtype == DType::fp32 ? 1e-5 : dtype == DType::fp16 ? 2e-3 : 2e-2;
  size_t pair = 0;
  for (int64_t m = 0; m < M; ++m) {
    std::vector<double> expected(static_cast<size_t>(V)), scale(static_cast<size_t>(V), 1.0);
    for (int64_t n = 0; n < N; ++n) {
      double z = element(bias, dtype, 0, n), size = std::fabs(z);
      for (int64_t d = 0; d < D; ++d) {
        const double mask = L > 0 ? element(inner, dtype, language[static_cast<size_t>(m)], d) : 1.0;
        const double term = element(x, dtype, m, d) * mask * element(keys, dtype, n, d);
        z += term, size += std::fabs(term);
      }
      const bool fired = pair + 1 < found.fired.size() && found.fired[pair] == m && found.fired[pair + 1] == n;
      if (fired) pair += 2;
      if (std::fabs(z) > 1e-5 * size) EXPECT(fired == (z > 0));
      const double h = activate(activation, z);
      for (int64_t v = 0; v < V; ++v) {
        expected[static_cast<size_t>(v)] += h * element(values, dtype, n, v);
        scale[static_cast<size_t>(v)] += std::fabs(size * element(values, dtype, n, v));
      }
    }
    for (int64_t v = 0; v < V; ++v) {
      const double mask = L > 0 ? element(outer, dtype, language[static_cast<size_t>(m)], v) : 1.0;
      const double error = std::fabs(element(out, dtype, m, v) - expected[static_cast<size_t>(v)] * mask);
      EXPECT(error <= precision * scale[static_cast<size_t>(v)] * std::fmax(1.0, std::fabs(mask)));
    }
  }
  EXPECT(pair == found.fired.size());
}

// Rows and keys that cannot be screened: the bits are those of computing everything, whatever they hold.
void test_wild_numbers() {
  const float some[] = {0.0f,  -0.0f,  1e-45f, -1e-38f,   1e-20f,     1.0f,          -3.0f,    1e3f,
                        1e17f, -1e30f, 3e38f,  kInfinity, -kInfinity, std::nanf(""), 0x1p-40f, 0x1p55f};
  const auto pick = [&] { return generator() % 4 == 0 ? some[generator() % 16] : some[4 + generator() % 4]; };
  for (int round = 0; round < 300; ++round) {
    const int64_t M = 1 + round % 5, D = 1 + round % 40, N = 1 + round % 37, V = 3;
    const auto activation = static_cast<Activation>(round % 4);
    std::vector<float> x(static_cast<size_t>(M * D)), keys(static_cast<size_t>(N * D)), bias(static_cast<size_t>(N));
    std::vector<float> values(static_cast<size_t>(N * V), 1.0f), one(static_cast<size_t>(M * V)), two(one);
    for (auto& a : x) a = pick();
    for (auto& a : keys) a = pick();
    for (auto& a : bias) a = -std::fabs(pick());
    xpatch::PatchFfn op;
    op.x = x.data(), op.keys = keys.data(), op.bias = bias.data(), op.values = values.data();
    op.M = M, op.D = D, op.N = N, op.V = V;
    op.x_stride = op.keys_stride = D, op.values_stride = V;
    op.activation = activation;
    const std::vector<float> infinite(static_cast<size_t>(N), kInfinity);
    std::vector<int64_t> fired;
    for (const bool screened : {true, false}) {
      std::vector<uint8_t> packed(static_cast<size_t>(xpatch::packed_bytes(N, D, 0)));
      xpatch::pack_keys(keys.data(), D, screened ? bias.data() : infinite.data(), DType::fp32, N, D, activation,
                        nullptr, 0, packed.data(), 1);
      op.out = screened ? one.data() : two.data();
      const auto bytes = static_cast<int64_t>(packed.size());
      const auto result = xpatch::patch_ffn(op, packed.data(), bytes, true, true, 2);
      EXPECT(screened || (result.survivors == M * N && fired == result.fired));
      fired = result.fired;
    }
    for (size_t i = 0; i < one.size(); ++i) {
      EXPECT(std::memcmp(&one[i], &two[i], sizeof(float)) == 0 || (std::isnan(one[i]) && std::isnan(two[i])));
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

  // An exception (memory that is not there) reaches the caller, whichever thread met it, and the pool works on.
  for (int threads : {1, 2, 7}) {
    for (int64_t bad : {0, 3, 999}) {
      bool thrown = false;
      try {
        xpatch::parallel_for(1000, threads, [&](int64_t i) {
          if (i == bad) throw std::bad_alloc();
        });
      } catch (const std::bad_alloc&) {
        thrown = true;
      }
      EXPECT(thrown);
    }
    count_once();
  }
}

template <typename Task>
void expect_error(const Task& task) {
  bool thrown = false;
  try {
    task();
  } catch (const xpatch::Error&) {
    thrown = true;
  }
  EXPECT(thrown);
}

void test_checks() {
  const Matrix keys = random_matrix(20, 8, 0, DType::fp32), bias = random_matrix(1, 20, 0, DType::fp32);
  const std::vector<uint8_t> packed = pack(keys, bias.bytes.data(), DType::fp32, Activation::relu, 3, 1);
  const auto bytes = static_cast<int64_t>(packed.size());
  const xpatch::PackedKeys view = xpatch::read_packed(packed.data(), bytes, 20, 8, Activation::relu);
  EXPECT(view.count == 2 && view.rank == 3 && view.basis != nullptr);
  expect_error([&] { xpatch::read_packed(packed.data(), bytes, 21, 8, Activation::relu); });
  expect_error([&] { xpatch::read_packed(packed.data(), bytes, 20, 7, Activation::relu); });
  expect_error([&] { xpatch::read_packed(packed.data(), bytes, 20, 8, Activation::gelu); });
  expect_error([&] { xpatch::read_packed(packed.data(), bytes - 1, 20, 8, Activation::relu); });
  expect_error([&] { xpatch::read_packed(nullptr, bytes, 20, 8, Activation::relu); });
  const std::vector<float> basis = random_basis(3, 8);
  std::vector<uint8_t> target(packed.size());
  const auto pack_as = [&](int64_t N, int64_t D, int64_t stride, Activation activation, const float* along,
                           int64_t rank) {
    xpatch::pack_keys(keys.bytes.data(), stride, bias.bytes.data(), DType::fp32, N, D, activation, along, rank,
                      target.data(), 1);
  };
  expect_error([&] { pack_as(20, 8, 8, Activation::identity, nullptr, 0); });
  expect_error([&] { pack_as(20, 0, 8, Activation::relu, nullptr, 0); });
  expect_error([&] { pack_as(20, 8, 7, Activation::relu, nullptr, 0); });
  expect_error([&] { pack_as(-1, 8, 8, Activation::relu, nullptr, 0); });
  expect_error([&] { pack_as(20, 8, 8, Activation::relu, nullptr, 3); });
  expect_error([&] { pack_as(20, 8, 8, Activation::relu, basis.data(), 9); });
  const std::vector<float> skewed(24, 1.0f);
  expect_error([&] { pack_as(20, 8, 8, Activation::relu, skewed.data(), 3); });
  xpatch::PatchFfn op;
  op.M = 1, op.D = 8, op.x_stride = 8, op.V = 1, op.N = 20;
  expect_error([&] { xpatch::patch_ffn(op, packed.data(), bytes, false, false, 1); });
}

}  // namespace

int main(int argc, char**) {
  test_conversions();
  test_parallel_for();
  test_checks();
  test_wild_numbers();
  int cases = test_rows();
  for (int dtype = 0; dtype < 3; ++dtype) {
    for (int activation = 0; activation < 4; ++activation) {
      for (int64_t M : {0, 1, 3, 6, 33}) {
        for (int64_t D : {1, 7, 16, 35}) {
          for (int64_t N : {0, 1, 9, 40}) {
            for (int64_t V : {0, 1, 18, 131}) {
              const Shape shape = {M,
                                   D,
                                   N,
                                   V,
                                   cases % 3,
                                   cases % 4 == 0 ? std::min<int64_t>(D, 5) : 0,
                                   cases % 5 == 0 ? 2 : 0,
                                   static_cast<float>(cases % 3 - 2)};
              if (argc == 1 || cases % 10 == 0) {
                test_patch_ffn(shape, static_cast<DType>(dtype), static_cast<Activation>(activation));
              }
              ++cases;
            }
          }
        }
      }
    }
  }
  test_patch_ffn({259, 5, 1030, 140, 1, 0, 0, -2.0f}, DType::fp16, Activation::relu);
  test_patch_ffn({259, 5, 1030, 140, 0, 3, 2, -2.0f}, DType::fp32, Activation::gelu);
  test_patch_ffn({20, 300, 100, 5, 0, 0, 0, -1.0f}, DType::fp32, Activation::relu);
  test_patch_ffn({20, 300, 100, 5, 3, 64, 3, -2.0f}, DType::bf16, Activation::relu);
  test_patch_ffn({4100, 3, 20, 2, 0, 0, 0, -1.0f}, DType::fp32, Activation::relu);
  std::printf("%d shapes, %s\n", cases, xpatch::isa_name(xpatch::isa_in_use()));
}
