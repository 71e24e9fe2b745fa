// avg_pool5 for the CPU: sums of five in every row, then of five of those, through rows that stay in a cache.
//
// A kernel works on images of rows x pixels x lanes: one channel of a contiguous sample (one lane), or all channels of
// a channels_last one. Either way a pixel's neighbour lies `lanes` elements on, so one code serves both.
//
// Every output is the same sums in the same order however the image is cut: neither the threads nor the batch change a
// bit, and there is no running sum that would carry a NaN, or a rounding, from one window to the next.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <memory>

#include "common/avg_pool5.h"
#include "cpu/half.h"
#include "cpu/multiversion.h"
#include "cpu/threads.h"

namespace ncsn {
namespace {

using torch::stable::Tensor;

constexpr int64_t kWindow = 5, kReach = 2;

// The work of a call, cut into tasks: blocks of the pixels of a row and bands of rows.
struct Tasks {
  static constexpr int64_t kRowElements = 1024;  // five rows of float32 sums: the first cache
  static constexpr int64_t kBandRows = 64;       // a band sums four rows of its neighbours again
  static constexpr int64_t kTaskElements = 16384;  // what a thread costs to wake

  int64_t images, rows, pixels, lanes;
  int64_t blocks, bands;

  explicit Tasks(const Tensor& x) : rows(x.size(2)), pixels(x.size(3)) {
    // Images of one pixel are contiguous as well, and are better taken as lanes.
    const bool channels_last = is_channels_last(x);
    images = x.size(0) * (channels_last ? 1 : x.size(1));
    lanes = channels_last ? x.size(1) : 1;
    blocks = std::clamp<int64_t>(pixels * lanes / kRowElements, 1, pixels);
    bands = (rows + kBandRows - 1) / kBandRows;
  }

  int64_t count() const { return images * blocks * bands; }
  int64_t grain() const {
    return std::max<int64_t>(1, kTaskElements * blocks * bands / (rows * pixels * lanes));
  }
  int64_t block_elements() const { return (pixels + blocks - 1) / blocks * lanes; }
};

template <typename T>
struct Pool {
  using A = Accumulator<T>;
  static constexpr bool kNarrow = sizeof(T) != sizeof(A);

  const T* x;
  T* y;
  const Tasks& tasks;
  int64_t begin, end;
  A* sums;  // kWindow rows of a block
  A* wide;  // kNarrow: a row of the image

  // out[i] = the sum of from[i + k * lanes] for k = first .. last.
  NCSN_KERNEL void add(const A* from, int64_t n, int64_t first, int64_t last, A* out) const {
    const int64_t lanes = tasks.lanes;
    if (first == -kReach && last == kReach) {
      const A *p0 = from - 2 * lanes, *p1 = from - lanes, *p3 = from + lanes, *p4 = from + 2 * lanes;
      NCSN_INDEPENDENT
      for (int64_t i = 0; i < n; ++i) out[i] = (((p0[i] + p1[i]) + from[i]) + p3[i]) + p4[i];
      return;
    }
    from += first * lanes;
    NCSN_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) out[i] = from[i];
    for (int64_t k = first; k < last; ++k) {
      from += lanes;
      NCSN_INDEPENDENT
      for (int64_t i = 0; i < n; ++i) out[i] += from[i];
    }
  }

  // The sums of five of the pixels first .. last - 1 of a row of the image.
  NCSN_KERNEL void sum_row(const T* row, int64_t first, int64_t last, A* out) const {
    const int64_t lanes = tasks.lanes, pixels = tasks.pixels;
    const A* from;
    if constexpr (kNarrow) {
      const int64_t low = std::max<int64_t>(first - kReach, 0) * lanes;
      const int64_t high = std::min(last + kReach, pixels) * lanes;
      NCSN_INDEPENDENT
      for (int64_t i = low; i < high; ++i) wide[i] = widen(row[i]);
      from = wide;
    } else {
      from = row;
    }
    int64_t p = first;
    const auto edge = [&](int64_t until) __attribute__((always_inline)) {
      for (; p < until; ++p, out += lanes) {
        add(from + p * lanes, lanes, -std::min(p, kReach), std::min(pixels - 1 - p, kReach), out);
      }
    };
    edge(std::min(last, kReach));
    const int64_t inside = std::min(last, pixels - kReach) - p;
    if (inside > 0) {
      add(from + p * lanes, inside * lanes, -kReach, kReach, out);
      p += inside;
      out += inside * lanes;
    }
    edge(last);
  }

  NCSN_KERNEL void pool(int64_t task) const {
    const int64_t lanes = tasks.lanes, rows = tasks.rows, pixels = tasks.pixels;
    const int64_t band = task % tasks.bands, block = task / tasks.bands % tasks.blocks;
    const int64_t image = task / tasks.bands / tasks.blocks * rows * pixels * lanes;
    const int64_t first_row = band * rows / tasks.bands, last_row = (band + 1) * rows / tasks.bands;
    const int64_t first = block * pixels / tasks.blocks, last = (block + 1) * pixels / tasks.blocks;
    const int64_t n = (last - first) * lanes, width = tasks.block_elements();
    const auto slot = [&](int64_t row) { return sums + (row + kWindow) % kWindow * width; };
    for (int64_t row = first_row - kReach; row < last_row + kReach; ++row) {
      if (row < 0 || row >= rows) {
        std::fill_n(slot(row), n, A(0));
      } else {
        sum_row(x + image + row * pixels * lanes, first, last, slot(row));
      }
      const int64_t middle = row - kReach;
      if (middle < first_row) continue;
      const A *s0 = slot(middle - 2), *s1 = slot(middle - 1), *s2 = slot(middle),
              *s3 = slot(middle + 1), *s4 = slot(middle + 2);
      T* const out = y + image + (middle * pixels + first) * lanes;
      NCSN_INDEPENDENT
      for (int64_t i = 0; i < n; ++i) {
        out[i] = narrow<T>(((((s0[i] + s1[i]) + s2[i]) + s3[i]) + s4[i]) * A(1.0 / 25));
      }
    }
  }

  template <bool kFma>
  NCSN_KERNEL void run() const {
    for (int64_t task = begin; task < end; ++task) pool(task);
  }
};

template <typename T>
void pool(const Tensor& x, const Tensor& y) {
  using A = Accumulator<T>;
  const Tasks tasks(x);
  const auto* const from = static_cast<const T*>(x.data_ptr());
  auto* const to = static_cast<T*>(y.data_ptr());
  const int64_t sums = kWindow * tasks.block_elements();
  const int64_t wide = Pool<T>::kNarrow ? tasks.pixels * tasks.lanes : 0;
  parallel_for(tasks.count(), tasks.grain(), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<A[]> memory(new A[static_cast<size_t>(sums + wide)]);
    run_simd(Pool<T>{from, to, tasks, begin, end, memory.get(), memory.get() + sums});
  });
}

Tensor avg_pool5(Tensor x) {
  check_mean_pool(x);
  Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) return y;
  for_dtype(x.scalar_type(), [&](auto type) { pool<typename decltype(type)::type>(x, y); });
  return y;
}

}  // namespace
}  // namespace ncsn

STABLE_TORCH_LIBRARY_IMPL(ncsn_fast, CPU, m) { m.impl("avg_pool5", TORCH_BOX(&ncsn::avg_pool5)); }
