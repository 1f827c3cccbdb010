// Vectors of the widest register of the instruction set this file is compiled for, and how elements of the four dtypes
// become lanes of them and back.
//
// GCC's and Clang's vector extension gives the arithmetic, so that one source serves every CPU; intrinsics appear only
// where the extension has no word (float16 conversion, masked loads). Kernel sources are compiled once per instruction
// set with PRECISEBN_ISA as the namespace. Everything here has internal linkage and includes no C++ library header:
// an inline function shared between instruction sets would be merged by the linker and could carry AVX-512 code
// to a CPU that has none.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#ifndef PRECISEBN_ISA
#define PRECISEBN_ISA baseline
#endif

namespace precisebn::cpu::PRECISEBN_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

typedef float VecF __attribute__((vector_size(kBytes)));
typedef double VecD __attribute__((vector_size(kBytes)));
typedef int32_t VecI32 __attribute__((vector_size(kBytes)));
typedef uint32_t VecU32 __attribute__((vector_size(kBytes)));
typedef int64_t VecI64 __attribute__((vector_size(kBytes)));
typedef float HalfVecF __attribute__((vector_size(kBytes / 2)));
typedef uint16_t HalfVecU16 __attribute__((vector_size(kBytes / 2)));

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

#define PRECISEBN_INLINE __attribute__((always_inline)) inline

// The float64 image of a VecF: two vectors. It has the same operators, so that a loop written for VecF runs in float64
// when instantiated with it.
struct WideVec {
  VecD lo, hi;
};
PRECISEBN_INLINE WideVec operator+(WideVec a, WideVec b) { return {a.lo + b.lo, a.hi + b.hi}; }
PRECISEBN_INLINE WideVec operator-(WideVec a, WideVec b) { return {a.lo - b.lo, a.hi - b.hi}; }
PRECISEBN_INLINE WideVec operator*(WideVec a, WideVec b) { return {a.lo * b.lo, a.hi * b.hi}; }
PRECISEBN_INLINE WideVec operator/(WideVec a, WideVec b) { return {a.lo / b.lo, a.hi / b.hi}; }
PRECISEBN_INLINE WideVec& operator+=(WideVec& a, WideVec b) { return a = a + b; }

template <class V>
constexpr int kLanes = 0;
template <>
constexpr int kLanes<VecF> = kBytes / 4;
template <>
constexpr int kLanes<WideVec> = kBytes / 4;
template <>
constexpr int kLanes<VecD> = kBytes / 8;

// In what an element is computed, and its image in float64.
template <class T>
struct Compute {
  using Vec = VecF;
  using Scalar = float;
  using Wide = WideVec;
};
template <>
struct Compute<double> {
  using Vec = VecD;
  using Scalar = double;
  using Wide = VecD;
};

// Through memcpy alone GCC keeps v in memory for all its life, in the inner loops too.
PRECISEBN_INLINE WideVec widen(VecF v) {
#if defined(__AVX512F__)
  return {(VecD)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v)),
          (VecD)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1))};
#elif defined(__AVX2__)
  return {(VecD)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v)),
          (VecD)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1))};
#elif defined(__SSE2__)
  return {(VecD)_mm_cvtps_pd((__m128)v), (VecD)_mm_cvtps_pd(_mm_movehl_ps((__m128)v, (__m128)v))};
#else
  HalfVecF lo, hi;
  memcpy(&lo, &v, sizeof lo);
  memcpy(&hi, reinterpret_cast<const char*>(&v) + sizeof lo, sizeof hi);
  return {__builtin_convertvector(lo, VecD), __builtin_convertvector(hi, VecD)};
#endif
}
PRECISEBN_INLINE WideVec widen(WideVec v) { return v; }
PRECISEBN_INLINE VecD widen(VecD v) { return v; }

PRECISEBN_INLINE VecF narrow(WideVec v) {
#if defined(__AVX512F__)
  return (VecF)_mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps((__m512d)v.lo)),
                                  _mm512_cvtpd_ps((__m512d)v.hi), 1);
#elif defined(__AVX2__)
  return (VecF)_mm256_set_m128(_mm256_cvtpd_ps((__m256d)v.hi), _mm256_cvtpd_ps((__m256d)v.lo));
#elif defined(__SSE2__)
  return (VecF)_mm_movelh_ps(_mm_cvtpd_ps((__m128d)v.lo), _mm_cvtpd_ps((__m128d)v.hi));
#else
  const HalfVecF lo = __builtin_convertvector(v.lo, HalfVecF), hi = __builtin_convertvector(v.hi, HalfVecF);
  VecF both;
  memcpy(&both, &lo, sizeof lo);
  memcpy(reinterpret_cast<char*>(&both) + sizeof lo, &hi, sizeof hi);
  return both;
#endif
}
PRECISEBN_INLINE VecD narrow(VecD v) { return v; }

// value - 0 is value, whatever it is; value + 0 is not for -0, and costs an addition.
template <class V, class S>
PRECISEBN_INLINE V broadcast(S value) {
  if constexpr (sizeof(V) == sizeof(WideVec)) {
    return {value - VecD{}, value - VecD{}};
  } else {
    return value - V{};
  }
}

// Halves until one lane is left: a fixed order, and log2 steps of latency.
PRECISEBN_INLINE double sum_of_lanes(VecD v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_pd((__m512d)v);
#else
  double lanes[kLanes<VecD>];
  memcpy(lanes, &v, sizeof v);
  for (int width = kLanes<VecD> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
#endif
}
PRECISEBN_INLINE double sum_of_lanes(WideVec v) { return sum_of_lanes(v.lo + v.hi); }

// Four numbers, one for each of four vectors, on any instruction set.
typedef float FourF __attribute__((vector_size(16)));
typedef double FourD __attribute__((vector_size(32)));
template <class V>
struct FourOf {
  using type = FourF;
};
template <>
struct FourOf<VecD> {
  using type = FourD;
};

// The sums of the lanes of four vectors at once. Adding in float32 here is a few more links to its chains.
PRECISEBN_INLINE FourF sums_of_lanes(const VecF (&v)[4]) {
#if defined(__SSE2__)
  __m128 quarter[4];
  for (int k = 0; k < 4; ++k) {
#if defined(__AVX512F__)
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)v[k]), _mm512_extractf32x8_ps((__m512)v[k], 1));
#elif defined(__AVX2__)
    const __m256 half = (__m256)v[k];
#endif
#if defined(__AVX2__)
    quarter[k] = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#else
    quarter[k] = (__m128)v[k];
#endif
  }
  const __m128 ab = _mm_add_ps(_mm_unpacklo_ps(quarter[0], quarter[1]), _mm_unpackhi_ps(quarter[0], quarter[1]));
  const __m128 cd = _mm_add_ps(_mm_unpacklo_ps(quarter[2], quarter[3]), _mm_unpackhi_ps(quarter[2], quarter[3]));
  return (FourF)_mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab));
#else
  FourF sums;
  for (int k = 0; k < 4; ++k) sums[k] = static_cast<float>(sum_of_lanes(widen(v[k])));
  return sums;
#endif
}
PRECISEBN_INLINE FourD sums_of_lanes(const VecD (&v)[4]) {
  return FourD{sum_of_lanes(v[0]), sum_of_lanes(v[1]), sum_of_lanes(v[2]), sum_of_lanes(v[3])};
}

// The same, all additions in float64.
PRECISEBN_INLINE FourD wide_sums_of_lanes(const VecF (&v)[4]) {
#if defined(__AVX2__)
  __m256d quarter[4];
  for (int k = 0; k < 4; ++k) {
    const WideVec wide = widen(v[k]);
#if defined(__AVX512F__)
    const __m512d half = (__m512d)(wide.lo + wide.hi);
    quarter[k] = _mm256_add_pd(_mm512_castpd512_pd256(half), _mm512_extractf64x4_pd(half, 1));
#else
    quarter[k] = (__m256d)(wide.lo + wide.hi);
#endif
  }
  const __m256d ab = _mm256_hadd_pd(quarter[0], quarter[1]), cd = _mm256_hadd_pd(quarter[2], quarter[3]);
  return (FourD)_mm256_add_pd(_mm256_permute2f128_pd(ab, cd, 0x20), _mm256_permute2f128_pd(ab, cd, 0x31));
#else
  FourD sums;
  for (int k = 0; k < 4; ++k) sums[k] = sum_of_lanes(widen(v[k]));
  return sums;
#endif
}
PRECISEBN_INLINE FourD wide_sums_of_lanes(const VecD (&v)[4]) { return sums_of_lanes(v); }

// Lanes 0 .. n-1 of v, zeros behind.
PRECISEBN_INLINE VecF first_lanes(VecF v, int n) {
  VecI32 index;
  for (int i = 0; i < kLanes<VecF>; ++i) index[i] = i;
  return (VecF)((VecI32)v & (index < VecI32{} + n));
}
PRECISEBN_INLINE VecD first_lanes(VecD v, int n) {
  VecI64 index;
  for (int i = 0; i < kLanes<VecD>; ++i) index[i] = i;
  return (VecD)((VecI64)v & (index < VecI64{} + n));
}
PRECISEBN_INLINE WideVec first_lanes(WideVec v, int n) {
  return {first_lanes(v.lo, n), first_lanes(v.hi, n - kLanes<VecD>)};
}

// ---- float16 and bfloat16 <-> float32 ----

// GCC takes two conversions of half the width and an insertion for __builtin_convertvector.
PRECISEBN_INLINE VecU32 zero_extend(HalfVecU16 v) {
#if defined(__AVX512F__)
  return (VecU32)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)v);
#elif defined(__AVX2__)
  return (VecU32)_mm256_cvtepu16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, VecU32);
#endif
}
PRECISEBN_INLINE HalfVecU16 truncate(VecU32 v) {
#if defined(__AVX512F__)
  return (HalfVecU16)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)v);
#else
  return __builtin_convertvector(v, HalfVecU16);
#endif
}
PRECISEBN_INLINE VecU32 select(VecU32 mask, VecU32 a, VecU32 b) { return (mask & a) | (~mask & b); }

PRECISEBN_INLINE VecF to_float(HalfVecU16 v, BFloat16) { return (VecF)(zero_extend(v) << 16); }

PRECISEBN_INLINE HalfVecU16 from_float(VecF v, BFloat16) {
  const VecU32 bits = (VecU32)v;
  const VecU32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
#if defined(__AVX512F__)
  const __mmask16 is_nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  return truncate((VecU32)_mm512_mask_set1_epi32((__m512i)rounded, is_nan, 0x7fc0));
#else
  return truncate(select((VecU32)(v != v), VecU32{} + 0x7fc0u, rounded));
#endif
}

PRECISEBN_INLINE VecF to_float(HalfVecU16 v, Half) {
#if defined(__AVX512F__)
  return (VecF)_mm512_maskz_cvtph_ps(0xffff, (__m256i)v);
#elif defined(__F16C__)
  return (VecF)_mm256_cvtph_ps((__m128i)v);
#else
  // The exponent field of float16, moved in place, lacks the difference of the two biases, 127 - 15 = 112; multiplying
  // by 2^112 adds it, and makes subnormals right too. Infinity and NaN keep an exponent of all ones.
  const VecU32 h = zero_extend(v), magnitude = (h & 0x7fffu) << 13;
  const VecU32 finite = (VecU32)((VecF)magnitude * 0x1p112f);
  const VecU32 is_special = (VecU32)(magnitude >= VecU32{} + (0x7c00u << 13));
  return (VecF)(select(is_special, magnitude | 0x7f800000u, finite) | ((h & 0x8000u) << 16));
#endif
}

PRECISEBN_INLINE HalfVecU16 from_float(VecF v, Half) {
#if defined(__AVX512F__)
  return (HalfVecU16)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return (HalfVecU16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const VecU32 bits = (VecU32)v, magnitude = bits & 0x7fffffffu;
  const VecU32 normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Below 2^-14 a unit of float16 is 2^-24, which is the last bit of 0.5f: the addition rounds to it.
  const VecU32 subnormal = (VecU32)((VecF)magnitude + 0.5f) - 0x3f000000u;
  VecU32 result = select((VecU32)(magnitude < VecU32{} + (113u << 23)), subnormal, normal);
  result = select((VecU32)(magnitude >= VecU32{} + 0x477ff000u), VecU32{} + 0x7c00u, result);  // 65520 and above
  result = select((VecU32)(magnitude > VecU32{} + 0x7f800000u), VecU32{} + 0x7e00u, result);   // NaN
  return truncate(result | ((bits >> 16) & 0x8000u));
#endif
}

// ---- Loads and stores: whole vectors, and the first n < lanes elements ----

PRECISEBN_INLINE VecF load(const float* p) {
  VecF v;
  memcpy(&v, p, sizeof v);
  return v;
}
PRECISEBN_INLINE VecD load(const double* p) {
  VecD v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
PRECISEBN_INLINE VecF load(const T* p) {
  HalfVecU16 v;
  memcpy(&v, p, sizeof v);
  return to_float(v, T{});
}

PRECISEBN_INLINE void store(float* p, VecF v) { memcpy(p, &v, sizeof v); }
PRECISEBN_INLINE void store(double* p, VecD v) { memcpy(p, &v, sizeof v); }
template <class T>
PRECISEBN_INLINE void store(T* p, VecF v) {
  const HalfVecU16 h = from_float(v, T{});
  memcpy(p, &h, sizeof h);
}

template <class T>
PRECISEBN_INLINE typename Compute<T>::Vec load_first(const T* p, int n) {
#if defined(__AVX512F__)
  const uint32_t mask = (1u << n) - 1;
  if constexpr (sizeof(T) == 2) {
    return to_float((HalfVecU16)_mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), p), T{});
  } else if constexpr (sizeof(T) == 4) {
    return (VecF)_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p);
  } else {
    return (VecD)_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), p);
  }
#else
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return (VecF)_mm256_maskload_ps(p, (__m256i)first_lanes((VecF)(VecF{} == VecF{}), n));
  if constexpr (sizeof(T) == 8) return (VecD)_mm256_maskload_pd(p, (__m256i)first_lanes((VecD)(VecD{} == VecD{}), n));
#endif
  T elements[kLanes<typename Compute<T>::Vec>] = {};
  for (int i = 0; i < n; ++i) elements[i] = p[i];
  return load(elements);
#endif
}

template <class T>
PRECISEBN_INLINE void store_first(T* p, typename Compute<T>::Vec v, int n) {
#if defined(__AVX512F__)
  const uint32_t mask = (1u << n) - 1;
  if constexpr (sizeof(T) == 2) {
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(mask), (__m256i)from_float(v, T{}));
  } else if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>(mask), (__m512)v);
  } else {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>(mask), (__m512d)v);
  }
#else
  T elements[kLanes<typename Compute<T>::Vec>];
  store(elements, v);
  for (int i = 0; i < n; ++i) p[i] = elements[i];
#endif
}

}  // namespace
}  // namespace precisebn::cpu::PRECISEBN_ISA
