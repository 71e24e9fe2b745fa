// The kernel of avg_pool5 as a function of a thread that also runs on the host (the tests walk every thread there).
//
// A thread's numbers of five pixels are their sums, and every output is the sum of five of those: always the same sums in
// the same order, that of the CPU. There is no running sum that would carry a NaN, or a rounding, from one window to the next.

#pragma once

#include <cstdint>

#include "cuda/pool5.cuh"

namespace ncsn {

template <typename T>
struct MeanPoolArgs {
  PoolTiling tiling;
  const T* x;
  T* y;
};

template <typename T, int W, bool kAlong>
NCSN_HD void mean_pool_thread(const MeanPoolArgs<T>& a, int64_t thread) {
  using A = Accumulator<T>;
  const PoolTiling& t = a.tiling;
  const PoolPlace place(t, thread);
  A sums[kPoolWindow][W] = {};  // of the last five rows
  for (int64_t row = place.first - kPoolReach; row < place.last + kPoolReach; ++row) {
#pragma unroll
    for (int r = 1; r < kPoolWindow; ++r) {
#pragma unroll
      for (int i = 0; i < W; ++i) sums[r - 1][i] = sums[r][i];
    }
    if (row >= 0 && row < t.rows) {
      const PoolRow<T, W, kAlong> values(t, place, a.x + place.at(t, row), T(0));
#pragma unroll
      for (int i = 0; i < W; ++i) {
        A sum = static_cast<A>(values.at(i, 0));
#pragma unroll
        for (int dx = 1; dx < kPoolWindow; ++dx) sum += static_cast<A>(values.at(i, dx));
        sums[kPoolWindow - 1][i] = sum;
      }
    } else {
#pragma unroll
      for (int i = 0; i < W; ++i) sums[kPoolWindow - 1][i] = A(0);
    }
    const int64_t target = row - kPoolReach;
    if (target < place.first) continue;
    Vec<T, W> y;
#pragma unroll
    for (int i = 0; i < W; ++i) {
      A sum = sums[0][i];
#pragma unroll
      for (int r = 1; r < kPoolWindow; ++r) sum += sums[r][i];
      y.v[i] = static_cast<T>(sum * A(1.0 / (kPoolWindow * kPoolWindow)));
    }
    store(a.y + place.at(t, target), y);
  }
}

}  // namespace ncsn
