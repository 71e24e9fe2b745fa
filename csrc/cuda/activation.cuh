// ELU and its slope for the element types of the CUDA kernels.
//
// Results of 16 bits are rounded to 8 or 11 bits, so that the hardware's exponential (relative error 2^-22) is as good as
// the polynomials of common/elu.h, which would cost more time there than the memory does. float32 and float64 use these.

#pragma once

#include "common/elu.h"

namespace ncsn {

// e^u by the hardware.
NCSN_HD float quick_exp(float u) {
  constexpr float kLog2e = 1.44269504f;
#if defined(__CUDA_ARCH__)
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(u * kLog2e));
  return e;
#else
  return exp2f(u * kLog2e);
#endif
}

template <typename T, typename A>
NCSN_HD A elu_for(A u) {
  if constexpr (sizeof(T) == 2) {
    return u > A(0) ? u : quick_exp(u) - A(1);
  } else {
    return elu<true>(u);
  }
}

template <typename T, typename A>
NCSN_HD A elu_slope_for(A u) {
  if constexpr (sizeof(T) == 2) {
    return u > A(0) ? A(1) : quick_exp(u);
  } else {
    return elu_slope<true>(u);
  }
}

}  // namespace ncsn
