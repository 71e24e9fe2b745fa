// The convolution engine's code for one SIMD level: included by kernels.cpp once for each, inside of a namespace, with
//     NCSN_LEVEL_TARGET   the attribute that lets a function use the level's instructions
//     NCSN_LEVEL_WIDTH    floats in a vector
//     NCSN_LEVEL_ROWS     rows of the product's register block: with two accumulators each, all but a few registers
// Here: the vectors, the one-dimensional transforms and the level's table; the kernels are in the two files below.
// No standard library in any of them: a function of it that is compiled with a level's instructions could be the copy
// that the linker keeps for all.

#define NCSN_VECTOR static inline __attribute__((always_inline)) NCSN_LEVEL_TARGET

constexpr int kWidth = NCSN_LEVEL_WIDTH, kRows = NCSN_LEVEL_ROWS, kPanel = 2 * kWidth;

typedef float Vector __attribute__((vector_size(kWidth * sizeof(float))));
typedef float Unaligned __attribute__((vector_size(kWidth * sizeof(float)), aligned(4), may_alias));

NCSN_VECTOR Vector load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
NCSN_VECTOR void store(float* p, Vector v) { *reinterpret_cast<Unaligned*>(p) = v; }
NCSN_VECTOR Vector all(float x) { return x - Vector{}; }

// a * b + c, fused where the level can.
NCSN_VECTOR Vector fma(Vector a, Vector b, Vector c) {
#if NCSN_LEVEL_WIDTH == 16
  return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif NCSN_LEVEL_WIDTH == 8
  return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

NCSN_VECTOR Vector fma(float a, Vector b, Vector c) { return fma(all(a), b, c); }

// --- the one-dimensional transforms ---------------------------------------------------------------

// With b = sqrt(2) and a = 1/b, in the order of the points 0, a, -a, b, -b, infinity. Points and weights of the outer
// points are scaled so that few multiplications are left: the columns of A^T by b for a and -a, by a for b and -b, and
// the rows of G by the inverse of it.

constexpr float kA = 0.707106781f, kB = 1.41421356f, kBThird = 0.471404521f, kBSixth = 0.23570226f;

// By B^T. Row of a point p: the coefficients of x(x^2 - a^2)(x^2 - b^2) / (x - p), at infinity those of the whole.
NCSN_VECTOR void input_transform(const Vector d[6], Vector v[6]) {
  const Vector even_a = fma(-2.0f, d[2], d[4]), odd_a = fma(-2.0f, d[1], d[3]);
  const Vector even_b = fma(-0.5f, d[2], d[4]), odd_b = fma(-0.5f, d[1], d[3]);
  v[0] = fma(-2.5f, d[2], d[0] + d[4]);
  v[1] = fma(kA, odd_a, even_a);
  v[2] = fma(-kA, odd_a, even_a);
  v[3] = fma(kB, odd_b, even_b);
  v[4] = fma(-kB, odd_b, even_b);
  v[5] = fma(-2.5f, d[3], d[1] + d[5]);
}

// By A^T. Column of a point p: the powers 1, p, p^2, p^3, scaled.
NCSN_VECTOR void output_transform(const Vector m[6], Vector y[4]) {
  const Vector s = m[1] + m[2], d = m[1] - m[2], p = m[3] + m[4], q = m[3] - m[4];
  y[0] = fma(kB, s, fma(kA, p, m[0]));
  y[1] = d + q;
  y[2] = fma(kB, p, s * all(kA));
  y[3] = fma(2.0f, q, fma(0.5f, d, m[5]));
}

// By G. Row of a point p: 1, p, p^2, over the product of p's distances from the others (-3/2 at a and -a, 6 at b and
// -b) and over the scale.
NCSN_VECTOR void weight_transform(const Vector g[3], Vector u[6]) {
  const Vector even_a = fma(-kBThird, g[0], g[2] * all(-kBSixth));
  const Vector even_b = fma(kBSixth, g[0], g[2] * all(kBThird));
  const Vector odd = g[1] * all(1.0f / 3);
  u[0] = g[0];
  u[1] = even_a - odd;
  u[2] = even_a + odd;
  u[3] = even_b + odd;
  u[4] = even_b - odd;
  u[5] = g[2];
}

// By A and G^T, the transposes of the last two.
NCSN_VECTOR void gradient_transform(const Vector y[4], Vector m[6]) {
  const Vector even_a = fma(kA, y[2], y[0] * all(kB)), odd_a = fma(0.5f, y[3], y[1]);
  const Vector even_b = fma(kB, y[2], y[0] * all(kA)), odd_b = fma(2.0f, y[3], y[1]);
  m[0] = y[0];
  m[1] = even_a + odd_a;
  m[2] = even_a - odd_a;
  m[3] = even_b + odd_b;
  m[4] = even_b - odd_b;
  m[5] = y[3];
}

NCSN_VECTOR void weight_gradient_transform(const Vector u[6], Vector g[3]) {
  const Vector s = u[1] + u[2], d = u[2] - u[1], p = u[3] + u[4], q = u[3] - u[4];
  g[0] = fma(kBSixth, p, fma(-kBThird, s, u[0]));
  g[1] = (d + q) * all(1.0f / 3);
  g[2] = fma(kBThird, p, fma(-kBSixth, s, u[5]));
}

// --- the kernels ----------------------------------------------------------------------------------

#include "cpu/conv3x3/level_direct.h"
#include "cpu/conv3x3/level_forward.h"
#include "cpu/conv3x3/level_gradients.h"

constexpr ConvKernels kKernels = {kPanel,
                                  transform_inputs,
                                  multiply,
                                  transform_outputs,
                                  transpose_panel,
                                  transform_weights,
                                  transform_gradients,
                                  accumulate,
                                  sum_tiles,
                                  transform_weight_gradients,
                                  kRows,
                                  kNarrowRows,
                                  direct};

#undef NCSN_VECTOR
#undef NCSN_LEVEL_TARGET
#undef NCSN_LEVEL_WIDTH
#undef NCSN_LEVEL_ROWS
