// Activation codes and their scalar form, shared by the CPU and CUDA kernels. The codes are part of the binding's
// interface. NaN in gives NaN out, as in PyTorch.
//
// The functions have internal linkage on purpose: this header is compiled for several instruction sets, and the
// linker must never take one set's copy for another.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define XPATCH_HOST_DEVICE __host__ __device__
#else
#define XPATCH_HOST_DEVICE
#endif

namespace xpatch {

enum class Activation : int { relu = 0, gelu = 1, gelu_tanh = 2, silu = 3, identity = 4 };

static inline bool is_activation(int code) { return code >= 0 && code <= 4; }

template <Activation A>
static XPATCH_HOST_DEVICE inline float activate(float z) {
  if constexpr (A == Activation::relu) {
    return z < 0.0f ? 0.0f : z;
  } else if constexpr (A == Activation::gelu) {
    return 0.5f * z * (1.0f + erff(z * 0.70710678118654752440f));
  } else if constexpr (A == Activation::gelu_tanh) {
    return 0.5f * z * (1.0f + tanhf(0.79788456080286535588f * (z + 0.044715f * z * z * z)));
  } else if constexpr (A == Activation::silu) {
    return z / (1.0f + expf(-z));
  } else {
    return z;
  }
}

}  // namespace xpatch
