// Which instruction set the CPU kernels use: the best one that was built and that this machine has.
#pragma once

#include <vector>

namespace xpatch {

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2 };

const char* isa_name(Isa isa);

// Built into this binary, weakest first.
std::vector<Isa> isas_built();

// Decided once. The environment variable XPATCH_ISA (portable, avx2, avx512) lowers the choice; it never raises it
// above what the machine has, and an unknown name throws Error.
Isa isa_in_use();

}  // namespace xpatch
