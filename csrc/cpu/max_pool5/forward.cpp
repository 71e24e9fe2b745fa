// max_pool5 for the CPU: rows of five, then columns of five.

#include <torch/csrc/stable/library.h>

#include "common/max_pool5.h"
#include "cpu/max_pool5/rows.h"
#include "cpu/stream.h"

namespace ncsn {
namespace pool5 {
namespace {

template <bool nan, typename Lane>
NCSN_KERNEL void find_maxima(Five<const Lane> x, int64_t n, Lane* __restrict maxima) {
  for (int64_t i = 0; i < padded(n); ++i) {
    Lane best = better<nan>(x.p1[i], x.p0[i]);
    best = better<nan>(x.p2[i], best);
    best = better<nan>(x.p3[i], best);
    maxima[i] = better<nan>(x.p4[i], best);
  }
}

template <typename T>
struct Forward {
  using Lane = Accumulator<T>;
  static constexpr int64_t kRowElements = 1024;  // five rows of maxima are 20 KiB: the first cache

  const T* x;
  T* y;
  bool zero_border, streamed;
  Tasks tasks;

  struct Scratch {
    Input<T> x;
    Rows<Lane, kWindow> maxima;
    Rows<Lane, 1> y;
    std::vector<T> image_x, image_y;

    explicit Scratch(const Tasks& tasks)
        : Scratch(tasks.block_pixels() * tasks.lanes, tasks.lanes) {
      image_x.resize(tasks.side_by_side());
      image_y.resize(tasks.side_by_side());
    }
    Scratch(int64_t n, int64_t lanes) : x(padded(n) + 2 * kReach * lanes), maxima(n), y(n) {}
  };

  template <bool nan>
  NCSN_KERNEL void run(const T* x, T* y, const Block& block, Scratch& scratch) const {
    const Lane border = border_value<Lane>(zero_border);
    const int64_t n = (block.span.last - block.span.first) * block.lanes;
    const int64_t start = block.first_row - kReach;
    scratch.x.start(block, block.span, start, border);
    for (int64_t row = start; row < block.last_row + kReach; ++row) {
      scratch.maxima.advance();
      if (row < 0 || row >= block.rows) {
        fill_row(scratch.maxima.last(), n, border);
      } else {
        find_maxima<nan>(Five<const Lane>(scratch.x.read(x, block, row), block.lanes), n,
                         scratch.maxima.last());
      }
      const int64_t middle = row - kReach;
      if (middle < block.first_row) continue;
      T* const out = y + block.at(middle, block.span.first);
      const bool in_place = is_scratch<T>(n) && !streamed;
      Lane* const maxima = in_place ? reinterpret_cast<Lane*>(out) : scratch.y[0];
      find_maxima<nan>(Five<const Lane>(scratch.maxima, 0, 0), n, maxima);
      if (in_place) continue;
      if (streamed && is_scratch<T>(n) && can_stream(out, n)) {
        stream_row(reinterpret_cast<const T*>(maxima), n, out);
      } else {
        store(maxima, n, out);
      }
    }
    if (streamed) end_stream();
  }

  NCSN_KERNEL void operator()(int64_t begin, int64_t end) const {
    Scratch scratch(tasks);
    for (int64_t task = begin; task < end; ++task) {
      const Block block = tasks.block(task);
      if (tasks.planes > 0) {
        to_image(x, tasks, task, scratch.image_x.data());
        run(scratch.image_x.data(), scratch.image_y.data(), block, scratch);
        from_image(scratch.image_y.data(), tasks, task, y);
      } else {
        run(x, y, block, scratch);
      }
    }
  }

  NCSN_KERNEL void run(const T* x, T* y, const Block& block, Scratch& scratch) const {
    has_nan(x, block, kReach) ? run<true>(x, y, block, scratch) : run<false>(x, y, block, scratch);
  }
};

Tensor max_pool5(Tensor x, int64_t padding) {
  const bool zero_border = check_pool(x, padding);
  Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) return y;
  for_dtype(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const Tasks tasks(x, Forward<T>::kRowElements);
    run_tasks(Forward<T>{static_cast<const T*>(x.data_ptr()), static_cast<T*>(y.data_ptr()),
                         zero_border, is_streamed<T>(x.numel()) && tasks.planes == 0, tasks});
  });
  return y;
}

}  // namespace
}  // namespace pool5
}  // namespace ncsn

STABLE_TORCH_LIBRARY_IMPL(ncsn_fast, CPU, m) {
  m.impl("max_pool5", TORCH_BOX(&ncsn::pool5::max_pool5));
}
