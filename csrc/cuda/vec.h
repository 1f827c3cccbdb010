// Values as they lie in memory and as they are computed with: vectors of 16 bytes, float32 arithmetic for all types up
// to 32 bits, float64 for float64.
#pragma once

#include <cstdint>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace precisebn::cuda {

template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
constexpr int kVector = 16 / sizeof(T);

// What a thread loads or stores by one instruction: 16 bytes, or a single value. Kept as the words that were loaded,
// and unpacked value by value where it is used: the compiler would keep each 16-bit value of an array in its own
// register.
template <class T, int n>
struct Vec {
  static_assert(n == kVector<T>);
  uint4 words;

  __device__ static Vec load(const T* p) { return {__ldg(reinterpret_cast<const uint4*>(p))}; }
  __device__ void store(T* p) const { *reinterpret_cast<uint4*>(p) = words; }

  __device__ unsigned word(int i) const { return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w; }
  __device__ void set_word(int i, unsigned word) {
    (i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w) = word;
  }

  // k is known when this is compiled.
  __device__ Compute<T> operator[](int k) const {
    if constexpr (std::is_same_v<T, double>) {
      return __hiloint2double(static_cast<int>(word(2 * k + 1)), static_cast<int>(word(2 * k)));
    } else if constexpr (std::is_same_v<T, float>) {
      return __uint_as_float(word(k));
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      return __uint_as_float(k % 2 == 0 ? word(k / 2) << 16 : word(k / 2) & 0xffff0000u);
    } else {
      const auto bits = static_cast<unsigned short>(k % 2 == 0 ? word(k / 2) : word(k / 2) >> 16);
      return __half2float(__ushort_as_half(bits));
    }
  }

  __device__ static Vec from(const Compute<T> (&values)[n]) {
    Vec vec;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (std::is_same_v<T, double>) {
        vec.set_word(i,
                     static_cast<unsigned>(i % 2 == 0 ? __double2loint(values[i / 2]) : __double2hiint(values[i / 2])));
      } else if constexpr (std::is_same_v<T, float>) {
        vec.set_word(i, __float_as_uint(values[i]));
      } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
        vec.set_word(i, __bfloat16_as_ushort(pair.x) | static_cast<unsigned>(__bfloat16_as_ushort(pair.y)) << 16);
      } else {
        const __half2 pair = __floats2half2_rn(values[2 * i], values[2 * i + 1]);
        vec.set_word(i, __half_as_ushort(__low2half(pair)) | static_cast<unsigned>(__half_as_ushort(__high2half(pair)))
                                                                 << 16);
      }
    }
    return vec;
  }
};

__device__ inline double widen(double x) { return x; }
__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
struct Vec<T, 1> {
  T value;

  __device__ static Vec load(const T* p) { return {__ldg(p)}; }
  __device__ void store(T* p) const { *p = value; }
  __device__ Compute<T> operator[](int) const { return widen(value); }

  __device__ static Vec from(const Compute<T> (&values)[1]) {
    if constexpr (std::is_same_v<T, __half>) {
      return {__float2half_rn(values[0])};
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      return {__float2bfloat16_rn(values[0])};
    } else {
      return {values[0]};
    }
  }
};

// The sum in pairs: a chain of log2(n) additions. Overwrites the values.
template <int n, class T, int size>
__device__ inline T sum_in_pairs(T (&values)[size]) {
  static_assert((n & (n - 1)) == 0);
  if constexpr (n > 1) {
#pragma unroll
    for (int i = 0; i < n / 2; ++i) values[i] += values[i + n / 2];
    return sum_in_pairs<n / 2>(values);
  }
  return values[0];
}

}  // namespace precisebn::cuda
