// The noise stream: Philox4x32-10 words, and uniforms and normals made from them.
//
// One text for every C++ backend: host compilers (gcc, clang) and CUDA device code. Every function is
// scalar, pure and branch-free, so a loop of a fixed number of calls turns into SIMD code. No tensors,
// no geometry, no I/O here: which element gets which counter is in geometry.h.
//
// Host builds want -fno-math-errno (else sqrtf may be a call and nothing vectorises) and must not use
// -ffast-math: the exact angle reduction and the logarithm near 1 depend on IEEE arithmetic.
//
// Error of a normal against a float64 evaluation of the same words: below 1.2e-6 absolute, with or
// without contraction to fused multiply-adds. This is the sum of the worst radius (3.5e-7) and 5.77 times
// the worst sine or cosine (8.9e-8) and one rounding, from all 2^23 values of either word
// (tests/csrc/test_philox_header.py runs through them again); the largest seen in a product is 7.4e-7.
//
// Sources: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11;
// Box, Muller, "A note on the generation of random normal deviates", 1958. The polynomials are
// minimax fits made for this file.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define NCSN_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define NCSN_HD inline __attribute__((always_inline))
#else
#define NCSN_HD inline
#endif

namespace ncsn {

// The uses that share a seed: the fourth counter word.
enum Stream : uint32_t {
  kStreamInitialState = 0,
  kStreamLangevin = 1,
  kStreamTraining = 2,
  kStreamOther = 3,
};

struct PhiloxKey {
  uint32_t lo, hi;
};

// (element // 4, sample, step, stream), each modulo 2^32.
struct PhiloxCounter {
  uint32_t group, sample, step, stream;
};

struct PhiloxWords {
  uint32_t w0, w1, w2, w3;
};

// Four floats: the values of elements 4k, 4k + 1, 4k + 2, 4k + 3.
struct Quad {
  float v0, v1, v2, v3;
};

// The seed is a 64-bit pattern: the sign of an int64_t that carries it is its top bit.
NCSN_HD PhiloxKey philox_key(uint64_t seed) {
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
}

NCSN_HD PhiloxWords philox4x32_10(PhiloxCounter counter, PhiloxKey key) {
  constexpr uint32_t kMul0 = 0xD2511F53u, kMul1 = 0xCD9E8D57u;    // the paper's multipliers
  constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;  // golden ratio, sqrt(3) - 1
  uint32_t c0 = counter.group, c1 = counter.sample, c2 = counter.step, c3 = counter.stream;
  uint32_t k0 = key.lo, k1 = key.hi;
#if defined(__CUDA_ARCH__)
#pragma unroll
#elif defined(__CUDACC__)  // nvcc's own front end knows no host pragma
#elif defined(__clang__)
#pragma clang loop unroll(full)
#elif defined(__GNUC__)
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kMul0) * c0;
    const uint64_t p1 = static_cast<uint64_t>(kMul1) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += kWeyl0;
    k1 += kWeyl1;
  }
  return {c0, c1, c2, c3};
}

namespace detail {

NCSN_HD uint32_t float_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

NCSN_HD float bits_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

// 2k + 1 for the word's top 23 bits k, so that u = odd_numerator(w) * 2^-24 and every u is exact.
// Signed, because conversions of signed integers are the ones that SSE2 and AVX2 have.
NCSN_HD int32_t odd_numerator(uint32_t word) {
  return static_cast<int32_t>((word >> 8) | 1u);
}

// ln(x) for a positive normal x. x = 2^e * (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)), f exact, and
// ln(1 + f) = f - f^2/2 + f^3 P(f): relative error 3.3e-8 before rounding, hence accurate near x = 1.
NCSN_HD float ln(float x) {
  constexpr uint32_t kSqrtHalf = 0x3F3504F3u;
  constexpr float kLn2Hi = 0.693359375f;      // 9 bits, so e * kLn2Hi is exact
  constexpr float kLn2Lo = -2.12194440e-4f;   // ln 2 - kLn2Hi
  const uint32_t bits = float_bits(x);
  const int32_t e = static_cast<int32_t>(bits - kSqrtHalf) >> 23;
  const float f = bits_float(bits - (static_cast<uint32_t>(e) << 23)) - 1.0f;
  const float n = static_cast<float>(e);
  float p = 8.91787798e-2f;
  p = p * f - 1.43501947e-1f;
  p = p * f + 1.48769550e-1f;
  p = p * f - 1.65656353e-1f;
  p = p * f + 1.99653988e-1f;
  p = p * f - 2.50017469e-1f;
  p = p * f + 3.33338580e-1f;
  const float square = f * f;
  const float tail = p * (f * square) + n * kLn2Lo;
  return n * kLn2Hi + (f + (tail - 0.5f * square));
}

struct SinCos {
  float sin, cos;
};

// sin and cos of 2 pi u, u = odd * 2^-24. 4u = q + f with an integer q and |f| < 1/2, split in integers
// and therefore exactly; the polynomials are sin(pi/2 f) and cos(pi/2 f), q picks and signs them.
NCSN_HD SinCos sincos_turn(int32_t odd) {
  const int32_t q = (odd + (1 << 21)) >> 22;
  const float f = static_cast<float>(odd - (q << 22)) * 0x1p-22f;
  const float t = f * f;
  const float s =
      f * (1.57079632f + t * (-6.45963479e-1f + t * (7.96802281e-2f + t * -4.60217700e-3f)));
  const float c =
      1.0f + t * (-1.23370054f + t * (2.53669244e-1f + t * (-2.08602885e-2f + t * 9.04021672e-4f)));
  const uint32_t quadrant = static_cast<uint32_t>(q);
  const uint32_t swap = 0u - (quadrant & 1u);
  const uint32_t s_bits = float_bits(s), c_bits = float_bits(c);
  const uint32_t differ = (s_bits ^ c_bits) & swap;
  const uint32_t sin_sign = (quadrant & 2u) << 30;
  const uint32_t cos_sign = ((quadrant + 1u) & 2u) << 30;
  return {bits_float((s_bits ^ differ) ^ sin_sign), bits_float((c_bits ^ differ) ^ cos_sign)};
}

}  // namespace detail

// The square root, correctly rounded whatever the compiler's flags.
NCSN_HD float square_root(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return sqrtf(x);
#endif
}

// u = ((word >> 9) + 0.5) * 2^-23: exact in float32, never 0, never 1.
NCSN_HD float uniform(uint32_t word) {
  return static_cast<float>(detail::odd_numerator(word)) * 0x1p-24f;
}

NCSN_HD Quad uniform4(PhiloxWords w) {
  return {uniform(w.w0), uniform(w.w1), uniform(w.w2), uniform(w.w3)};
}

// sqrt(-2 ln u) of the word's uniform.
NCSN_HD float normal_radius(uint32_t word) {
  return square_root(-2.0f * detail::ln(uniform(word)));
}

// Box-Muller: r cos t, r sin t from words 0 and 1, the same from words 2 and 3. |z| <= 5.77.
NCSN_HD Quad normal4(PhiloxWords w) {
  const float r0 = normal_radius(w.w0), r1 = normal_radius(w.w2);
  const detail::SinCos a0 = detail::sincos_turn(detail::odd_numerator(w.w1));
  const detail::SinCos a1 = detail::sincos_turn(detail::odd_numerator(w.w3));
  return {r0 * a0.cos, r0 * a0.sin, r1 * a1.cos, r1 * a1.sin};
}

}  // namespace ncsn
