// What the tests of the CUDA kernels share: device memory of exactly the right size, cases, and problems that are drawn
// for a case, run on the device and held against float64.
#pragma once

#if !defined(XPATCH_CUDA_EMULATED)
#include <cuda_runtime.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "core/dtype.h"
#include "ops/patch_ffn.h"

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
const float kNan = std::numeric_limits<float>::quiet_NaN();

void order_of_threads(int order) {
#if defined(XPATCH_CUDA_EMULATED)
  emulated::machine().order = order;
#else
  (void)order;
#endif
}

// Device memory; `offset` bytes in front make a pointer that is not aligned.
class Device {
 public:
  explicit Device(const std::vector<char>& bytes, size_t offset = 0) : size_(bytes.size()), offset_(offset) {
    EXPECT(cudaMalloc(&memory_, std::max<size_t>(size_ + offset, 1)) == cudaSuccess);
    EXPECT(cudaMemcpy(at(), bytes.data(), size_, cudaMemcpyHostToDevice) == cudaSuccess);
  }
  Device(const Device&) = delete;
  ~Device() {
    forbid(0, 0);
    cudaFree(memory_);
  }

  char* at() const { return static_cast<char*>(memory_) + offset_; }

  std::vector<char> bytes() const {
    std::vector<char> found(size_);
    EXPECT(cudaDeviceSynchronize() == cudaSuccess);
    EXPECT(cudaMemcpy(found.data(), at(), size_, cudaMemcpyDeviceToHost) == cudaSuccess);
    return found;
  }

  // Under AddressSanitizer a kernel that reads these bytes is stopped; no bytes: all are free again.
  void forbid(int64_t first, int64_t count) const {
#if defined(__SANITIZE_ADDRESS__) && defined(XPATCH_CUDA_EMULATED)
    if (count > 0) {
      __asan_poison_memory_region(at() + first, static_cast<size_t>(count));
    } else {
      __asan_unpoison_memory_region(memory_, std::max<size_t>(size_ + offset_, 1));
    }
#else
    (void)first, (void)count;
#endif
  }

 private:
  void* memory_ = nullptr;
  size_t size_, offset_;
};

// A matrix on the host; its bytes end with the last element of the last row.
struct Matrix {
  int64_t rows, width, stride;
  DType dtype;
  std::vector<char> bytes;

  Matrix(int64_t rows, int64_t width, int64_t gap, DType dtype)
      : rows(rows),
        width(width),
        stride(width + gap),
        dtype(dtype),
        bytes(static_cast<size_t>(rows > 0 ? ((rows - 1) * stride + width) * xpatch::size_of(dtype) : 0)) {}

  float get(int64_t row, int64_t column) const {
    float value;
    xpatch::widen(bytes.data() + (row * stride + column) * xpatch::size_of(dtype), dtype, 1, &value);
    return value;
  }
  void set(int64_t row, int64_t column, float value) {
    xpatch::narrow(&value, 1, dtype, bytes.data() + (row * stride + column) * xpatch::size_of(dtype));
  }
};

Matrix random_matrix(int64_t rows, int64_t width, int64_t gap, DType dtype, float scale = 1.0f, float middle = 0.0f) {
  Matrix matrix(rows, width, gap, dtype);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < width; ++j) matrix.set(i, j, middle + scale * normal(generator));
  }
  return matrix;
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

struct Case {
  int64_t M = 1, D = 1, N = 1, V = 1;
  DType dtype = DType::fp32;
  Activation activation = Activation::relu;
  int64_t gap = 0;      // between rows, elements
  size_t offset = 0;    // of every matrix, elements
  float middle = 0.0f;  // of the bias: far below 0 few neurons fire
  bool masks = false;
  int y = -1;                        // dtype code of y
  int64_t capacity = -1, epoch = 0;  // neurons in each half; N of them are live
  bool nan_row = false, in_place = false;
};

struct Problem {
  Case c;
  Matrix x, keys, bias, values, mask_inner, mask_outer, y;
  std::vector<int64_t> language, silent;  // neurons whose value rows must not be read

  explicit Problem(const Case& c)
      : c(c),
        x(random_matrix(c.M, c.D, c.gap, c.dtype)),
        keys(random_matrix(stored(), c.D, c.gap, c.dtype,
                           1.0f / std::sqrt(static_cast<float>(std::max<int64_t>(c.D, 1))))),
        bias(random_matrix(1, stored(), 0, c.dtype, 1.0f, c.middle)),
        values(random_matrix(stored(), c.V, c.gap, c.dtype)),
        mask_inner(random_matrix(3, c.D, 0, c.dtype)),
        mask_outer(random_matrix(3, c.V, 0, c.dtype)),
        y(random_matrix(c.M, c.V, c.in_place ? 0 : c.gap, y_dtype())) {
    for (int64_t m = 0; m < c.M; ++m) language.push_back(static_cast<int64_t>(generator() % 3));
    if (c.nan_row && c.M > 0 && c.D > 0) x.set(c.M / 2, c.D - 1, kNan);
    if (c.capacity >= 0) {  // all but the live neurons of one half
      for (int64_t n = 0; n < stored(); ++n) {
        if (n >= first() && n < first() + c.N) continue;
        bias.set(0, n, kNan);
        for (int64_t d = 0; d < c.D; ++d) keys.set(n, d, kNan);
        for (int64_t v = 0; v < c.V; ++v) values.set(n, v, kNan);
      }
    }
  }

  int64_t half() const { return c.capacity < 0 ? c.N : c.capacity; }
  int64_t stored() const { return c.capacity < 0 ? c.N : 2 * c.capacity; }
  int64_t first() const { return c.capacity < 0 ? 0 : c.epoch * c.capacity; }
  DType y_dtype() const { return c.y < 0 ? c.dtype : static_cast<DType>(c.y); }

  std::vector<char> run(int order) const {
    const int64_t size = xpatch::size_of(c.dtype);
    const size_t offset = c.offset * static_cast<size_t>(size);
    const Device x_(x.bytes, offset), keys_(keys.bytes, offset), bias_(bias.bytes, offset);
    const Device values_(values.bytes, offset), inner_(mask_inner.bytes, offset), outer_(mask_outer.bytes, offset);
    std::vector<char> words(language.size() * 8);
    if (!words.empty()) std::memcpy(words.data(), language.data(), words.size());
    const int64_t state[3] = {c.epoch, c.epoch == 0 ? c.N : 0, c.epoch == 0 ? 0 : c.N};
    std::vector<char> state_bytes(sizeof state);
    std::memcpy(state_bytes.data(), state, sizeof state);
    const Device language_(words), state_(state_bytes), y_(y.bytes);
    const Device out_(std::vector<char>(static_cast<size_t>(c.M * c.V * xpatch::size_of(y_dtype())), '\x7f'));
    xpatch::PatchFfn op;
    op.x = x_.at(), op.keys = keys_.at(), op.bias = bias_.at(), op.values = values_.at(), op.out = out_.at();
    op.M = c.M, op.D = c.D, op.N = half(), op.V = c.V;
    op.x_stride = x.stride, op.keys_stride = keys.stride, op.values_stride = values.stride;
    op.dtype = c.dtype, op.activation = c.activation;
    if (c.masks) {
      op.mask_inner = inner_.at(), op.mask_outer = outer_.at(), op.L = 3;
      op.language = reinterpret_cast<const int64_t*>(language_.at());
    }
    if (c.y >= 0) op.y = y_.at(), op.y_stride = y.stride, op.y_dtype = y_dtype();
    if (c.in_place) op.out = y_.at();
    if (c.capacity >= 0) {
      op.epoch = reinterpret_cast<const int64_t*>(state_.at());
      op.live = op.epoch + 1;
      const int64_t row = keys.stride * size, end = first() + c.N, rest = stored() - end;
      keys_.forbid(0, first() * row), values_.forbid(0, first() * values.stride * size);
      if (rest > 0) {
        keys_.forbid(end * row, (rest - 1) * row + c.D * size);
        values_.forbid(end * values.stride * size, ((rest - 1) * values.stride + c.V) * size);
        bias_.forbid(end * size, rest * size);
      }
    }
    for (const int64_t n : silent) values_.forbid(n * values.stride * size, c.V * size);
    op.workspace_bytes = xpatch::patch_ffn_cuda_workspace(op);
    const Device workspace(std::vector<char>(static_cast<size_t>(op.workspace_bytes), '\xff'));
    op.workspace = workspace.at();
    order_of_threads(order);
    xpatch::patch_ffn_cuda(op, nullptr);
    return c.in_place ? y_.bytes() : out_.bytes();
  }

  double masked(int64_t m, int64_t d) const {
    if (!c.masks) return x.get(m, d);
    Matrix product(1, 1, 0, c.dtype);  // rounded as the framework rounds a product
    product.set(0, 0, x.get(m, d) * mask_inner.get(language[static_cast<size_t>(m)], d));
    return product.get(0, 0);
  }

  void verify(const std::vector<char>& found) const {
    const double precision = c.dtype == DType::fp32 ? 1e-5 : c.dtype == DType::fp16 ? 2e-3 : 2e-2;
    const double rounding = y_dtype() == DType::fp32 ? 1e-5 : y_dtype() == DType::fp16 ? 2e-3 : 2e-2;
    Matrix out(c.M, c.V, 0, y_dtype());
    EXPECT(out.bytes.size() == found.size());
    out.bytes = found;
    for (int64_t m = 0; m < c.M; ++m) {
      std::vector<double> sum(static_cast<size_t>(c.V)), scale(static_cast<size_t>(c.V), 1.0), row;
      for (int64_t d = 0; d < c.D; ++d) row.push_back(masked(m, d));
      for (int64_t n = 0; n < c.N; ++n) {
        double z = bias.get(0, first() + n), size = 0;
        for (int64_t d = 0; d < c.D; ++d) {
          z += row[static_cast<size_t>(d)] * keys.get(first() + n, d);
          size += std::fabs(row[static_cast<size_t>(d)] * keys.get(first() + n, d));
        }
        const double h = activate(c.activation, z);
        for (int64_t v = 0; v < c.V; ++v) {
          sum[static_cast<size_t>(v)] += h * values.get(first() + n, v);
          scale[static_cast<size_t>(v)] += std::fabs(h * values.get(first() + n, v)) + 1e-6 * size;
        }
      }
      for (int64_t v = 0; v < c.V; ++v) {
        const auto at = static_cast<size_t>(v);
        double factor = c.masks ? mask_outer.get(language[static_cast<size_t>(m)], v) : 1.0;
        double expected = sum[at] * factor, limit = precision * scale[at] * std::max(1.0, std::fabs(factor));
        if (c.y >= 0) {
          expected += y.get(m, v);
          limit = 1e-5 * scale[at] * std::max(1.0, std::fabs(factor)) + rounding * std::fabs(expected) + 1e-5;
        }
        if (std::isnan(expected)) {
          EXPECT(std::isnan(out.get(m, v)));
        } else {
          EXPECT(std::fabs(out.get(m, v) - expected) <= limit);
        }
      }
    }
  }
};

}  // namespace
