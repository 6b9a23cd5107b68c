// Tables of CPU kernels, one per instruction set, and the choice between them. `table` is defined in a *_cpu.cpp inside
// namespace XPATCH_ISA.
#pragma once

#include "core/isa.h"

#if defined(XPATCH_HAS_AVX2)
#define XPATCH_CASE_AVX2(table) \
  case Isa::avx2:               \
    return avx2::table;
#else
#define XPATCH_CASE_AVX2(table)
#endif
#if defined(XPATCH_HAS_AVX512)
#define XPATCH_CASE_AVX512(table) \
  case Isa::avx512:               \
    return avx512::table;
#else
#define XPATCH_CASE_AVX512(table)
#endif

// In a header: declares the table of every instruction set.
#define XPATCH_DECLARE_KERNELS(Table, table) \
  namespace portable {                       \
  extern const Table table;                  \
  }                                          \
  namespace avx2 {                           \
  extern const Table table;                  \
  }                                          \
  namespace avx512 {                         \
  extern const Table table;                  \
  }

// In a .cpp: defines kernels(), the table for the instruction set in use.
#define XPATCH_CHOOSE_KERNELS(Table, table) \
  const Table& kernels() {                  \
    switch (isa_in_use()) {                 \
      XPATCH_CASE_AVX512(table)             \
      XPATCH_CASE_AVX2(table)               \
      default:                              \
        return portable::table;             \
    }                                       \
  }
