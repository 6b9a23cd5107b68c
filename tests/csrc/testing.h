// What the native tests share: a check that stops the program, and random matrices on buffers of exactly the right
// size.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "core/dtype.h"

#define EXPECT(condition)                                                          \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                \
    }                                                                              \
  } while (false)

namespace testing {

using xpatch::DType;

struct Matrix {
  int64_t rows, width, stride;
  std::vector<char> bytes;  // ends with the last element of the last row

  Matrix(int64_t rows, int64_t width, int64_t gap, DType dtype)
      : rows(rows),
        width(width),
        stride(width + gap),
        bytes(static_cast<size_t>(rows > 0 ? ((rows - 1) * stride + width) * xpatch::size_of(dtype) : 0)) {}
};

inline Matrix random_matrix(std::mt19937& generator, int64_t rows, int64_t width, int64_t gap, DType dtype) {
  Matrix matrix(rows, width, gap, dtype);
  std::normal_distribution<float> normal;
  for (size_t at = 0; at < matrix.bytes.size(); at += static_cast<size_t>(xpatch::size_of(dtype))) {
    const float value = normal(generator);
    xpatch::narrow(&value, 1, dtype, matrix.bytes.data() + at);
  }
  return matrix;
}

inline double element(const Matrix& matrix, DType dtype, int64_t row, int64_t column) {
  float value;
  xpatch::widen(matrix.bytes.data() + (row * matrix.stride + column) * xpatch::size_of(dtype), dtype, 1, &value);
  return value;
}

}  // namespace testing
