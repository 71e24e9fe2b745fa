// max_pool5_backward for the CPU: finds the maxima anew, and hands each window's gradient back to its own.

#include <torch/csrc/stable/library.h>

#include "common/max_pool5.h"
#include "cpu/max_pool5/rows.h"

namespace ncsn {
namespace pool5 {
namespace {

// The maxima, by the rule of `better`, and which of the five each is.
template <bool nan, typename Lane>
NCSN_KERNEL void find_argmaxima(Five<const Lane> x, int64_t n, Lane* __restrict maxima,
                                IndexOf<Lane>* __restrict at) {
  for (int64_t i = 0; i < padded(n); ++i) {
    const Lane values[kWindow] = {x.p0[i], x.p1[i], x.p2[i], x.p3[i], x.p4[i]};
    Lane best = values[0];
    IndexOf<Lane> where = 0;
    if constexpr (nan) {
      for (int k = 1; k < kWindow; ++k) {
        const bool takes_over = (values[k] > best) | (values[k] != values[k]);
        best = takes_over ? values[k] : best;
        where = takes_over ? k : where;
      }
    } else {
      for (int k = 1; k < kWindow; ++k) best = better<false>(values[k], best);
      where = kWindow - 1;
      for (int k = kWindow - 2; k >= 0; --k) where = values[k] == best ? k : where;
    }
    maxima[i] = best;
    at[i] = where;
  }
}

// Minus infinity outside the image is no part of a window, though nothing in a window of minus infinity is larger.
template <typename Index>
NCSN_KERNEL void at_least(Index first, int64_t n, Index* at) {
  for (int64_t i = 0; i < n; ++i) at[i] = at[i] < first ? first : at[i];
}

// `value` where the indices are equal, else 0: in bits, since compilers make branches of a choice before an addition.
template <typename Lane>
NCSN_KERNEL Lane where_equal(IndexOf<Lane> a, IndexOf<Lane> b, Lane value) {
  return as<Lane>(as<IndexOf<Lane>>(value) & -static_cast<IndexOf<Lane>>(a == b));
}

// Hands a row of grad_y to those of the five rows around it in which its windows have their maxima. The last of the
// five has no other contribution yet.
template <typename Lane>
NCSN_KERNEL void distribute(const Lane* __restrict grad_y, const IndexOf<Lane>* __restrict at,
                            int64_t n, Five<Lane> sums) {
  Lane *__restrict sum0 = sums.p0, *__restrict sum1 = sums.p1, *__restrict sum2 = sums.p2,
       *__restrict sum3 = sums.p3, *__restrict sum4 = sums.p4;
  for (int64_t i = 0; i < padded(n); ++i) {
    sum0[i] += where_equal<Lane>(at[i], 0, grad_y[i]);
    sum1[i] += where_equal<Lane>(at[i], 1, grad_y[i]);
    sum2[i] += where_equal<Lane>(at[i], 2, grad_y[i]);
    sum3[i] += where_equal<Lane>(at[i], 3, grad_y[i]);
    sum4[i] = where_equal<Lane>(at[i], 4, grad_y[i]);
  }
}

// Each element of a row gathers from the fives of the row whose maximum it is.
template <typename Lane>
NCSN_KERNEL void gather(Five<const Lane> sums, Five<const IndexOf<Lane>> at, int64_t n,
                        Lane* __restrict grad_x) {
  for (int64_t i = 0; i < padded(n); ++i) {
    Lane sum = where_equal<Lane>(at.p0[i], 4, sums.p0[i]);
    sum += where_equal<Lane>(at.p1[i], 3, sums.p1[i]);
    sum += where_equal<Lane>(at.p2[i], 2, sums.p2[i]);
    sum += where_equal<Lane>(at.p3[i], 1, sums.p3[i]);
    grad_x[i] = sum + where_equal<Lane>(at.p4[i], 0, sums.p4[i]);
  }
}

// The gradient goes the way of the maximum back: along the column of a window to the row that had it, then along that
// row. So an element sums over columns of windows first, in an order that depends on nothing else; the sums' last bits
// are not those of PyTorch, which goes over rows of windows.
template <typename T>
struct Backward {
  using Lane = Accumulator<T>;
  using Index = IndexOf<Lane>;
  // Rows are taken in groups, so that five rows around each of them are fetched once for all of them ...
  static constexpr int kGroup = 4, kHeld = kGroup + kWindow - 1;
  // ... in runs of elements that stay in the first cache. The rows themselves fit into the second.
  static constexpr int64_t kChunk = 512, kRowElements = 4096;

  const T* grad_y;
  const T* x;
  T* grad_x;
  bool zero_border;
  Tasks tasks;

  struct Scratch {
    Input<T> x;
    Rows<Lane, kHeld> maxima, sums;
    Rows<Index, kHeld> at;
    Rows<Index, 1> window_at;
    Rows<Lane, 1> window_maxima, grad_y, grad_x;
    std::vector<T> image_x, image_grad_y, image_grad_x;

    explicit Scratch(const Tasks& tasks)
        : Scratch((tasks.block_pixels() + 2 * kReach) * tasks.lanes, tasks.lanes) {
      for (auto* image : {&image_x, &image_grad_y, &image_grad_x}) {
        image->resize(tasks.side_by_side());
      }
    }
    // n: a row of the block with two pixels on either side, whose windows reach into it.
    Scratch(int64_t n, int64_t lanes)
        : x(padded(n) + 2 * kReach * lanes), maxima(n), sums(n + kVector), at(n + kVector),
          window_at(kChunk), window_maxima(kChunk), grad_y(kChunk), grad_x(n) {}
  };

  NCSN_KERNEL void run(const T* grad_y, const T* x, T* grad_x, const Block& block,
                       Scratch& scratch) const {
    has_nan(x, block, 2 * kReach) ? run<true>(grad_y, x, grad_x, block, scratch)
                                  : run<false>(grad_y, x, grad_x, block, scratch);
  }

  template <bool nan>
  NCSN_KERNEL void run(const T* grad_y, const T* x, T* grad_x, const Block& block,
                       Scratch& scratch) const {
    const Span windows = block.span.grown(block.pixels);
    const int64_t n = (windows.last - windows.first) * block.lanes;
    const int64_t width = (block.span.last - block.span.first) * block.lanes;
    // Of the windows in a row of `sums` and `at`, which begins two pixels to the left of the block.
    const int64_t place = (windows.first - (block.span.first - kReach)) * block.lanes;
    const int64_t start = block.first_row - 2 * kReach;
    scratch.x.start(block, windows, start, border_value<Lane>(zero_border));
    scratch.sums.fill(0);
    for (int64_t group = start; group < block.last_row + 2 * kReach; group += kGroup) {
      scratch.maxima.advance(kGroup);
      scratch.at.advance(kGroup);
      scratch.sums.advance(kGroup);
      for (int k = 0; k < kGroup; ++k) {
        const int held = kHeld - kGroup + k;
        find_row<nan>(x, block, windows, group + k, n, scratch.maxima[held], scratch.at[held] + place,
                 scratch);
      }
      for (int64_t i = 0; i < n; i += kChunk) {
        for (int k = 0; k < kGroup; ++k) {
          const int64_t row = group - kReach + k;
          if (row < std::max<int64_t>(block.first_row - kReach, 0)) continue;
          if (row >= std::min(block.last_row + kReach, block.rows)) break;
          hand_down<nan>(grad_y + block.at(row, windows.first) + i, row, k, i, std::min(kChunk, n - i),
                    place, scratch);
        }
      }
      for (int k = 0; k < kGroup; ++k) {
        const int64_t row = group - 2 * kReach + k;
        if (row < block.first_row || row >= block.last_row) continue;
        T* const out = grad_x + block.at(row, block.span.first);
        Lane* const sums = is_scratch<T>(width) ? reinterpret_cast<Lane*>(out) : scratch.grad_x[0];
        gather(Five<const Lane>(scratch.sums[k], block.lanes),
               Five<const Index>(scratch.at[k], block.lanes), width, sums);
        if (!is_scratch<T>(width)) store(sums, width, out);
      }
    }
  }

  // The maxima of a row's fives, and which of the five they are.
  template <bool nan>
  NCSN_KERNEL void find_row(const T* x, const Block& block, Span windows, int64_t row, int64_t n,
                            Lane* maxima, Index* at, Scratch& scratch) const {
    if (row < 0 || row >= block.rows) {
      return fill_row(maxima, n, border_value<Lane>(zero_border));
    }
    find_argmaxima<nan>(Five<const Lane>(scratch.x.read(x, block, row), block.lanes), n, maxima, at);
    if (zero_border) return;
    for (int64_t p = windows.first; p < std::min<int64_t>(kReach, windows.last); ++p) {
      at_least(Index(kReach - p), block.lanes, at + (p - windows.first) * block.lanes);
    }
  }

  // Elements i .. i + n - 1 of a row of windows, the middle one of the held rows k .. k + 4.
  template <bool nan>
  NCSN_KERNEL void hand_down(const T* grad_y, int64_t row, int k, int64_t i, int64_t n,
                             int64_t place, Scratch& scratch) const {
    Index* const at = scratch.window_at[0];
    find_argmaxima<nan>(Five<const Lane>(scratch.maxima, k, i), n, scratch.window_maxima[0], at);
    if (!zero_border && row < kReach) at_least(Index(kReach - row), n, at);
    const Lane* grad = reinterpret_cast<const Lane*>(grad_y);
    if (!is_scratch<T>(n)) {
      Lane* const buffer = scratch.grad_y[0];
      // Past the row there are no windows.
      fill_row(buffer + padded(n) - kVector, kVector, Lane{0});
      load(grad_y, n, buffer);
      grad = buffer;
    }
    distribute(grad, at, n, Five<Lane>(scratch.sums, k, place + i));
  }

  NCSN_KERNEL void operator()(int64_t begin, int64_t end) const {
    Scratch scratch(tasks);
    for (int64_t task = begin; task < end; ++task) {
      const Block block = tasks.block(task);
      if (tasks.planes > 0) {
        to_image(x, tasks, task, scratch.image_x.data());
        to_image(grad_y, tasks, task, scratch.image_grad_y.data());
        run(scratch.image_grad_y.data(), scratch.image_x.data(), scratch.image_grad_x.data(), block,
            scratch);
        from_image(scratch.image_grad_x.data(), tasks, task, grad_x);
      } else {
        run(grad_y, x, grad_x, block, scratch);
      }
    }
  }
};

Tensor max_pool5_backward(Tensor grad_y, Tensor x, int64_t padding) {
  const bool zero_border = check_pool(x, padding);
  check_like(grad_y, x, "grad_y");
  STD_TORCH_CHECK(grad_y.scalar_type() == x.scalar_type(), "grad_y must have the dtype of x");
  Tensor grad_x = torch::stable::empty_like(x);
  if (x.numel() == 0) return grad_x;
  grad_y = in_layout_of(x, grad_y);
  for_dtype(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    run_tasks(Backward<T>{static_cast<const T*>(grad_y.data_ptr()),
                          static_cast<const T*>(x.data_ptr()), static_cast<T*>(grad_x.data_ptr()),
                          zero_border, Tasks(x, Backward<T>::kRowElements)});
  });
  return grad_x;
}

}  // namespace
}  // namespace pool5
}  // namespace ncsn

STABLE_TORCH_LIBRARY_IMPL(ncsn_fast, CPU, m) {
  m.impl("max_pool5_backward", TORCH_BOX(&ncsn::pool5::max_pool5_backward));
}
