// What the convolution engine runs on: the memory that a thread keeps, the size of its cache, and its parallel loops.
// Nothing here knows what a convolution is.

#pragma once

#if defined(__linux__)
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

#include "cpu/threads.h"

namespace ncsn {

// --- memory ---------------------------------------------------------------------------------------

enum class Use { kWeights, kSharedInputs, kInputs, kProducts, kRows, kTaps, kGradients,
                 kGradientRows, kWeightGradients, kUses };

// Memory of the calling thread for one use, kept for its next call: fresh memory of this size would have to be mapped
// anew by the system, which costs as much as a small convolution.
inline float* thread_memory(Use use, int64_t floats) {
  constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(float* p) const { ::operator delete[](p, kLine); }
  };
  struct Block {
    std::unique_ptr<float[], Free> memory;
    int64_t floats = 0;
  };
  thread_local Block blocks[static_cast<int>(Use::kUses)];
  Block& block = blocks[static_cast<int>(use)];
  if (block.floats < floats) {
    block.memory.reset();
    block.floats = 0;
    block.memory.reset(static_cast<float*>(
        ::operator new[](static_cast<size_t>(floats) * sizeof(float), kLine)));
    block.floats = floats;
  }
  return block.memory.get();
}

inline int64_t second_cache_bytes() {
  static const int64_t bytes = [] {
    int64_t found = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    found = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return std::clamp<int64_t>(found > 0 ? found : 1 << 20, 1 << 18, 1 << 22);
  }();
  return bytes;
}

// From one position of `rows` transformed tiles or channels to the next: not a power of two, which would put all
// positions of a row into the same few places of a cache.
inline int64_t position_stride(int64_t rows, int64_t width) { return rows * width + 16; }

// --- threads --------------------------------------------------------------------------------------

// f(i) for 0 .. n - 1, spread over the threads in runs of consecutive numbers.
template <typename F>
void parallel_each(int64_t n, const F& f) {
  parallel_for(n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

// f(begin, end) for the runs of 0 .. n - 1 that the parts of 0 .. parts - 1 have: for work of two kinds in one loop.
template <typename F>
void share_of(int64_t part, int64_t parts, int64_t n, const F& f) {
  const int64_t begin = n * part / parts, end = n * (part + 1) / parts;
  if (begin < end) f(begin, end);
}

}  // namespace ncsn
