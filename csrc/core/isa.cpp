#include "core/isa.h"

#include <cstdlib>
#include <string>

#include "core/check.h"

#if defined(_MSC_VER) && defined(XPATCH_HAS_AVX2)
#include <immintrin.h>
#include <intrin.h>
#endif

namespace xpatch {
namespace {

#if !defined(XPATCH_HAS_AVX2)
bool machine_has(Isa isa) { return isa == Isa::portable; }
#elif defined(_MSC_VER)
bool machine_has(Isa isa) {
  if (isa == Isa::portable) return true;
  int leaf1[4], leaf7[4];
  __cpuidex(leaf1, 1, 0);
  __cpuidex(leaf7, 7, 0);
  const bool osxsave = leaf1[2] & (1 << 27);
  const unsigned long long xcr0 = osxsave ? _xgetbv(0) : 0;
  const bool fma = leaf1[2] & (1 << 12), f16c = leaf1[2] & (1 << 29), avx2 = leaf7[1] & (1 << 5);
  if (isa == Isa::avx2) return (xcr0 & 0x6) == 0x6 && fma && f16c && avx2;
  const unsigned needed = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);  // F, DQ, BW, VL
  return (xcr0 & 0xE6) == 0xE6 && fma && (static_cast<unsigned>(leaf7[1]) & needed) == needed;
}
#else
bool machine_has(Isa isa) {
  if (isa == Isa::portable) return true;
  if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}
#endif

Isa choose() {
  Isa highest = Isa::avx512;
  if (const char* wish = std::getenv("XPATCH_ISA"); wish != nullptr && *wish != '\0') {
    const std::string name(wish);
    XPATCH_CHECK(name == "portable" || name == "avx2" || name == "avx512",
                 "XPATCH_ISA must be portable, avx2 or avx512, found '" << name << "'");
    highest = name == "portable" ? Isa::portable : name == "avx2" ? Isa::avx2 : Isa::avx512;
  }
  Isa best = Isa::portable;
  for (Isa isa : isas_built()) {
    if (isa <= highest && machine_has(isa)) best = isa;
  }
  return best;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    default:
      return "portable";
  }
}

std::vector<Isa> isas_built() {
  return {
      Isa::portable,
#if defined(XPATCH_HAS_AVX2)
      Isa::avx2,
#endif
#if defined(XPATCH_HAS_AVX512)
      Isa::avx512,
#endif
  };
}

Isa isa_in_use() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace xpatch
