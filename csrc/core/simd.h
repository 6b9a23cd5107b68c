// Vec: one SIMD register of fp32, for whatever instruction set this file is compiled for. Include it only from a
// *_cpu.cpp: those are compiled once per instruction set, with XPATCH_ISA naming the namespace everything lives in, so
// that two sets never share a symbol.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace xpatch {
namespace XPATCH_ISA {

#if defined(__AVX512F__)

struct Vec {
  static constexpr int width = 16;
  __m512 lanes;
};
inline Vec zero() { return {_mm512_setzero_ps()}; }
inline Vec fill(float value) { return {_mm512_set1_ps(value)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.lanes); }
inline Vec load_first(const float* p, int64_t count) {
  return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1u), p)};
}
inline void store_first(float* p, Vec a, int64_t count) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1u), a.lanes);
}
inline Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.lanes, b.lanes, c.lanes)}; }
inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.lanes, b.lanes)}; }
inline Vec subtract(Vec a, Vec b) { return {_mm512_sub_ps(a.lanes, b.lanes)}; }
inline Vec multiply(Vec a, Vec b) { return {_mm512_mul_ps(a.lanes, b.lanes)}; }
inline float sum(Vec a) { return _mm512_reduce_add_ps(a.lanes); }
inline void store_int8(int8_t* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(a.lanes)));
}

#elif defined(__AVX2__)

struct Vec {
  static constexpr int width = 8;
  __m256 lanes;
};
inline Vec zero() { return {_mm256_setzero_ps()}; }
inline Vec fill(float value) { return {_mm256_set1_ps(value)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.lanes); }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.lanes, b.lanes, c.lanes)}; }
inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.lanes, b.lanes)}; }
inline Vec subtract(Vec a, Vec b) { return {_mm256_sub_ps(a.lanes, b.lanes)}; }
inline Vec multiply(Vec a, Vec b) { return {_mm256_mul_ps(a.lanes, b.lanes)}; }
inline void store_int8(int8_t* p, Vec a) {
  const __m256i words = _mm256_cvtps_epi32(a.lanes);
  const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(halves, halves));
}
inline float sum(Vec a) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a.lanes), _mm256_extractf128_ps(a.lanes, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

#elif defined(__GNUC__)

// Four lanes in the compiler's own vector type: SSE2 on x86-64, NEON on aarch64.
struct Vec {
  static constexpr int width = 4;
  typedef float Lanes __attribute__((vector_size(16)));
  Lanes lanes;
};
inline Vec zero() { return {Vec::Lanes{0.0f, 0.0f, 0.0f, 0.0f}}; }
inline Vec fill(float value) { return {Vec::Lanes{value, value, value, value}}; }
inline Vec load(const float* p) {
  Vec a;
  std::memcpy(&a.lanes, p, sizeof a.lanes);
  return a;
}
inline void store(float* p, Vec a) { std::memcpy(p, &a.lanes, sizeof a.lanes); }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return {a.lanes * b.lanes + c.lanes}; }
inline Vec add(Vec a, Vec b) { return {a.lanes + b.lanes}; }
inline Vec subtract(Vec a, Vec b) { return {a.lanes - b.lanes}; }
inline Vec multiply(Vec a, Vec b) { return {a.lanes * b.lanes}; }
inline float sum(Vec a) { return (a.lanes[0] + a.lanes[2]) + (a.lanes[1] + a.lanes[3]); }

#else

struct Vec {
  static constexpr int width = 4;
  float lanes[4];
};
inline Vec zero() { return {{0.0f, 0.0f, 0.0f, 0.0f}}; }
inline Vec fill(float value) { return {{value, value, value, value}}; }
inline Vec load(const float* p) { return {{p[0], p[1], p[2], p[3]}}; }
inline void store(float* p, Vec a) {
  for (int i = 0; i < 4; ++i) p[i] = a.lanes[i];
}
inline Vec multiply_add(Vec a, Vec b, Vec c) {
  for (int i = 0; i < 4; ++i) c.lanes[i] += a.lanes[i] * b.lanes[i];
  return c;
}
inline Vec add(Vec a, Vec b) {
  for (int i = 0; i < 4; ++i) a.lanes[i] += b.lanes[i];
  return a;
}
inline Vec subtract(Vec a, Vec b) {
  for (int i = 0; i < 4; ++i) a.lanes[i] -= b.lanes[i];
  return a;
}
inline Vec multiply(Vec a, Vec b) {
  for (int i = 0; i < 4; ++i) a.lanes[i] *= b.lanes[i];
  return a;
}
inline float sum(Vec a) { return (a.lanes[0] + a.lanes[2]) + (a.lanes[1] + a.lanes[3]); }

#endif

#if !defined(__AVX2__)
// Whole numbers within [-128, 127], as bytes.
inline void store_int8(int8_t* p, Vec a) {
  for (int i = 0; i < Vec::width; ++i) p[i] = static_cast<int8_t>(a.lanes[i]);
}
#endif

#if !defined(__AVX512F__)
// The first `count` < width elements; the other lanes are 0.
inline Vec load_first(const float* p, int64_t count) {
  float lanes[Vec::width] = {};
  std::memcpy(lanes, p, static_cast<size_t>(count) * sizeof(float));
  return load(lanes);
}
inline void store_first(float* p, Vec a, int64_t count) {
  float lanes[Vec::width];
  store(lanes, a);
  std::memcpy(p, lanes, static_cast<size_t>(count) * sizeof(float));
}
#endif

// To the nearest whole number, ties to even, for |a| < 2^22: adding 1.5 * 2^23 leaves no room for a fraction.
inline Vec nearest(Vec a) {
  const Vec shift = fill(12582912.0f);
  return subtract(add(a, shift), shift);
}

}  // namespace XPATCH_ISA
}  // namespace xpatch
