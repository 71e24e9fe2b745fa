// The parallel loop of all kernels: by the threads of torch, or by threads of our own.

#pragma once

#include <cstdint>

#include "cpu/pool.h"

namespace ncsn {

// Whether the loops run on our own threads, which they do where threads are to wait asleep (OMP_WAIT_POLICY=passive).
// Where they spin, which is OpenMP's default, torch's would spin beside ours.
bool own_threads();

void run_ranges(int64_t n, int64_t grain, Pool::Body body, const void* context);

// f(begin, end) for ranges of at least `grain` items that make up 0 .. n - 1. Which thread runs which range, and how many
// there are, differs from call to call: no number may depend on either.
template <typename F>
void parallel_for(int64_t n, int64_t grain, const F& f) {
  run_ranges(
      n, grain,
      [](const void* context, int64_t begin, int64_t end) {
        (*static_cast<const F*>(context))(begin, end);
      },
      &f);
}

}  // namespace ncsn
