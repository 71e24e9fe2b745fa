// A part of level.h: the direct convolution, a matrix product of patches of the image with the weights.

// So many channels of taps are summed up before they are added to the sum of the others: the rounding of a long sum
// grows with its length.
constexpr int64_t kDirectSegment = 128;

// R pixels and V vectors of outputs. Each number is the same sequence of operations whatever R is.
template <int V, int R>
NCSN_LEVEL_TARGET static void direct_pixels(const DirectPanel& d, int64_t first) {
  const int64_t v_row = d.taps * d.channels;
  const float* v = d.v + first * v_row;
  Vector total[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int w = 0; w < V; ++w) total[r][w] = load(d.bias + w * kWidth);
  }
  for (int64_t t = 0; t < d.taps;) {
    Vector sum[R][V];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int w = 0; w < V; ++w) sum[r][w] = Vector{};
    }
    int64_t channels = 0;
    do {
      const float* const u = d.u + d.tap[t] * d.channels * kPanel;
      for (int64_t k = 0; k < d.channels; ++k) {
        Vector weights[V];
#pragma GCC unroll 2
        for (int w = 0; w < V; ++w) weights[w] = load(u + k * kPanel + w * kWidth);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const Vector x = all(v[r * v_row + k]);
#pragma GCC unroll 2
          for (int w = 0; w < V; ++w) sum[r][w] = fma(x, weights[w], sum[r][w]);
        }
      }
      v += d.channels;
      channels += d.channels;
      ++t;
    } while (t < d.taps && channels + d.channels <= kDirectSegment);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int w = 0; w < V; ++w) total[r][w] += sum[r][w];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const int64_t at = (first + r) * d.y_pixel;
#pragma GCC unroll 2
    for (int w = 0; w < V; ++w) {
      const int64_t o = w * kWidth, lanes = d.outputs - o;
      float* const y = d.y + at + o;
      const float* const old = d.residual == nullptr ? nullptr : d.residual + at + o;
      if (lanes >= kWidth) {
        store(y, old == nullptr ? total[r][w] : total[r][w] + load(old));
        continue;
      }
      float spilled[kWidth];
      store(spilled, total[r][w]);
      for (int64_t l = 0; l < lanes; ++l) {
        y[l] = old == nullptr ? spilled[l] : spilled[l] + old[l];
      }
    }
  }
}

using DirectPixels = void (*)(const DirectPanel&, int64_t);
template <int V, int... R>
struct DirectTable {
  static constexpr DirectPixels functions[] = {direct_pixels<V, R>...};
};
#if NCSN_LEVEL_ROWS == 14
template <int V>
using Direct = DirectTable<V, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14>;
#else
template <int V>
using Direct = DirectTable<V, 1, 2, 3, 4, 5, 6>;
#endif

NCSN_LEVEL_TARGET static void direct(const DirectPanel& d) {
  const DirectPixels* const functions =
      d.outputs <= kWidth ? Direct<1>::functions : Direct<2>::functions;
  const int64_t blocks = (d.pixels + kRows - 1) / kRows;  // of equal size, as far as can be
  for (int64_t b = 0, first = 0; b < blocks; ++b) {
    const int64_t last = (b + 1) * d.pixels / blocks;
    functions[last - first - 1](d, first);
    first = last;
  }
}
