// Sixteen int8 dot products side by side: one lane per key, four coordinates per step, for whatever instruction set
// this file is compiled for (see core/simd.h for how that works). Keys are bytes with 128 added, rows are signed bytes;
// sums are exact in 32 bits, no step saturates.
//
// The layout of 16 keys is [steps][16][4]: one step is 64 bytes, four coordinates of each key. No lane ever needs to be
// added to another.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/simd.h"

#if defined(__ARM_NEON) && !defined(_MSC_VER)
#include <arm_neon.h>
#define XPATCH_NEON
#endif

namespace xpatch {
namespace XPATCH_ISA {

inline int32_t four_bytes(const int8_t* p) {
  int32_t word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

#if defined(__AVX512VNNI__)

struct Lanes {
  __m512i sums;
};
struct KeyBytes {
  __m512i bytes;
};
struct RowBytes {
  __m512i bytes;
};
inline Lanes all(int32_t value) { return {_mm512_set1_epi32(value)}; }
inline KeyBytes load_keys(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline RowBytes broadcast(const int8_t* p) { return {_mm512_set1_epi32(four_bytes(p))}; }
inline Lanes dot(Lanes acc, KeyBytes keys, RowBytes row) {
#if defined(__GNUC__) && !defined(__clang__)
  // Through the intrinsic GCC 12 copies and spills every sum of a tile in every step.
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc.sums) : "v"(keys.bytes), "v"(row.bytes));
  return acc;
#else
  return {_mm512_dpbusd_epi32(acc.sums, keys.bytes, row.bytes)};
#endif
}
inline Lanes add(Lanes a, Lanes b) { return {_mm512_add_epi32(a.sums, b.sums)}; }

#elif defined(__AVX512BW__)

// Without VNNI: bytes are widened to 16 bits, even and odd coordinates apart, and added in pairs. (The byte instruction
// vpmaddubsw would saturate.)
struct Lanes {
  __m512i sums;
};
struct KeyBytes {
  __m512i even, odd;
};
struct RowBytes {
  __m512i even, odd;
};
inline Lanes all(int32_t value) { return {_mm512_set1_epi32(value)}; }
inline KeyBytes load_keys(const uint8_t* p) {
  const __m512i bytes = _mm512_loadu_si512(p);
  return {_mm512_and_si512(bytes, _mm512_set1_epi16(0xFF)), _mm512_srli_epi16(bytes, 8)};
}
inline RowBytes broadcast(const int8_t* p) {
  const __m512i bytes = _mm512_set1_epi32(four_bytes(p));
  return {_mm512_srai_epi16(_mm512_slli_epi16(bytes, 8), 8), _mm512_srai_epi16(bytes, 8)};
}
inline Lanes dot(Lanes acc, KeyBytes keys, RowBytes row) {
  const __m512i sums = _mm512_add_epi32(acc.sums, _mm512_madd_epi16(keys.even, row.even));
  return {_mm512_add_epi32(sums, _mm512_madd_epi16(keys.odd, row.odd))};
}
inline Lanes add(Lanes a, Lanes b) { return {_mm512_add_epi32(a.sums, b.sums)}; }

#elif defined(__AVX2__)

#if defined(__AVXVNNI__)
struct KeyBytes {
  __m256i low, high;
};
struct RowBytes {
  __m256i bytes;
};
#else
struct KeyBytes {
  __m256i low_even, low_odd, high_even, high_odd;
};
struct RowBytes {
  __m256i even, odd;
};
#endif
struct Lanes {
  __m256i low, high;
};
inline Lanes all(int32_t value) { return {_mm256_set1_epi32(value), _mm256_set1_epi32(value)}; }
inline Lanes add(Lanes a, Lanes b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
inline __m256i load_half(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

#if defined(__AVXVNNI__)
inline KeyBytes load_keys(const uint8_t* p) { return {load_half(p), load_half(p + 32)}; }
inline RowBytes broadcast(const int8_t* p) { return {_mm256_set1_epi32(four_bytes(p))}; }
inline Lanes dot(Lanes acc, KeyBytes keys, RowBytes row) {
#if defined(__GNUC__) && !defined(__clang__)  // as above
  __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc.low) : "x"(keys.low), "x"(row.bytes));
  __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc.high) : "x"(keys.high), "x"(row.bytes));
  return acc;
#else
  return {_mm256_dpbusd_avx_epi32(acc.low, keys.low, row.bytes),
          _mm256_dpbusd_avx_epi32(acc.high, keys.high, row.bytes)};
#endif
}
#else
// As above: 16 bits wide, because vpmaddubsw would saturate.
inline KeyBytes load_keys(const uint8_t* p) {
  const __m256i low = load_half(p), high = load_half(p + 32), byte = _mm256_set1_epi16(0xFF);
  return {_mm256_and_si256(low, byte), _mm256_srli_epi16(low, 8), _mm256_and_si256(high, byte),
          _mm256_srli_epi16(high, 8)};
}
inline RowBytes broadcast(const int8_t* p) {
  const __m256i bytes = _mm256_set1_epi32(four_bytes(p));
  return {_mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8), _mm256_srai_epi16(bytes, 8)};
}
inline Lanes dot(Lanes acc, KeyBytes keys, RowBytes row) {
  acc.low = _mm256_add_epi32(acc.low, _mm256_madd_epi16(keys.low_even, row.even));
  acc.high = _mm256_add_epi32(acc.high, _mm256_madd_epi16(keys.high_even, row.even));
  acc.low = _mm256_add_epi32(acc.low, _mm256_madd_epi16(keys.low_odd, row.odd));
  acc.high = _mm256_add_epi32(acc.high, _mm256_madd_epi16(keys.high_odd, row.odd));
  return acc;
}
#endif

#elif defined(XPATCH_NEON)

struct Lanes {
  int32x4_t sums[4];
};
struct KeyBytes {
  int8x16_t bytes[4];  // 128 taken off again: NEON multiplies signed by signed
};
struct RowBytes {
  int8x16_t bytes;
};
inline Lanes all(int32_t value) {
  const int32x4_t four = vdupq_n_s32(value);
  return {{four, four, four, four}};
}
inline KeyBytes load_keys(const uint8_t* p) {
  KeyBytes keys;
  const uint8x16_t offset = vdupq_n_u8(0x80);
  for (int i = 0; i < 4; ++i) keys.bytes[i] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p + 16 * i), offset));
  return keys;
}
inline RowBytes broadcast(const int8_t* p) { return {vreinterpretq_s8_s32(vdupq_n_s32(four_bytes(p)))}; }
inline Lanes dot(Lanes acc, KeyBytes keys, RowBytes row) {
  for (int i = 0; i < 4; ++i) {
#if defined(__ARM_FEATURE_DOTPROD)
    acc.sums[i] = vdotq_s32(acc.sums[i], keys.bytes[i], row.bytes);
#else
    const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(keys.bytes[i]), vget_low_s8(row.bytes)));
    const int32x4_t high = vpaddlq_s16(vmull_s8(vget_high_s8(keys.bytes[i]), vget_high_s8(row.bytes)));
    acc.sums[i] = vaddq_s32(acc.sums[i], vpaddq_s32(low, high));
#endif
  }
  return acc;
}
inline Lanes add(Lanes a, Lanes b) {
  for (int i = 0; i < 4; ++i) a.sums[i] = vaddq_s32(a.sums[i], b.sums[i]);
  return a;
}

#else

struct Lanes {
  int32_t sums[16];
};
struct KeyBytes {
  const uint8_t* bytes;
};
struct RowBytes {
  int32_t bytes[4];
};
inline Lanes all(int32_t value) {
  Lanes lanes;
  for (int i = 0; i < 16; ++i) lanes.sums[i] = value;
  return lanes;
}
inline KeyBytes load_keys(const uint8_t* p) { return {p}; }
inline RowBytes broadcast(const int8_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
inline Lanes dot(Lanes acc, KeyBytes keys, RowBytes row) {
  for (int i = 0; i < 16; ++i) {
    const uint8_t* key = keys.bytes + 4 * i;
    acc.sums[i] += key[0] * row.bytes[0] + key[1] * row.bytes[1] + key[2] * row.bytes[2] + key[3] * row.bytes[3];
  }
  return acc;
}
inline Lanes add(Lanes a, Lanes b) {
  for (int i = 0; i < 16; ++i) a.sums[i] += b.sums[i];
  return a;
}

#endif

// Where the keys' 128 is taken off again: a row's sum of bytes times this is added to every lane.
#if defined(XPATCH_NEON) && !defined(__AVX2__)
constexpr int32_t kKeyOffset = 0;
#else
constexpr int32_t kKeyOffset = 128;
#endif

// `const_bytes` holds four rows of 16 floats, not aligned. Bit i of the result is clear only where
// sums[i] + a * first[i] + b * second[i] + c * third[i] + e * fourth[i] < 0 in fp32: a NaN keeps its bit.
inline uint32_t not_below_zero(Lanes sums, const uint8_t* const_bytes, float a, float b, float c, float e) {
#if defined(__AVX512F__)
  const auto* consts = reinterpret_cast<const float*>(const_bytes);  // read through intrinsics alone
  __m512 upper = _mm512_cvtepi32_ps(sums.sums);
  upper = _mm512_fmadd_ps(_mm512_set1_ps(e), _mm512_loadu_ps(consts + 48), upper);
  upper = _mm512_fmadd_ps(_mm512_set1_ps(c), _mm512_loadu_ps(consts + 32), upper);
  upper = _mm512_fmadd_ps(_mm512_set1_ps(b), _mm512_loadu_ps(consts + 16), upper);
  upper = _mm512_fmadd_ps(_mm512_set1_ps(a), _mm512_loadu_ps(consts), upper);
  return _mm512_cmp_ps_mask(upper, _mm512_setzero_ps(), _CMP_NLT_UQ);
#elif defined(__AVX2__)
  const auto* consts = reinterpret_cast<const float*>(const_bytes);  // read through intrinsics alone
  const __m256 as = _mm256_set1_ps(a), bs = _mm256_set1_ps(b), cs = _mm256_set1_ps(c), es = _mm256_set1_ps(e);
  const auto half = [&](__m256i ints, const float* k) {
    __m256 upper = _mm256_cvtepi32_ps(ints);
    upper = _mm256_fmadd_ps(es, _mm256_loadu_ps(k + 48), upper);
    upper = _mm256_fmadd_ps(cs, _mm256_loadu_ps(k + 32), upper);
    upper = _mm256_fmadd_ps(bs, _mm256_loadu_ps(k + 16), upper);
    upper = _mm256_fmadd_ps(as, _mm256_loadu_ps(k), upper);
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(upper, _mm256_setzero_ps(), _CMP_NLT_UQ)));
  };
  return half(sums.low, consts) | half(sums.high, consts + 8) << 8;
#else
  int32_t ints[16];
  float consts[64];
  std::memcpy(ints, &sums, sizeof ints);
  std::memcpy(consts, const_bytes, sizeof consts);
  uint32_t bits = 0;
  for (int i = 0; i < 16; ++i) {
    float upper = static_cast<float>(ints[i]);
    upper = e * consts[48 + i] + upper;
    upper = c * consts[32 + i] + upper;
    upper = b * consts[16 + i] + upper;
    upper = a * consts[i] + upper;
    bits |= static_cast<uint32_t>(!(upper < 0.0f)) << i;
  }
  return bits;
#endif
}

}  // namespace XPATCH_ISA
}  // namespace xpatch
