// Writes past the caches, for results that are larger than these: an ordinary store reads the line that it is to
// overwrite, a third of all that such an operator moves.

#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/multiversion.h"

#if NCSN_X86
#include <immintrin.h>
#endif

namespace ncsn {

constexpr int64_t kStreamedBytes = int64_t{32} << 20;  // as much as the last cache of most processors holds

// Whether a result of so many elements is written past the caches.
template <typename T>
bool is_streamed(int64_t elements) {
  return NCSN_X86 && elements * static_cast<int64_t>(sizeof(T)) >= kStreamedBytes;
}

// Whether such a row can be.
template <typename T>
NCSN_KERNEL bool can_stream(const T* to, int64_t n) {
  return reinterpret_cast<uintptr_t>(to) % 16 == 0 && n * sizeof(T) % 16 == 0;
}

template <typename T>
NCSN_KERNEL void stream_row(const T* from, int64_t n, T* to) {
#if NCSN_X86
  for (int64_t i = 0; i < n; i += 16 / static_cast<int64_t>(sizeof(T))) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
  }
#else
  std::memcpy(to, from, static_cast<size_t>(n) * sizeof(T));
#endif
}

// Before another thread is told that the rows are there: the processor does not order such writes by itself.
NCSN_KERNEL void end_stream() {
#if NCSN_X86
  _mm_sfence();
#endif
}

}  // namespace ncsn
