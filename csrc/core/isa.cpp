#include "core/isa.h"

#include <cstdlib>
#include <string>

#include "core/check.h"

#if defined(_MSC_VER) && defined(XPATCH_HAS_AVX2)
#include <immintrin.h>
#include <intrin.h>
#elif defined(XPATCH_HAS_AVX2)
#include <cpuid.h>
#elif defined(XPATCH_HAS_DOTPROD) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace xpatch {
namespace {

constexpr Isa kAll[] = {Isa::portable, Isa::dotprod, Isa::avx2, Isa::avx2vnni, Isa::avx512, Isa::avx512vnni};

#if defined(XPATCH_HAS_AVX2)

struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
#if defined(_MSC_VER)
  int found[4];
  __cpuidex(found, 0, 0);
  if (static_cast<unsigned>(found[0]) < leaf) return r;
  __cpuidex(found, static_cast<int>(leaf), static_cast<int>(subleaf));
  r.eax = static_cast<unsigned>(found[0]);
  r.ebx = static_cast<unsigned>(found[1]);
  r.ecx = static_cast<unsigned>(found[2]);
  r.edx = static_cast<unsigned>(found[3]);
#else
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
#endif
  return r;
}

// Which register halves the operating system saves (XCR0); 0 where it saves none beyond SSE.
unsigned saved_by_the_system() {
  if ((cpuid(1, 0).ecx >> 27 & 1) == 0) return 0;
#if defined(_MSC_VER)
  return static_cast<unsigned>(_xgetbv(0));
#else
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
#endif
}

bool machine_has(Isa isa) {
  if (isa == Isa::portable) return true;
  if (isa == Isa::dotprod) return false;
  const Registers one = cpuid(1, 0), seven = cpuid(7, 0), seven_one = cpuid(7, 1);
  const unsigned saved = saved_by_the_system();
  const bool fma = one.ecx >> 12 & 1, f16c = one.ecx >> 29 & 1, has_avx2 = seven.ebx >> 5 & 1;
  if ((saved & 0x6) != 0x6 || !fma || !f16c || !has_avx2) return false;
  if (isa == Isa::avx2) return true;
  if (isa == Isa::avx2vnni) return seven_one.eax >> 4 & 1;
  const unsigned needed = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);  // F, DQ, BW, VL
  if ((saved & 0xE6) != 0xE6 || (seven.ebx & needed) != needed) return false;
  return isa == Isa::avx512 || (seven.ecx >> 11 & 1);
}

#else

bool machine_has(Isa isa) {
  if (isa == Isa::portable) return true;
#if defined(XPATCH_HAS_DOTPROD) && defined(__linux__)
  return isa == Isa::dotprod && (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#elif defined(XPATCH_HAS_DOTPROD)
  return isa == Isa::dotprod;  // every 64-bit ARM Mac and Windows machine has it
#else
  return false;
#endif
}

#endif

Isa choose() {
  Isa highest = Isa::avx512vnni;
  if (const char* wish = std::getenv("XPATCH_ISA"); wish != nullptr && *wish != '\0') {
    const std::string name(wish);
    std::string known;
    bool found = false;
    for (Isa isa : kAll) {
      if (name == isa_name(isa)) {
        highest = isa;
        found = true;
      }
      known += (known.empty() ? "" : ", ") + std::string(isa_name(isa));
    }
    XPATCH_CHECK(found, "XPATCH_ISA must be one of " << known << "; found '" << name << "'");
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
    case Isa::dotprod:
      return "dotprod";
    case Isa::avx2:
      return "avx2";
    case Isa::avx2vnni:
      return "avx2vnni";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512vnni:
      return "avx512vnni";
    default:
      return "portable";
  }
}

std::vector<Isa> isas_built() {
  std::vector<Isa> built = {Isa::portable};
  XPATCH_IF_DOTPROD(built.push_back(Isa::dotprod);)
  XPATCH_IF_AVX2(built.push_back(Isa::avx2);)
  XPATCH_IF_AVX2VNNI(built.push_back(Isa::avx2vnni);)
  XPATCH_IF_AVX512(built.push_back(Isa::avx512);)
  XPATCH_IF_AVX512VNNI(built.push_back(Isa::avx512vnni);)
  return built;
}

Isa isa_in_use() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace xpatch
