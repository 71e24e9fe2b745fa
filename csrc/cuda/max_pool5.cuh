// The kernels of max_pool5 as functions of a thread that also run on the host (the tests walk every thread there).
//
// A thread's numbers of five pixels are their maxima.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda/pool5.cuh"

namespace ncsn {

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
