// Which instruction set the CPU kernels use: the best one that was built and that this machine has.
#pragma once

#include <vector>

namespace xpatch {

// In the order of preference on a machine that has several.
enum class Isa : int { portable = 0, dotprod = 1, avx2 = 2, avx2vnni = 3, avx512 = 4, avx512vnni = 5 };

const char* isa_name(Isa isa);

// Built into this binary, weakest first.
std::vector<Isa> isas_built();

// Decided once. The environment variable XPATCH_ISA (a name above) lowers the choice; it never raises it above what the
// machine has, and an unknown name throws Error.
Isa isa_in_use();

}  // namespace xpatch

// The instruction sets of this build, for tables of kernels that exist once for each (see core/simd.h).
#if defined(XPATCH_HAS_DOTPROD)
#define XPATCH_IF_DOTPROD(code) code
#else
#define XPATCH_IF_DOTPROD(code)
#endif
#if defined(XPATCH_HAS_AVX2)
#define XPATCH_IF_AVX2(code) code
#else
#define XPATCH_IF_AVX2(code)
#endif
#if defined(XPATCH_HAS_AVX2VNNI)
#define XPATCH_IF_AVX2VNNI(code) code
#else
#define XPATCH_IF_AVX2VNNI(code)
#endif
#if defined(XPATCH_HAS_AVX512)
#define XPATCH_IF_AVX512(code) code
#else
#define XPATCH_IF_AVX512(code)
#endif
#if defined(XPATCH_HAS_AVX512VNNI)
#define XPATCH_IF_AVX512VNNI(code) code
#else
#define XPATCH_IF_AVX512VNNI(code)
#endif

#if defined(XPATCH_ISA)  // a file that is compiled once for each declares its own
#define XPATCH_IF_ISA(code) code
#else
#define XPATCH_IF_ISA(code)
#endif

// Declares `extern const TYPE NAME;` in the namespace of every instruction set. Use it inside namespace xpatch.
#define XPATCH_DECLARE_KERNELS(TYPE, NAME)                               \
  namespace portable {                                                   \
  extern const TYPE NAME;                                                \
  }                                                                      \
  XPATCH_IF_DOTPROD(namespace dotprod { extern const TYPE NAME; })       \
  XPATCH_IF_AVX2(namespace avx2 { extern const TYPE NAME; })             \
  XPATCH_IF_AVX2VNNI(namespace avx2vnni { extern const TYPE NAME; })     \
  XPATCH_IF_AVX512(namespace avx512 { extern const TYPE NAME; })         \
  XPATCH_IF_AVX512VNNI(namespace avx512vnni { extern const TYPE NAME; }) \
  XPATCH_IF_ISA(namespace XPATCH_ISA { extern const TYPE NAME; })

// NAME of the instruction set in use.
#define XPATCH_KERNELS(NAME)                                                                    \
  ([]() -> decltype(::xpatch::portable::NAME)& {                                                \
    switch (::xpatch::isa_in_use()) {                                                           \
      XPATCH_IF_AVX512VNNI(case ::xpatch::Isa::avx512vnni : return ::xpatch::avx512vnni::NAME;) \
      XPATCH_IF_AVX512(case ::xpatch::Isa::avx512 : return ::xpatch::avx512::NAME;)             \
      XPATCH_IF_AVX2VNNI(case ::xpatch::Isa::avx2vnni : return ::xpatch::avx2vnni::NAME;)       \
      XPATCH_IF_AVX2(case ::xpatch::Isa::avx2 : return ::xpatch::avx2::NAME;)                   \
      XPATCH_IF_DOTPROD(case ::xpatch::Isa::dotprod : return ::xpatch::dotprod::NAME;)          \
      default:                                                                                  \
        return ::xpatch::portable::NAME;                                                        \
    }                                                                                           \
  }())
