// The screening kernels, compiled once per instruction set (see core/simd.h).
#include <cmath>

#include "core/int8.h"
#include "core/simd.h"
#include "screen/screen.h"

namespace xpatch {
namespace XPATCH_ISA {
namespace {

constexpr int W = Vec::width;
constexpr float kUnit = 0x1.0p-24f;  // half an ulp of 1
// Between these lies the largest coordinate of what can be screened: no sum over the products with another such row
// overflows, and what underflow takes from it, flushed to zero or not, is far below rounding (PROOF.md, section 4).
constexpr float kLeast = 0x1.0p-40f, kMost = 0x1.0p55f;

// --- The rotation: random signs, then Walsh-Hadamard transforms of 4^j coordinates ---------------------------------

void flip_signs(const float* row, int64_t D, float* out) {
  for (int64_t d = 0; d < D; ++d) {
    uint32_t hash = static_cast<uint32_t>(d) * 0x9E3779B1u;
    hash = (hash ^ (hash >> 15)) * 0x85EBCA77u;
    uint32_t bits;
    std::memcpy(&bits, row + d, sizeof bits);
    bits ^= hash & 0x80000000u;
    std::memcpy(out + d, &bits, sizeof bits);
  }
}

#if defined(__AVX512F__)
inline void hadamard16(float* v) {
  __m512 a = _mm512_loadu_ps(v);
  const auto signs = [](__mmask16 minus) {
    return _mm512_mask_sub_ps(_mm512_set1_ps(1.0f), minus, _mm512_setzero_ps(), _mm512_set1_ps(1.0f));
  };
  a = _mm512_fmadd_ps(a, signs(0xAAAA), _mm512_permute_ps(a, 0xB1));
  a = _mm512_fmadd_ps(a, signs(0xCCCC), _mm512_permute_ps(a, 0x4E));
  a = _mm512_fmadd_ps(a, signs(0xF0F0), _mm512_shuffle_f32x4(a, a, 0xB1));
  a = _mm512_fmadd_ps(a, signs(0xFF00), _mm512_shuffle_f32x4(a, a, 0x4E));
  _mm512_storeu_ps(v, a);
}
#else
inline void hadamard16(float* v) {
  for (int half = 1; half < 16; half *= 2) {
    for (int i = 0; i < 16; i += 2 * half) {
      for (int j = i; j < i + half; ++j) {
        const float a = v[j], b = v[j + half];
        v[j] = a + b;
        v[j + half] = a - b;
      }
    }
  }
}
#endif

// Orthogonal: `size` is 4^j >= 16, so the scale is a power of two and exact.
void hadamard(float* v, int64_t size) {
  for (int64_t i = 0; i < size; i += 16) hadamard16(v + i);
  for (int64_t half = 16; half < size; half *= 2) {
    for (int64_t i = 0; i < size; i += 2 * half) {
      for (int64_t j = i; j < i + half; j += W) {
        const Vec a = load(v + j), b = load(v + j + half);
        store(v + j, add(a, b));
        store(v + j + half, subtract(a, b));
      }
    }
  }
  float scale = 1.0f;
  for (int64_t part = size; part > 1; part /= 4) scale *= 0.5f;
  const Vec scales = fill(scale);
  for (int64_t i = 0; i < size; i += W) store(v + i, multiply(load(v + i), scales));
}

// Blocks of 256, 64 or 16 coordinates; the last one reaches back over coordinates that were transformed already.
void rotate(float* v, int64_t D) {
  const int64_t size = D >= 256 ? 256 : D >= 64 ? 64 : 16;
  if (D < size) return;
  for (int64_t i = 0; i + size <= D; i += size) hadamard(v + i, size);
  if (D % size != 0) hadamard(v + D - size, size);
}

// --- Rounding to bytes ---------------------------------------------------------------------------------------------

// As integers: NaN and Inf are larger than every number.
uint32_t largest_bits(const float* v, int64_t D) {
  uint32_t largest = 0;
  for (int64_t d = 0; d < D; ++d) {
    uint32_t bits;
    std::memcpy(&bits, v + d, sizeof bits);
    bits &= 0x7FFFFFFFu;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

void quantise(const float* row, int64_t D, float* work, int8_t* bytes, RowBound* bound) {
  *bound = RowBound();
  std::memset(bytes, 0, static_cast<size_t>((D + 3) / 4 * 4));
  flip_signs(row, D, work);
  const uint32_t before = largest_bits(work, D);
  if (before == 0) return;
  rotate(work, D);
  const uint32_t bits = largest_bits(work, D);
  float most;
  std::memcpy(&most, &bits, sizeof most);
  if (bits >= 0x7F800000u || !(most >= kLeast && most <= kMost)) {
    bound->odd = true;
    return;
  }
  // 126.9 and not 127, so that rounding `scale` cannot push a byte to 128.
  const float scale = 126.9f / most;
  const Vec scales = fill(scale);
  Vec errors = zero(), squares = zero(), sums = zero();
  int64_t d = 0;
  for (; d + W <= D; d += W) {
    const Vec scaled = multiply(load(work + d), scales);
    const Vec whole = nearest(scaled);
    const Vec error = subtract(scaled, whole);
    errors = multiply_add(error, error, errors);
    squares = multiply_add(scaled, scaled, squares);
    sums = add(sums, whole);
    store_int8(bytes + d, whole);
  }
  if (d < D) {
    const Vec scaled = multiply(load_first(work + d, D - d), scales);
    const Vec whole = nearest(scaled);
    const Vec error = subtract(scaled, whole);
    errors = multiply_add(error, error, errors);
    squares = multiply_add(scaled, scaled, squares);
    sums = add(sums, whole);
    int8_t last[W];
    store_int8(last, whole);
    std::memcpy(bytes + d, last, static_cast<size_t>(D - d));
  }
  // Each sum of squares is short of the exact one by at most a factor 1 - (D + 2) u; the root halves that (PROOF.md,
  // section 3).
  const float inflate = 1.0f + (static_cast<float>(D) + 16.0f) * kUnit;
  bound->scale = scale;
  bound->norm = std::sqrt(sum(squares)) * inflate;
  bound->error = std::sqrt(sum(errors)) * inflate + 4.0f * kUnit * bound->norm;
  bound->sum = static_cast<int32_t>(sum(sums));
}

// --- The coarse stage (PROOF.md, section 6) ------------------------------------------------------------------------

// R rows against the directions of a panel [D][kPanel], side by side in the registers.
template <int R>
inline void project_tile(const float* const* rows, int64_t D, const float* panel, float* out, int64_t rank,
                         int64_t some) {
  constexpr int V = kPanel / W;
  Vec acc[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) acc[r][v] = zero();
  }
  for (int64_t d = 0; d < D; ++d) {
    Vec directions[V];
    for (int v = 0; v < V; ++v) directions[v] = load(panel + d * kPanel + v * W);
    for (int r = 0; r < R; ++r) {
      const Vec x = fill(rows[r][d]);
      for (int v = 0; v < V; ++v) acc[r][v] = multiply_add(x, directions[v], acc[r][v]);
    }
  }
  for (int r = 0; r < R; ++r) {
    float sums[kPanel];
    for (int v = 0; v < V; ++v) store(sums + v * W, acc[r][v]);
    std::memcpy(out + r * rank, sums, static_cast<size_t>(some) * sizeof(float));
  }
}

// A panel for all rows before the next one: the basis is read from memory once.
void project(const float* const* rows, int64_t count, int64_t D, const float* panels, int64_t rank, float* out) {
  constexpr int R = W == 16 ? 12 : W == 8 ? 3 : 2;  // as many as the registers hold
  for (int64_t i = 0; i < rank; i += kPanel, panels += D * kPanel) {
    const int64_t some = rank - i < kPanel ? rank - i : kPanel;
    int64_t m = 0;
    for (; m + R <= count; m += R) project_tile<R>(rows + m, D, panels, out + m * rank + i, rank, some);
    for (; W == 16 && m + 4 <= count; m += 4) project_tile<4>(rows + m, D, panels, out + m * rank + i, rank, some);
    for (; m < count; ++m) project_tile<1>(rows + m, D, panels, out + m * rank + i, rank, some);
  }
}

double sum_of_squares(const float* v, int64_t D) {
  Vec squares = zero();
  int64_t d = 0;
  for (; d + W <= D; d += W) {
    const Vec a = load(v + d);
    squares = multiply_add(a, a, squares);
  }
  if (d < D) {
    const Vec a = load_first(v + d, D - d);
    squares = multiply_add(a, a, squares);
  }
  return sum(squares);
}

void coarsen(const float* row, int64_t D, float* projected, int64_t rank, float skew, float* work, int8_t* bytes,
             RowBound* bound) {
  const uint32_t bits = largest_bits(row, D);
  float most;
  std::memcpy(&most, &bits, sizeof most);
  if (bits != 0 && !(most >= kLeast && most <= kMost)) {
    *bound = RowBound();
    bound->odd = true;
    std::memset(bytes, 0, static_cast<size_t>((rank + 3) / 4 * 4));
    return;
  }
  const double norm = std::sqrt(sum_of_squares(row, D)) * (1.0 + (static_cast<double>(D) + 16.0) * kUnit);
  const double along = std::sqrt(sum_of_squares(projected, rank)) * (1.0 - (static_cast<double>(rank) + 16.0) * kUnit);
  quantise(projected, rank, work, bytes, bound);
  if (bound->odd) return;
  const double slip = (static_cast<double>(D) + 8.0) * kUnit * 1.01 * std::sqrt(static_cast<double>(rank)) * norm;
  const double sure = along > slip ? along - slip : 0.0;
  const double rest = norm * norm - sure * sure / (1.0 + static_cast<double>(skew));
  const double inflate = static_cast<double>(bound->scale) * (1.0 + 16.0 * kUnit);
  // A basis that is not quite orthonormal can make the projection longer than the row.
  const float whole = static_cast<float>(norm * inflate);
  bound->norm = bound->norm > whole ? bound->norm : whole;
  bound->odd = !(bound->norm <= kMost);  // next to nothing along the basis
  bound->rest = rest > 0.0 ? static_cast<float>(std::sqrt(rest) * inflate) : 0.0f;
}

// --- Screening -----------------------------------------------------------------------------------------------------

// acc[r][c] += the dot products of R rows and C groups.
template <int R, int C>
inline void dots(const int8_t* bytes, int64_t width, const uint8_t* groups, int64_t stride, int64_t steps,
                 Lanes (&acc)[R][C]) {
  for (int64_t s = 0; s < steps; ++s) {
    KeyBytes keys[C];
    for (int c = 0; c < C; ++c) keys[c] = load_keys(groups + c * stride + s * kStepBytes);
    for (int r = 0; r < R; ++r) {
      const RowBytes row = broadcast(bytes + r * width + 4 * s);
      for (int c = 0; c < C; ++c) acc[r][c] = dot(acc[r][c], keys[c], row);
    }
  }
}

inline int count_bits(uint32_t bits) {
  bits -= (bits >> 1) & 0x5555u;
  bits = (bits & 0x3333u) + ((bits >> 2) & 0x3333u);
  bits = (bits + (bits >> 4)) & 0x0F0Fu;
  return static_cast<int>((bits + (bits >> 8)) & 0x1Fu);
}

inline int64_t put_mask(Lanes sums, const uint8_t* group, int64_t steps, const RowBound& bound, uint16_t* mask) {
  uint32_t bits = 0xFFFF;
  if (!bound.odd) {
    bits = not_below_zero(sums, group + steps * kStepBytes, bound.error, bound.norm, bound.scale, bound.rest);
  }
  *mask = static_cast<uint16_t>(bits);
  return bits == 0 ? 0 : count_bits(bits);
}

template <int R, int C>
inline int64_t screen_tile(const int8_t* bytes, const RowBound* bounds, const uint8_t* groups, int64_t stride,
                           int64_t steps, uint16_t* masks, int64_t rows) {
  Lanes acc[R][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) acc[r][c] = all(-kKeyOffset * bounds[r].sum);
  }
  dots<R, C>(bytes, 4 * steps, groups, stride, steps, acc);
  int64_t found = 0;
  for (int c = 0; c < C; ++c) {
    for (int r = 0; r < R; ++r) {
      found += put_mask(acc[r][c], groups + c * stride, steps, bounds[r], masks + c * rows + r);
    }
  }
  return found;
}

// How far ahead of a single row's reading its keys are asked for: the hardware alone does not keep up with memory.
constexpr int64_t kRowAhead = 2048;

// One row, one group after the other as they lie in memory; four sums at once hide the latency of the adds.
inline int64_t screen_row(const int8_t* bytes, const RowBound& bound, const uint8_t* group, int64_t steps,
                          uint16_t* mask) {
  Lanes acc[4] = {all(-kKeyOffset * bound.sum), all(0), all(0), all(0)};
  int64_t s = 0;
  for (; s + 4 <= steps; s += 4) {
    for (int i = 0; i < 4; ++i) {
#if defined(__GNUC__)
      __builtin_prefetch(group + (s + i) * kStepBytes + kRowAhead);
#endif
      acc[i] = dot(acc[i], load_keys(group + (s + i) * kStepBytes), broadcast(bytes + 4 * (s + i)));
    }
  }
  for (; s < steps; ++s) acc[0] = dot(acc[0], load_keys(group + s * kStepBytes), broadcast(bytes + 4 * s));
  return put_mask(add(add(acc[0], acc[1]), add(acc[2], acc[3])), group, steps, bound, mask);
}

// Asks for the next groups' lines a few at a time while rows are computed against these, so that memory is never waited
// for. A row alone is left to the hardware: it reads the groups as they lie.
class Ahead {
 public:
  Ahead(const uint8_t* next, int64_t bytes, int64_t rows)
      : next_(next), end_(rows < 4 ? next : next + bytes), lines_(rows < 4 ? 0 : bytes / 64 / rows + 1) {}
  void after(int64_t rows) {
#if defined(__GNUC__)
    for (int64_t i = lines_ * rows; i > 0 && next_ < end_; --i, next_ += 64) __builtin_prefetch(next_);
#else
    static_cast<void>(rows);
#endif
  }

 private:
  const uint8_t *next_, *end_;
  int64_t lines_;
};

// All rows against C groups; `next_bytes` of further groups follow them.
template <int C>
inline int64_t screen_groups(const int8_t* bytes, const RowBound* bounds, int64_t rows, const uint8_t* groups,
                             int64_t stride, int64_t steps, int64_t next_bytes, uint16_t* masks) {
#if defined(__AVX512VNNI__)
  constexpr int R = 12;
#elif defined(__AVX512F__)
  constexpr int R = 8;
#else
  constexpr int R = 4;
#endif
  int64_t found = 0, m = 0;
  const int64_t width = 4 * steps;
  Ahead ahead(groups + C * stride, next_bytes, rows);
  for (; m + R <= rows; m += R) {
    found += screen_tile<R, C>(bytes + m * width, bounds + m, groups, stride, steps, masks + m, rows);
    ahead.after(R);
  }
  for (; m + 4 <= rows; m += 4) {
    found += screen_tile<4, C>(bytes + m * width, bounds + m, groups, stride, steps, masks + m, rows);
    ahead.after(4);
  }
  for (; m + 2 <= rows; m += 2) {
    found += screen_tile<2, C>(bytes + m * width, bounds + m, groups, stride, steps, masks + m, rows);
    ahead.after(2);
  }
  for (; m < rows; ++m) {
    for (int c = 0; c < C; ++c) {
      found += screen_row(bytes + m * width, bounds[m], groups + c * stride, steps, masks + c * rows + m);
    }
  }
  return found;
}

int64_t screen(const int8_t* bytes, const RowBound* bounds, int64_t rows, const Stage& stage, int64_t count,
               uint16_t* masks) {
  const uint8_t* groups = stage.groups;
  const int64_t stride = stage.stride, steps = stage.steps;
#if defined(__AVX512VNNI__)
  constexpr int C = 2;
#else
  constexpr int C = 1;
#endif
  int64_t found = 0, g = 0;
  for (; g + C <= count; g += C) {
    const int64_t next = count - g - C < C ? count - g - C : C;
    found += screen_groups<C>(bytes, bounds, rows, groups + g * stride, stride, steps, next * stride, masks + g * rows);
  }
  for (; g < count; ++g) {
    found += screen_groups<1>(bytes, bounds, rows, groups + g * stride, stride, steps, 0, masks + g * rows);
  }
  return found;
}

int64_t peak(int64_t rounds, int32_t* sink) {
  constexpr int kSums = 12;
  uint8_t key_bytes[kStepBytes];
  int8_t row_bytes[4] = {1, -2, 3, -4};
  for (int64_t i = 0; i < kStepBytes; ++i) key_bytes[i] = static_cast<uint8_t>(i);
  Lanes acc[kSums];
  for (int i = 0; i < kSums; ++i) acc[i] = all(i);
  const KeyBytes keys = load_keys(key_bytes);
  for (int64_t round = 0; round < rounds; ++round) {
    const RowBytes row = broadcast(row_bytes);
    for (int i = 0; i < kSums; ++i) acc[i] = dot(acc[i], keys, row);
  }
  for (int i = 1; i < kSums; ++i) acc[0] = add(acc[0], acc[i]);
  std::memcpy(sink, &acc[0], sizeof *sink);
  return rounds * kSums * kStepBytes;
}

}  // namespace

const ScreenKernels screen_kernels = {quantise, project, coarsen, screen, peak};

}  // namespace XPATCH_ISA
}  // namespace xpatch
