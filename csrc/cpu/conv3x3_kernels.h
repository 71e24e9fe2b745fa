// The kernels of the convolution engine, for one SIMD level: included by conv3x3_kernels.cpp once for each, inside of a
// namespace, with
//     NCSN_LEVEL_TARGET   the attribute that lets a function use the level's instructions
//     NCSN_LEVEL_WIDTH    floats in a vector
//     NCSN_LEVEL_ROWS     rows of the product's register block: with two accumulators each, all but a few registers
// No standard library here: a function of it that is compiled with a level's instructions could be the copy that the
// linker keeps for all.

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

// --- inputs ---------------------------------------------------------------------------------------

NCSN_LEVEL_TARGET static void transform_inputs(const float* const* rows, int64_t tiles,
                                               int64_t channels, float* v, int64_t v_tile,
                                               int64_t v_block, int64_t v_position) {
  for (int64_t t = 0; t < tiles; ++t) {
    for (int64_t c = 0; c < channels; c += kWidth) {
      const int64_t at = t * kTile * channels + c;
      Vector half[6][6];  // [row][column], rows transformed
#pragma GCC unroll 6
      for (int j = 0; j < 6; ++j) {
        Vector d[6], column[6];
#pragma GCC unroll 6
        for (int i = 0; i < 6; ++i) d[i] = load(rows[i] + at + j * channels);
        input_transform(d, column);
#pragma GCC unroll 6
        for (int i = 0; i < 6; ++i) half[i][j] = column[i];
      }
      float* const out = v + t * v_tile + c / kChannelBlock * v_block + c % kChannelBlock;
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) {
        Vector whole[6];
        input_transform(half[i], whole);
#pragma GCC unroll 6
        for (int j = 0; j < 6; ++j) store(out + (i * 6 + j) * v_position, whole[j]);
      }
    }
  }
}

// --- products -------------------------------------------------------------------------------------

// R rows of M: every accumulator stays in a register. Meanwhile asks for memory that is needed soon.
template <int R>
NCSN_LEVEL_TARGET static void multiply_rows(const float* v, int64_t v_row, const float* u,
                                            int64_t depth, float* m, const float* soon,
                                            int64_t soon_step) {
  Vector sum[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = Vector{};
  for (int64_t k = 0; k < depth; ++k) {
    const Vector u0 = load(u + k * kPanel), u1 = load(u + k * kPanel + kWidth);
    __builtin_prefetch(soon + k * soon_step);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vector x = all(v[r * v_row + k]);
      sum[r][0] = fma(x, u0, sum[r][0]);
      sum[r][1] = fma(x, u1, sum[r][1]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    store(m + r * kPanel, sum[r][0]);
    store(m + r * kPanel + kWidth, sum[r][1]);
  }
}

using MultiplyRows = void (*)(const float*, int64_t, const float*, int64_t, float*, const float*,
                              int64_t);
template <int... R>
struct RowsTable {
  static constexpr MultiplyRows functions[] = {multiply_rows<R>...};
};
#if NCSN_LEVEL_ROWS == 14
using Multiply = RowsTable<1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14>;
#else
using Multiply = RowsTable<1, 2, 3, 4, 5, 6>;
#endif
static_assert(sizeof(Multiply::functions) / sizeof(MultiplyRows) == kRows, "one for each count");

// Asks for the part `part` of `parts` of the memory that the outputs' transform will write and read.
NCSN_VECTOR void touch(const Touch& t, int64_t part, int64_t parts) {
  const int64_t last = (part + 1) * t.pixels / parts;
  for (int64_t i = part * t.pixels / parts; i < last; ++i) {
    const int64_t at = t.offsets[i];
#pragma GCC unroll 2
    for (int l = 0; l < kPanel; l += 16) {
      __builtin_prefetch(t.y + at + l, 1, 2);
      if (t.residual != nullptr) __builtin_prefetch(t.residual + at + l, 0, 2);
    }
  }
}

NCSN_LEVEL_TARGET static void multiply(const float* v, int64_t v_row, int64_t v_position,
                                       const float* u, int64_t u_position, int64_t depth, float* m,
                                       int64_t m_position, int64_t tiles, const Touch& soon) {
  // Blocks of equal size, as far as can be: a short one has too few sums to hide the latency of an addition.
  const int64_t blocks = (tiles + kRows - 1) / kRows;
  const int64_t soon_step = (kPanel + blocks - 1) / blocks;
  for (int64_t p = 0; p < kPositions; ++p) {
    const float* const next = u + (p + 1) * u_position;
    for (int64_t b = 0, first = 0; b < blocks; ++b) {
      const int64_t last = (b + 1) * tiles / blocks;
      touch(soon, p * blocks + b, kPositions * blocks);
      Multiply::functions[last - first - 1](v + p * v_position + first * v_row, v_row,
                                            u + p * u_position, depth,
                                            m + p * m_position + first * kPanel,
                                            next + b * depth * soon_step, soon_step);
      first = last;
    }
  }
}

// --- outputs --------------------------------------------------------------------------------------

// The 4x4 outputs of one vector of channels.
NCSN_VECTOR void output_tile(const float* m, int64_t m_position, Vector bias, Vector y[4][4]) {
  Vector half[4][6];  // [row][column], rows transformed
#pragma GCC unroll 6
  for (int j = 0; j < 6; ++j) {
    Vector column[6], result[4];
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) column[i] = load(m + (i * 6 + j) * m_position);
    output_transform(column, result);
#pragma GCC unroll 6
    for (int i = 0; i < 4; ++i) half[i][j] = result[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < 4; ++i) {
    half[i][0] += bias;
    half[i][5] += bias;  // the two ends: together they reach each output once
    output_transform(half[i], y[i]);
    y[i][1] += bias;
    y[i][2] += bias;
  }
}

NCSN_LEVEL_TARGET static void transform_outputs(const float* m, int64_t m_position, int64_t tiles,
                                                const float* bias, const float* residual,
                                                int64_t outputs, const Outputs<float>& y) {
  const int64_t whole = outputs / kWidth * kWidth;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t left = y.columns - t * kTile, first = t * kTile * y.pixel_stride;
    const int64_t columns = left < kTile ? left : kTile;
    const bool full = y.rows == kTile && columns == kTile;
    for (int64_t o = 0; o < outputs; o += kWidth) {
      Vector values[4][4];
      output_tile(m + t * kPanel + o, m_position, load(bias + o), values);
      float* const out = y.first + first + o;
      const float* const old = residual == nullptr ? nullptr : residual + first + o;
      if (full && o < whole && residual == nullptr) {
#pragma GCC unroll 6
        for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 6
          for (int j = 0; j < 4; ++j) {
            store(out + i * y.row_stride + j * y.pixel_stride, values[i][j]);
          }
        }
      } else if (full && o < whole) {
#pragma GCC unroll 6
        for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 6
          for (int j = 0; j < 4; ++j) {
            const int64_t at = i * y.row_stride + j * y.pixel_stride;
            store(out + at, values[i][j] + load(old + at));
          }
        }
      } else {
        float spilled[4][4][kWidth];
        for (int i = 0; i < 4; ++i) {
          for (int j = 0; j < 4; ++j) store(spilled[i][j], values[i][j]);
        }
        const int64_t lanes = o < whole ? kWidth : outputs - whole;
        for (int64_t i = 0; i < y.rows; ++i) {
          for (int64_t j = 0; j < columns; ++j) {
            const int64_t at = i * y.row_stride + j * y.pixel_stride;
            for (int64_t l = 0; l < lanes; ++l) {
              out[at + l] = residual == nullptr ? spilled[i][j][l] : spilled[i][j][l] + old[at + l];
            }
          }
        }
      }
    }
  }
}

// --- weights --------------------------------------------------------------------------------------

// The lower or the upper halves of two vectors, element by element in turn.
#if NCSN_LEVEL_WIDTH == 16
#define NCSN_INTERLEAVE(a, b, s)                                                                  \
  __builtin_shufflevector(a, b, s, s + 16, s + 1, s + 17, s + 2, s + 18, s + 3, s + 19, s + 4,    \
                          s + 20, s + 5, s + 21, s + 6, s + 22, s + 7, s + 23)
#elif NCSN_LEVEL_WIDTH == 8
#define NCSN_INTERLEAVE(a, b, s) \
  __builtin_shufflevector(a, b, s, s + 8, s + 1, s + 9, s + 2, s + 10, s + 3, s + 11)
#else
#define NCSN_INTERLEAVE(a, b, s) __builtin_shufflevector(a, b, s, s + 4, s + 1, s + 5)
#endif

NCSN_VECTOR void transpose_step(const Vector a[kWidth], Vector b[kWidth]) {
#pragma GCC unroll 16
  for (int i = 0; i < kWidth / 2; ++i) {
    b[2 * i] = NCSN_INTERLEAVE(a[i], a[i + kWidth / 2], 0);
    b[2 * i + 1] = NCSN_INTERLEAVE(a[i], a[i + kWidth / 2], kWidth / 2);
  }
}
#undef NCSN_INTERLEAVE

// to[column][row] of a panel from from[row][column], by squares: every step of interleaving rows with those half of the
// square further down moves one bit of the column's number to the row's.
NCSN_LEVEL_TARGET static void transpose_panel(const float* from, int64_t from_row, int64_t columns,
                                              float* to) {
  int64_t c = 0;
  for (; c + kWidth <= columns; c += kWidth) {
    for (int r = 0; r < kPanel; r += kWidth) {
      Vector a[kWidth], b[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) a[i] = load(from + (r + i) * from_row + c);
      transpose_step(a, b);
      transpose_step(b, a);
      if (kWidth > 4) transpose_step(a, b);
      if (kWidth > 8) transpose_step(b, a);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) {
        store(to + (c + i) * kPanel + r, kWidth == 8 ? b[i] : a[i]);
      }
    }
  }
  for (; c < columns; ++c) {
    for (int r = 0; r < kPanel; ++r) to[c * kPanel + r] = from[r * from_row + c];
  }
}

NCSN_LEVEL_TARGET static void transform_weights(const float* g, int64_t depth, float* u,
                                                int64_t u_position) {
  for (int64_t k = 0; k < depth; ++k) {
    for (int o = 0; o < kPanel; o += kWidth) {
      Vector half[6][3];  // [row][column], rows transformed
#pragma GCC unroll 6
      for (int j = 0; j < 3; ++j) {
        Vector column[3], result[6];
#pragma GCC unroll 6
        for (int i = 0; i < 3; ++i) column[i] = load(g + (k * 9 + i * 3 + j) * kPanel + o);
        weight_transform(column, result);
#pragma GCC unroll 6
        for (int i = 0; i < 6; ++i) half[i][j] = result[i];
      }
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) {
        Vector whole[6];
        weight_transform(half[i], whole);
#pragma GCC unroll 6
        for (int j = 0; j < 6; ++j) {
          store(u + (i * 6 + j) * u_position + k * kPanel + o, whole[j]);
        }
      }
    }
  }
}

// --- gradients of the weights ---------------------------------------------------------------------

NCSN_LEVEL_TARGET static void transform_gradients(const float* const* rows, int64_t tiles,
                                                  int64_t channels, float* d, int64_t d_panel,
                                                  int64_t d_position) {
  for (int64_t t = 0; t < tiles; ++t) {
    for (int64_t c = 0; c < channels; c += kWidth) {
      const int64_t at = t * kTile * channels + c;
      Vector half[6][4];  // [row][column], rows transformed
      Vector total = Vector{};
#pragma GCC unroll 6
      for (int j = 0; j < 4; ++j) {
        Vector y[4], column[6];
#pragma GCC unroll 6
        for (int i = 0; i < 4; ++i) y[i] = load(rows[i] + at + j * channels);
        total += (y[0] + y[1]) + (y[2] + y[3]);
        gradient_transform(y, column);
#pragma GCC unroll 6
        for (int i = 0; i < 6; ++i) half[i][j] = column[i];
      }
      float* const out = d + c / kPanel * d_panel + t * kPanel + c % kPanel;
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) {
        Vector whole[6];
        gradient_transform(half[i], whole);
#pragma GCC unroll 6
        for (int j = 0; j < 6; ++j) store(out + (i * 6 + j) * d_position, whole[j]);
      }
      store(out + kPositions * d_position, total);
    }
  }
}

// R rows of U += V^T M, R channels, over all tiles.
template <int R>
NCSN_LEVEL_TARGET static void accumulate_rows(const float* v, const float* d, int64_t tiles,
                                              float* u) {
  Vector sum[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = Vector{};
  for (int64_t t = 0; t < tiles; ++t, v += kChannelBlock, d += kPanel) {
    const Vector d0 = load(d), d1 = load(d + kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vector x = all(v[r]);
      sum[r][0] = fma(x, d0, sum[r][0]);
      sum[r][1] = fma(x, d1, sum[r][1]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    store(u + r * kPanel, load(u + r * kPanel) + sum[r][0]);
    store(u + r * kPanel + kWidth, load(u + r * kPanel + kWidth) + sum[r][1]);
  }
}

using AccumulateRows = void (*)(const float*, const float*, int64_t, float*);
template <int... R>
struct AccumulateTable {
  static constexpr AccumulateRows functions[] = {accumulate_rows<R>...};
};
#if NCSN_LEVEL_ROWS == 14
using Accumulate = AccumulateTable<1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14>;
#else
using Accumulate = AccumulateTable<1, 2, 3, 4, 5, 6>;
#endif

NCSN_LEVEL_TARGET static void accumulate(const float* v, int64_t channels, const float* d,
                                         int64_t tiles, float* u) {
  const int64_t blocks = (channels + kRows - 1) / kRows;
  for (int64_t b = 0, first = 0; b < blocks; ++b) {
    const int64_t last = (b + 1) * channels / blocks;
    Accumulate::functions[last - first - 1](v + first, d, tiles, u + first * kPanel);
    first = last;
  }
}

NCSN_LEVEL_TARGET static void sum_tiles(const float* d, int64_t tiles, float* sum) {
  for (int o = 0; o < kPanel; o += kWidth) {
    Vector total = Vector{};
    for (int64_t t = 0; t < tiles; ++t) total += load(d + t * kPanel + o);
    store(sum + o, load(sum + o) + total);
  }
}

NCSN_LEVEL_TARGET static void transform_weight_gradients(const float* u, int64_t u_position,
                                                         int64_t depth, float* g) {
  for (int64_t k = 0; k < depth; ++k) {
    for (int o = 0; o < kPanel; o += kWidth) {
      Vector half[3][6];  // [row][column], rows transformed
#pragma GCC unroll 6
      for (int j = 0; j < 6; ++j) {
        Vector column[6], result[3];
#pragma GCC unroll 6
        for (int i = 0; i < 6; ++i) column[i] = load(u + (i * 6 + j) * u_position + k * kPanel + o);
        weight_gradient_transform(column, result);
#pragma GCC unroll 6
        for (int i = 0; i < 3; ++i) half[i][j] = result[i];
      }
#pragma GCC unroll 6
      for (int i = 0; i < 3; ++i) {
        Vector whole[3];
        weight_gradient_transform(half[i], whole);
#pragma GCC unroll 6
        for (int j = 0; j < 3; ++j) store(g + (k * 9 + i * 3 + j) * kPanel + o, whole[j]);
      }
    }
  }
}

constexpr ConvKernels kKernels = {kPanel,
                                  transform_inputs,
                                  multiply,
                                  transform_outputs,
                                  transpose_panel,
                                  transform_weights,
                                  transform_gradients,
                                  accumulate,
                                  sum_tiles,
                                  transform_weight_gradients};

#undef NCSN_VECTOR
#undef NCSN_LEVEL_TARGET
#undef NCSN_LEVEL_WIDTH
#undef NCSN_LEVEL_ROWS
