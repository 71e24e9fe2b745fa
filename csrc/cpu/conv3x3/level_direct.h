// A part of level.h: the direct convolution of some pixels, a matrix product of the image's rows with the weights.

// So many products are summed up before they are added to the sum of the others: the rounding of a long sum grows with
// its length. A run may be longer.
constexpr int64_t kDirectSegment = 128;

// Pixels at once where there is one vector of outputs: enough sums to hide the latency of an addition.
constexpr int kNarrowRows = kRows < 12 ? 12 : kRows;

// R pixels and V vectors of outputs. Each number is the same sequence of operations whatever R is.
template <int V, int R>
NCSN_LEVEL_TARGET static void direct_pixels(const DirectBlock& d) {
  const int64_t v_pixel = d.v_pixel;
  Vector total[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int w = 0; w < V; ++w) total[r][w] = load(d.bias + w * kWidth);
  }
  for (int64_t i = 0; i < d.count;) {
    Vector sum[R][V];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int w = 0; w < V; ++w) sum[r][w] = Vector{};
    }
    int64_t products = 0;
    do {
      const DirectRun& run = d.runs[i];
      const float *v = run.v, *u = d.u + run.u;
      for (int64_t k = 0; k < run.depth; ++k, ++v, u += kPanel) {
        Vector weights[V];
#pragma GCC unroll 2
        for (int w = 0; w < V; ++w) weights[w] = load(u + w * kWidth);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const Vector x = all(v[r * v_pixel]);
#pragma GCC unroll 2
          for (int w = 0; w < V; ++w) sum[r][w] = fma(x, weights[w], sum[r][w]);
        }
      }
      products += run.depth;
      ++i;
    } while (i < d.count && products + d.runs[i].depth <= kDirectSegment);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int w = 0; w < V; ++w) total[r][w] += sum[r][w];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int w = 0; w < V; ++w) {
      const int64_t o = w * kWidth, lanes = d.outputs - o, at = r * d.y_pixel + o;
      float* const y = d.y + at;
      const float* const old = d.residual == nullptr ? nullptr : d.residual + at;
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

using DirectPixels = void (*)(const DirectBlock&);
template <int V, int... R>
struct DirectTable {
  static constexpr DirectPixels functions[] = {direct_pixels<V, R>...};
};
using DirectNarrow = DirectTable<1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12
#if NCSN_LEVEL_ROWS == 14
                                 , 13, 14>;
using DirectWide = DirectTable<2, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14>;
#else
                                 >;
using DirectWide = DirectTable<2, 1, 2, 3, 4, 5, 6>;
#endif
static_assert(sizeof(DirectNarrow::functions) / sizeof(DirectPixels) == kNarrowRows, "each count");
static_assert(sizeof(DirectWide::functions) / sizeof(DirectPixels) == kRows, "each count");

NCSN_LEVEL_TARGET static void direct(const DirectBlock& d) {
  const DirectPixels* const functions =
      d.outputs <= kWidth ? DirectNarrow::functions : DirectWide::functions;
  functions[d.pixels - 1](d);
}
