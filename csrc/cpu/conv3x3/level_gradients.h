// A part of level.h: the kernels of the weights' gradient.

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
