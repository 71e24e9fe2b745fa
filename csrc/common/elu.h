// ELU with alpha 1, its slope, and the two functions below zero that they are made of, for every C++ backend.
//
// Scalar and pure, so that a loop of a fixed number of calls turns into SIMD code, and made for IEEE arithmetic: never
// -ffast-math, since the rounding by a large number needs the sums as they stand. Host compilers want
// -fno-trapping-math, which changes no result: without it GCC keeps the comparisons as branches, and makes no SIMD code
// below AVX-512.
//
// With n = round(x / ln 2) and r = x - n ln 2, e^x = 2^n (1 + p(r)) and e^x - 1 = 2^n p(r) + (2^n - 1): at n = 0 this
// is p itself, so that expm1 keeps its relative error down to the smallest x. For x <= 0, with or without fused
// multiply-adds (tests/ops/test_cond_instance_norm_elu.py measures it at every SIMD level):
//
//     float   relative error of both below 1e-7, hence the absolute error too; of exp for x > -87.3, and beyond an
//             absolute error below 1e-38
//     double  relative error of both below 2.5e-16; of exp for x > -708
//
// NaN gives NaN, minus infinity gives -1 and 0. For x > 0 the two are not meant; they return some number.

#pragma once

#include "common/philox.h"  // NCSN_HD

namespace ncsn {

// a * b + c; fused only where the instruction exists, since the library's fma is hundreds of times slower.
template <bool kFma, typename A>
NCSN_HD A multiply_add(A a, A b, A c) {
  if constexpr (kFma && sizeof(A) == sizeof(float)) {
    return fmaf(a, b, c);
  } else if constexpr (kFma) {
    return fma(a, b, c);
  } else {
    return a * b + c;
  }
}

namespace detail {

template <typename A>
struct ExpConstants;

// kRound: added to a small number and subtracted again, it rounds to an integer, and leaves that in its low bits.
// kLn2Hi has so few bits that n * kLn2Hi is exact. At kFlat expm1 is -1; at kLowest n gives the exponent of 0: exp is
// 0.
template <>
struct ExpConstants<float> {
  using Bits = uint32_t;
  static constexpr int kMantissa = 23;
  static constexpr Bits kOne = 0x3F800000u;
  static constexpr float kRound = 0x1.8p23f, kLog2e = 1.44269504f;
  static constexpr float kLn2Hi = 0.693359375f, kLn2Lo = -2.12194440e-4f;
  static constexpr float kLowest = -88.0f, kFlat = -20.0f;
};

template <>
struct ExpConstants<double> {
  using Bits = uint64_t;
  static constexpr int kMantissa = 52;
  static constexpr Bits kOne = 0x3FF0000000000000u;
  static constexpr double kRound = 0x1.8p52, kLog2e = 1.4426950408889634;
  static constexpr double kLn2Hi = 0x1.62e42fefp-1, kLn2Lo = 7.440617110012397e-11;
  static constexpr double kLowest = -709.0, kFlat = -40.0;
};

NCSN_HD uint32_t bits_of(float x) { return float_bits(x); }
NCSN_HD float from_bits(uint32_t bits) { return bits_float(bits); }

NCSN_HD uint64_t bits_of(double x) {
#if defined(__CUDA_ARCH__)
  return static_cast<uint64_t>(__double_as_longlong(x));
#else
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

NCSN_HD double from_bits(uint64_t bits) {
#if defined(__CUDA_ARCH__)
  return __longlong_as_double(static_cast<long long>(bits));
#else
  double x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

// e^r - 1 for |r| <= ln(2)/2: r + r^2 q(r), q a minimax fit made for this file; relative error 1.3e-8 before rounding.
template <bool kFma>
NCSN_HD float expm1_near_zero(float r) {
  float q = 1.38824922e-3f;
  q = multiply_add<kFma>(q, r, 8.36664718e-3f);
  q = multiply_add<kFma>(q, r, 4.16672044e-2f);
  q = multiply_add<kFma>(q, r, 1.66665420e-1f);
  q = multiply_add<kFma>(q, r, 4.99999970e-1f);
  return multiply_add<kFma>(q, r * r, r);
}

// The same in float64, by 13 terms of the series; relative error 1.3e-17 before rounding.
template <bool kFma>
NCSN_HD double expm1_near_zero(double r) {
  double q = 1.0 / 6227020800.0;
  q = multiply_add<kFma>(q, r, 1.0 / 479001600.0);
  q = multiply_add<kFma>(q, r, 1.0 / 39916800.0);
  q = multiply_add<kFma>(q, r, 1.0 / 3628800.0);
  q = multiply_add<kFma>(q, r, 1.0 / 362880.0);
  q = multiply_add<kFma>(q, r, 1.0 / 40320.0);
  q = multiply_add<kFma>(q, r, 1.0 / 5040.0);
  q = multiply_add<kFma>(q, r, 1.0 / 720.0);
  q = multiply_add<kFma>(q, r, 1.0 / 120.0);
  q = multiply_add<kFma>(q, r, 1.0 / 24.0);
  q = multiply_add<kFma>(q, r, 1.0 / 6.0);
  q = multiply_add<kFma>(q, r, 0.5);
  return multiply_add<kFma>(q, r * r, r);
}

template <typename A>
struct PowerAndRest {
  A power, rest;  // e^x = power * (1 + rest)
};

template <bool kFma, typename A>
NCSN_HD PowerAndRest<A> split_exp(A x) {
  using C = ExpConstants<A>;
  const A rounded = multiply_add<kFma>(x, C::kLog2e, C::kRound);
  const A n = rounded - C::kRound;
  const A r = multiply_add<kFma>(n, -C::kLn2Lo, multiply_add<kFma>(n, -C::kLn2Hi, x));
  // The shift drops all of kRound and leaves n where the exponent is.
  const auto exponent = bits_of(rounded) << C::kMantissa;
  return {from_bits(exponent + C::kOne), expm1_near_zero<kFma>(r)};
}

}  // namespace detail

// e^x - 1 for x <= 0.
template <bool kFma, typename A>
NCSN_HD A expm1_below_zero(A x) {
  constexpr A flat = detail::ExpConstants<A>::kFlat;
  const auto e = detail::split_exp<kFma>(x < flat ? flat : x);
  return multiply_add<kFma>(e.power, e.rest, e.power - A(1));
}

// e^x for x <= 0.
template <bool kFma, typename A>
NCSN_HD A exp_below_zero(A x) {
  constexpr A lowest = detail::ExpConstants<A>::kLowest;
  const auto e = detail::split_exp<kFma>(x < lowest ? lowest : x);
  return e.power * (A(1) + e.rest);
}

template <bool kFma, typename A>
NCSN_HD A elu(A u) {
  return u > A(0) ? u : expm1_below_zero<kFma>(u);
}

// The derivative of ELU; 1 at 0 from both sides.
template <bool kFma, typename A>
NCSN_HD A elu_slope(A u) {
  return u > A(0) ? A(1) : exp_below_zero<kFma>(u);
}

}  // namespace ncsn
