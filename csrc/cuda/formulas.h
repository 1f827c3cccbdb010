// What becomes of a value: the formulas of `normalize` and `backward_apply`, for their own kernels (map.h) and for
// those that reduce first (whole.h).
#pragma once

namespace precisebn::cuda {

template <class Real>
__device__ inline Real normalized(const Real (&x)[1], const Real (&center_scale_shift)[3]) {
  return fma(x[0] - center_scale_shift[0], center_scale_shift[1], center_scale_shift[2]);
}

template <class Real>
__device__ inline Real applied(const Real (&dy_x)[2], const Real (&center_a_b_c)[4]) {
  return fma(center_a_b_c[1], dy_x[0], fma(center_a_b_c[2], dy_x[1] - center_a_b_c[0], center_a_b_c[3]));
}

}  // namespace precisebn::cuda
