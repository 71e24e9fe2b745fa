// A part of level.h: the kernels of a convolution, the transforms of its inputs, outputs and weights and the products.

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
                                              float* to, int64_t to_row) {
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
        store(to + (c + i) * to_row + r, kWidth == 8 ? b[i] : a[i]);
      }
    }
  }
  for (; c < columns; ++c) {
    for (int r = 0; r < kPanel; ++r) to[c * to_row + r] = from[r * from_row + c];
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
