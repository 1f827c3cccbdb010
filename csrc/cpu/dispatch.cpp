#include "dispatch.h"

#include <string>

#include "../torch.h"

namespace precisebn::cpu {

Isa isa() {
#if defined(__x86_64__)
  // Every CPU with AVX2 has F16C, which older compilers cannot ask for by name.
  static const Isa best = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
                              ? Isa::kAvx512
                          : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? Isa::kAvx2
                                                                                            : Isa::kBaseline;
  return best;
#else
  return Isa::kBaseline;
#endif
}

namespace {

std::string cpu_capability() {
  switch (isa()) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(precisebn, CompositeExplicitAutograd, m) {
  m.impl("_cpu_capability", TORCH_BOX(&cpu_capability));
}

}  // namespace precisebn::cpu
