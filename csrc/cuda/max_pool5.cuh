// The kernels of max_pool5 as functions of a thread that also run on the host (the tests walk every thread there).
//
// An image is rows x pixels x lanes: a plane of a contiguous tensor has one lane, an image of a channels_last tensor has
// its channels as lanes. A thread goes down a band of rows with one vector of W elements: W pixels of a plane ("along"), or
// W lanes of one pixel. In every row it takes the maxima of five pixels, and keeps those of the last five rows in
// registers: ten comparisons an element instead of twenty-five, no shared memory, no barrier. Its neighbours read the same
// lines of memory at the same time, so that four of five reads are served by the first cache.

#pragma once

#include <cmath>
#include <cstdint>

#include "common/dtype.h"
#include "cuda/block.cuh"

namespace ncsn {

constexpr int kPoolWindow = 5, kPoolReach = 2;
constexpr int kPoolThreads = 256, kPoolFewThreads = 64;  // of a block; of one where there are too few for all SMs
// Bands are cut until each multiprocessor has so many threads, but not to fewer rows than these.
constexpr int64_t kPoolWishedThreads = 1024, kPoolLeastRows = 8;
// Shorter bands read more rows twice; they are worth it as long as multiprocessors have nothing to do.
constexpr int64_t kPoolShortestBand = 2;

struct PoolTiling {
  int64_t images, rows, pixels, lanes;
  int width;            // elements of a vector
  bool along;           // whether a vector lies along a row
  int64_t row_vectors;
  int64_t bands, band_rows;
  int block;            // threads of a block

  NCSN_HD int64_t threads() const { return images * bands * row_vectors; }
  NCSN_HD bool row_bits32() const { return pixels * lanes <= INT32_MAX; }  // places in a row
};

template <typename T>
PoolTiling tile_pool(int64_t samples, int64_t channels, int64_t rows, int64_t pixels,
                     bool contiguous, bool aligned, int multiprocessors) {
  PoolTiling t = {};
  t.images = contiguous ? samples * channels : samples;
  t.lanes = contiguous ? 1 : channels;
  t.rows = rows;
  t.pixels = pixels;
  const bool wide =
      aligned && !std::is_same_v<T, double> && (contiguous ? pixels : channels) % kWide<T> == 0;
  t.width = wide ? kWide<T> : 1;
  t.along = wide && contiguous;
  t.row_vectors = pixels * t.lanes / t.width;
  t.bands = 1;
  while (t.threads() < kPoolWishedThreads * multiprocessors && rows >= 2 * t.bands * kPoolLeastRows) {
    t.bands *= 2;
  }
  while (t.threads() < int64_t{kPoolFewThreads} * multiprocessors &&
         rows >= 2 * t.bands * kPoolShortestBand) {
    t.bands *= 2;
  }
  t.block = t.threads() < int64_t{kPoolThreads} * multiprocessors ? kPoolFewThreads : kPoolThreads;
  t.band_rows = (rows + t.bands - 1) / t.bands;
  return t;
}

// A thread's vector in the rows first .. last - 1 of an image.
struct PoolPlace {
  int64_t image, first, last;
  int64_t pixel;   // of the vector, or its first one
  int64_t offset;  // of the vector from the beginning of its row

  NCSN_HD PoolPlace(const PoolTiling& t, int64_t thread) {
    int64_t i, band;
    if (t.threads() <= INT32_MAX) {  // a division of 64 bits takes a hundred instructions
      const auto number = static_cast<uint32_t>(thread), bands = static_cast<uint32_t>(t.bands);
      const uint32_t rest = number / static_cast<uint32_t>(t.row_vectors);
      i = number - rest * static_cast<uint32_t>(t.row_vectors);
      image = rest / bands;
      band = rest - static_cast<uint32_t>(image) * bands;
    } else {
      const int64_t rest = thread / t.row_vectors;
      i = thread - rest * t.row_vectors;
      image = rest / t.bands;
      band = rest - image * t.bands;
    }
    first = band * t.band_rows;
    last = first + t.band_rows < t.rows ? first + t.band_rows : t.rows;
    offset = i * t.width;
    pixel = t.row_bits32() ? static_cast<uint32_t>(offset) / static_cast<uint32_t>(t.lanes)
                           : offset / t.lanes;
  }

  NCSN_HD int64_t at(const PoolTiling& t, int64_t row) const {
    return (image * t.rows + row) * t.pixels * t.lanes + offset;
  }
};

// The five pixels around each element of a vector, in one row.
template <typename E, int W, bool kAlong>
struct PoolRow {
  static constexpr int kSize = kAlong ? W + 2 * kPoolReach : W * kPoolWindow;
  E values[kSize];

  // The neighbours of all elements, dx as below.
  NCSN_HD Vec<E, W> all(int dx) const {
    Vec<E, W> v;
#pragma unroll
    for (int i = 0; i < W; ++i) v.v[i] = at(i, dx);
    return v;
  }

  // The neighbour of element i, dx = 0 .. 4 for the pixels -2 .. 2 from it.
  NCSN_HD E at(int i, int dx) const { return values[kAlong ? i + dx : dx * W + i]; }

  // `outside` stands for what lies beyond the image.
  NCSN_HD PoolRow(const PoolTiling& t, const PoolPlace& place, const E* row, E outside) {
    if constexpr (kAlong) {
      const bool left = place.pixel > 0, right = place.pixel + W < t.pixels;
      const Vec<E, W> middle = load<E, W>(row);
      Vec<E, 2> before = {{outside, outside}}, after = {{outside, outside}};
      if (left) before = load<E, 2>(row - 2);
      if (right) after = load<E, 2>(row + W);
      values[0] = before.v[0];
      values[1] = before.v[1];
#pragma unroll
      for (int i = 0; i < W; ++i) values[2 + i] = middle.v[i];
      values[W + 2] = after.v[0];
      values[W + 3] = after.v[1];
    } else {
#pragma unroll
      for (int dx = 0; dx < kPoolWindow; ++dx) {
        const int64_t pixel = place.pixel + dx - kPoolReach;
        Vec<E, W> v;
        if (pixel >= 0 && pixel < t.pixels) {
          v = load<E, W>(row + (dx - kPoolReach) * t.lanes);
        } else {
#pragma unroll
          for (int i = 0; i < W; ++i) v.v[i] = outside;
        }
#pragma unroll
        for (int i = 0; i < W; ++i) values[dx * W + i] = v.v[i];
      }
    }
  }
};

// The larger one; NaN if either is.
NCSN_HD float max_or_nan(float a, float b) {
#if defined(__CUDA_ARCH__)
  float m;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(m) : "f"(a), "f"(b));
  return m;
#else
  return a > b || a != a ? a : b;
#endif
}

NCSN_HD double max_or_nan(double a, double b) { return a > b || a != a ? a : b; }

// The same of two elements of 16 bits at once.
template <typename T>
NCSN_HD uint32_t max_or_nan_pair(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint32_t m;
  if constexpr (std::is_same_v<T, torch::headeronly::Half>) {
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(m) : "r"(a), "r"(b));
  } else {
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(m) : "r"(a), "r"(b));
  }
  return m;
#else
  T left[2], right[2];
  memcpy(left, &a, sizeof a);
  memcpy(right, &b, sizeof b);
  for (int i = 0; i < 2; ++i) {
    left[i] = static_cast<T>(max_or_nan(static_cast<float>(left[i]), static_cast<float>(right[i])));
  }
  memcpy(&a, left, sizeof a);
  return a;
#endif
}

template <typename T, int W>
NCSN_HD Vec<T, W> max_or_nan(const Vec<T, W>& a, const Vec<T, W>& b) {
  Vec<T, W> m;
  if constexpr (sizeof(T) == 2 && W % 2 == 0) {
    uint32_t left[W / 2], right[W / 2];
    memcpy(left, &a, sizeof left);
    memcpy(right, &b, sizeof right);
#pragma unroll
    for (int i = 0; i < W / 2; ++i) left[i] = max_or_nan_pair<T>(left[i], right[i]);
    memcpy(&m, left, sizeof m);
  } else {
    using A = Accumulator<T>;
#pragma unroll
    for (int i = 0; i < W; ++i) {
      m.v[i] = static_cast<T>(max_or_nan(static_cast<A>(a.v[i]), static_cast<A>(b.v[i])));
    }
  }
  return m;
}

template <typename T>
NCSN_HD T pool_border(bool zero) {
  using A = Accumulator<T>;
  return static_cast<T>(zero ? A(0) : -static_cast<A>(INFINITY));
}

template <typename T>
struct PoolForwardArgs {
  PoolTiling tiling;
  const T* x;
  T* y;
  bool zero;  // what surrounds the image: zeros, or minus infinity
};

template <typename T, int W, bool kAlong>
NCSN_HD void pool_forward_thread(const PoolForwardArgs<T>& a, int64_t thread) {
  const PoolTiling& t = a.tiling;
  const PoolPlace place(t, thread);
  const T border = pool_border<T>(a.zero);
  Vec<T, W> outside, maxima[kPoolWindow];  // of the last five rows
#pragma unroll
  for (int i = 0; i < W; ++i) outside.v[i] = border;
#pragma unroll
  for (int r = 0; r < kPoolWindow; ++r) maxima[r] = outside;
  for (int64_t row = place.first - kPoolReach; row < place.last + kPoolReach; ++row) {
#pragma unroll
    for (int r = 1; r < kPoolWindow; ++r) maxima[r - 1] = maxima[r];
    Vec<T, W> m = outside;
    if (row >= 0 && row < t.rows) {
      const PoolRow<T, W, kAlong> values(t, place, a.x + place.at(t, row), border);
      m = values.all(0);
#pragma unroll
      for (int dx = 1; dx < kPoolWindow; ++dx) m = max_or_nan(m, values.all(dx));
    }
    maxima[kPoolWindow - 1] = m;
    const int64_t target = row - kPoolReach;
    if (target < place.first) continue;
    m = maxima[0];
#pragma unroll
    for (int r = 1; r < kPoolWindow; ++r) m = max_or_nan(m, maxima[r]);
    store(a.y + place.at(t, target), m);
  }
}

// --- the gradient ---------------------------------------------------------------------------------
//
// The first launch finds for every window the element that its gradient goes to, the first maximum in row-major order or
// the last NaN, and writes its place in the window as a byte, 5 * dy + dx. The second adds up, for every element of x, the
// gradients of those of its 25 windows that chose it, in their row-major order. No atomics.

constexpr uint8_t kPoolNowhere = 255;

template <typename T>
struct PoolBackwardArgs {
  PoolTiling tiling;
  const T *x, *grad_y;
  T* grad_x;
  uint8_t* choices;
  bool zero;
};

// Whether the next one of a window takes the place of the best so far.
template <typename A>
NCSN_HD bool pool_prefers(A next, A best) {
  return next > best || next != next;
}

template <typename T, int W, bool kAlong>
NCSN_HD void pool_choice_thread(const PoolBackwardArgs<T>& a, int64_t thread) {
  using A = Accumulator<T>;
  const PoolTiling& t = a.tiling;
  const PoolPlace place(t, thread);
  const T border = pool_border<T>(a.zero);
  // Of the last five rows: the maximum of five pixels, and where, four bits for each element. A border of zeros may be
  // chosen; one of minus infinity may not, so that the choice begins with the first pixel and row inside.
  A maxima[kPoolWindow][W];
  uint32_t places[kPoolWindow];
#pragma unroll
  for (int r = 0; r < kPoolWindow; ++r) {
    places[r] = 0;
#pragma unroll
    for (int i = 0; i < W; ++i) maxima[r][i] = static_cast<A>(border);
  }
  for (int64_t row = place.first - kPoolReach; row < place.last + kPoolReach; ++row) {
#pragma unroll
    for (int r = 1; r < kPoolWindow; ++r) {
      places[r - 1] = places[r];
#pragma unroll
      for (int i = 0; i < W; ++i) maxima[r - 1][i] = maxima[r][i];
    }
    uint32_t found = 0;
    if (row >= 0 && row < t.rows) {
      const PoolRow<T, W, kAlong> values(t, place, a.x + place.at(t, row), border);
#pragma unroll
      for (int i = 0; i < W; ++i) {
        const int64_t pixel = place.pixel + (kAlong ? i : 0);
        const int outside = pixel < kPoolReach ? kPoolReach - static_cast<int>(pixel) : 0;
        uint32_t best = a.zero ? 0 : static_cast<uint32_t>(outside);
        A m = static_cast<A>(values.at(i, 0));
#pragma unroll
        for (int dx = 1; dx < kPoolWindow; ++dx) {
          const A next = static_cast<A>(values.at(i, dx));
          if (pool_prefers(next, m)) {
            m = next;
            best = static_cast<uint32_t>(dx);
          }
        }
        maxima[kPoolWindow - 1][i] = m;
        found |= best << (4 * i);
      }
    } else {
#pragma unroll
      for (int i = 0; i < W; ++i) maxima[kPoolWindow - 1][i] = static_cast<A>(border);
    }
    places[kPoolWindow - 1] = found;
    const int64_t target = row - kPoolReach;
    if (target < place.first) continue;
    const int above = target < kPoolReach && !a.zero ? kPoolReach - static_cast<int>(target) : 0;
    Vec<uint8_t, W> choices;
#pragma unroll
    for (int i = 0; i < W; ++i) {
      A m = maxima[0][i];
      uint32_t best = (places[0] >> (4 * i) & 15u);
#pragma unroll
      for (int dy = 1; dy < kPoolWindow; ++dy) {
        if (pool_prefers(maxima[dy][i], m) || dy == above) {
          m = maxima[dy][i];
          best = static_cast<uint32_t>(kPoolWindow * dy) + (places[dy] >> (4 * i) & 15u);
        }
      }
      choices.v[i] = static_cast<uint8_t>(best);
    }
    store(a.choices + place.at(t, target), choices);
  }
}

template <typename T, int W, bool kAlong>
NCSN_HD void pool_gather_thread(const PoolBackwardArgs<T>& a, int64_t thread) {
  using A = Accumulator<T>;
  const PoolTiling& t = a.tiling;
  const PoolPlace place(t, thread);
  A sums[kPoolWindow][W] = {};  // of the five rows that the windows of this row reach
  for (int64_t row = place.first - kPoolReach; row < place.last + kPoolReach; ++row) {
    if (row >= 0 && row < t.rows) {
      const int64_t at = place.at(t, row);
      const PoolRow<uint8_t, W, kAlong> choices(t, place, a.choices + at, kPoolNowhere);
      const PoolRow<T, W, kAlong> grads(t, place, a.grad_y + at, T(0));
#pragma unroll
      for (int i = 0; i < W; ++i) {
#pragma unroll
        for (int dx = 0; dx < kPoolWindow; ++dx) {
          // Seen from the window dx - 2 pixels from here, this pixel is 2 - dx pixels away.
          const int choice = choices.at(i, dx), column = kPoolWindow - 1 - dx;
          const A grad = static_cast<A>(grads.at(i, dx));
#pragma unroll
          for (int dy = 0; dy < kPoolWindow; ++dy) {
            if (choice == kPoolWindow * dy + column) sums[dy][i] += grad;
          }
        }
      }
    }
    const int64_t target = row - kPoolReach;
    if (target >= place.first) {
      Vec<T, W> grad_x;
#pragma unroll
      for (int i = 0; i < W; ++i) grad_x.v[i] = static_cast<T>(sums[0][i]);
      store(a.grad_x + place.at(t, target), grad_x);
    }
#pragma unroll
    for (int r = 1; r < kPoolWindow; ++r) {
#pragma unroll
      for (int i = 0; i < W; ++i) sums[r - 1][i] = sums[r][i];
    }
#pragma unroll
    for (int i = 0; i < W; ++i) sums[kPoolWindow - 1][i] = A(0);
  }
}

}  // namespace ncsn
