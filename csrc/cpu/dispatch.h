// Sources in kernels/ are compiled once for every instruction set below, each time in the namespace of that
// name, and publish a table of functions indexed by dtype. PRECISEBN_DISPATCH picks the table for the CPU at hand.
#pragma once

namespace precisebn::cpu {

enum Dtype : int { kFloat32, kFloat64, kFloat16, kBFloat16, kNumDtypes };

enum class Isa { kBaseline, kAvx2, kAvx512 };
Isa isa();

}  // namespace precisebn::cpu

#if defined(__x86_64__)
#define PRECISEBN_DECLARE_TABLE(Type, table) \
  namespace avx512 {                         \
  extern const Type table[kNumDtypes];       \
  }                                          \
  namespace avx2 {                           \
  extern const Type table[kNumDtypes];       \
  }                                          \
  namespace baseline {                       \
  extern const Type table[kNumDtypes];       \
  }
#define PRECISEBN_DISPATCH(table) \
  (isa() == Isa::kAvx512 ? avx512::table : isa() == Isa::kAvx2 ? avx2::table : baseline::table)
#else
#define PRECISEBN_DECLARE_TABLE(Type, table) \
  namespace baseline {                       \
  extern const Type table[kNumDtypes];       \
  }
#define PRECISEBN_DISPATCH(table) baseline::table
#endif
