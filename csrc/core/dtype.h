// Element types and their conversions to and from fp32. The codes are part of the binding's interface.
#pragma once

#include <cstdint>
#include <cstring>

namespace xpatch {

enum class DType : int { fp32 = 0, fp16 = 1, bf16 = 2 };

inline bool is_dtype(int code) { return code >= 0 && code <= 2; }
inline int64_t size_of(DType dtype) { return dtype == DType::fp32 ? 4 : 2; }

namespace detail {

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_from_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

}  // namespace detail

inline float fp32_from_bf16(uint16_t half) { return detail::float_from_bits(static_cast<uint32_t>(half) << 16); }

// Rounds to nearest, ties to even; NaN stays NaN.
inline uint16_t bf16_from_fp32(float value) {
  const uint32_t bits = detail::bits_from_float(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(value != value ? 0x7FC0u : rounded);
}

// Branch-free so that compilers vectorise it: rebias the exponent by multiplication, handle subnormals by subtraction.
inline float fp32_from_fp16(uint16_t half) {
  const uint32_t word = static_cast<uint32_t>(half) << 16;
  const uint32_t sign = word & 0x80000000u;
  const uint32_t twice = word + word;
  const float normal = detail::float_from_bits((twice >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
  const float subnormal = detail::float_from_bits((twice >> 17) | (126u << 23)) - 0.5f;
  const uint32_t magnitude = detail::bits_from_float(twice < (1u << 27) ? subnormal : normal);
  return detail::float_from_bits(sign | magnitude);
}

// Rounds to nearest, ties to even; overflow gives infinity; NaN stays NaN.
inline uint16_t fp16_from_fp32(float value) {
  const uint32_t word = detail::bits_from_float(value);
  const uint32_t sign = word & 0x80000000u;
  const uint32_t twice = word + word;
  uint32_t bias = twice & 0xFF000000u;
  if (bias < 0x71000000u) bias = 0x71000000u;
  float base = detail::float_from_bits(word & 0x7FFFFFFFu) * 0x1.0p+112f * 0x1.0p-110f;
  base = detail::float_from_bits((bias >> 1) + 0x07800000u) + base;
  const uint32_t bits = detail::bits_from_float(base);
  const uint32_t magnitude = ((bits >> 13) & 0x7C00u) + (bits & 0x0FFFu);
  return static_cast<uint16_t>((sign >> 16) | (twice > 0xFF000000u ? 0x7E00u : magnitude));
}

// Copies `count` elements of `dtype` to fp32.
inline void widen(const void* source, DType dtype, int64_t count, float* target) {
  if (dtype == DType::fp32) {
    std::memcpy(target, source, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  const auto* half = static_cast<const uint16_t*>(source);
  if (dtype == DType::fp16) {
    for (int64_t i = 0; i < count; ++i) target[i] = fp32_from_fp16(half[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) target[i] = fp32_from_bf16(half[i]);
  }
}

// Copies `count` fp32 elements to `dtype`, rounding to nearest even.
inline void narrow(const float* source, int64_t count, DType dtype, void* target) {
  if (dtype == DType::fp32) {
    std::memcpy(target, source, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  auto* half = static_cast<uint16_t*>(target);
  if (dtype == DType::fp16) {
    for (int64_t i = 0; i < count; ++i) half[i] = fp16_from_fp32(source[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) half[i] = bf16_from_fp32(source[i]);
  }
}

}  // namespace xpatch
