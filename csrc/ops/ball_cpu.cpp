// The CPU kernels, compiled once per instruction set (see core/simd.h). A squared distance is summed in an order that
// depends only on D.
#include <cfloat>
#include <cmath>

#include "core/simd.h"
#include "ops/ball.h"

namespace xpatch {
namespace XPATCH_ISA {
namespace {

constexpr int W = Vec::width;
constexpr int64_t kStep = 64;  // elements between two looks at the sum so far; a multiple of W
constexpr int kKeys = 4;       // whose first steps run side by side
constexpr int kAhead = 16;     // keys whose first step is asked for before it is needed

// Only the beginning of most keys is read, which the processor does not foresee.
inline void ask_for(const float* key) {
#if defined(__GNUC__)
  for (int64_t d = 0; d < kStep; d += 16) __builtin_prefetch(key + d);
#else
  static_cast<void>(key);
#endif
}

inline Vec add_square(const float* x, const float* key, Vec acc) {
  const Vec difference = subtract(load(x), load(key));
  return multiply_add(difference, difference, acc);
}

inline Vec add_last_square(const float* x, const float* key, int64_t count, Vec acc) {
  const Vec difference = subtract(load_first(x, count), load_first(key, count));
  return multiply_add(difference, difference, acc);
}

// The squared distance from element d on, `acc` holding what came before; anything above `limit` once it is.
inline float finish(const float* x, const float* key, int64_t d, int64_t D, float limit, Vec acc) {
  while (d + kStep <= D) {
    for (const int64_t end = d + kStep; d < end; d += W) acc = add_square(x + d, key + d, acc);
    const float part = sum(acc);
    if (part > limit) return part;
  }
  for (; d + W <= D; d += W) acc = add_square(x + d, key + d, acc);
  if (d < D) acc = add_last_square(x + d, key + d, D - d, acc);
  return sum(acc);
}

// Squared distances of all keys in ascending order, each given up above limit(k).
template <typename Limit, typename Found>
inline void walk(const float* x, const float* keys, int64_t keys_stride, int64_t count, int64_t D, const Limit& limit,
                 const Found& found) {
  int64_t k = 0;
  for (; D >= kStep && k + kKeys <= count; k += kKeys) {
    const float* key = keys + k * keys_stride;
    for (int i = 0; i < kKeys && k + kAhead + i < count; ++i) ask_for(key + (kAhead + i) * keys_stride);
    Vec acc[kKeys];
    for (int i = 0; i < kKeys; ++i) acc[i] = zero();
    for (int64_t d = 0; d < kStep; d += W) {
      for (int i = 0; i < kKeys; ++i) acc[i] = add_square(x + d, key + i * keys_stride + d, acc[i]);
    }
    for (int i = 0; i < kKeys; ++i) {
      if (sum(acc[i]) > limit(k + i)) continue;
      found(k + i, finish(x, key + i * keys_stride, kStep, D, limit(k + i), acc[i]));
    }
  }
  for (; k < count; ++k) found(k, finish(x, keys + k * keys_stride, 0, D, limit(k), zero()));
}

// A square up to which a distance can be at most `distance`: a little above its square, so that rounding never gives up
// a key at exactly that distance.
inline float square_limit(float distance) { return distance * distance * (1.0f + 0x1p-20f) + FLT_MIN; }

// Distances are compared, not squares: of two keys whose distances round to the same number the first one counts.
inline void keep_nearer(float distance, int64_t key, Nearest& best) {
  if (best.key < 0 || distance < best.distance) best = {distance, key};
}

Nearest within(const float* x, const float* keys, int64_t keys_stride, const float* radii, int64_t count, int64_t D) {
  Nearest best;
  walk(
      x, keys, keys_stride, count, D, [radii](int64_t k) { return square_limit(radii[k]); },
      [&](int64_t k, float squared) {
        const float distance = std::sqrt(squared);
        if (distance <= radii[k]) keep_nearer(distance, k, best);
      });
  return best;
}

Nearest nearest_key(const float* x, const float* keys, int64_t keys_stride, int64_t count, int64_t D, float bound) {
  Nearest best;
  float limit = square_limit(bound);
  walk(
      x, keys, keys_stride, count, D, [&limit](int64_t) { return limit; },
      [&](int64_t k, float squared) {
        const float distance = std::sqrt(squared);
        if (!(distance <= bound)) return;
        keep_nearer(distance, k, best);
        limit = square_limit(best.distance);
      });
  return best;
}

float squares(const float* x, int64_t D) {
  Vec acc = zero();
  int64_t d = 0;
  for (; d + W <= D; d += W) acc = multiply_add(load(x + d), load(x + d), acc);
  if (d < D) acc = multiply_add(load_first(x + d, D - d), load_first(x + d, D - d), acc);
  return sum(acc);
}

}  // namespace

const BallKernels ball_kernels = {within, nearest_key, squares};

}  // namespace XPATCH_ISA
}  // namespace xpatch
