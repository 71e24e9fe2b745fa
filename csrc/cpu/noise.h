// The noise stream on the CPU: a run of consecutive elements of one sample, by SIMD code chosen at run time.

#pragma once

#include <cstdint>

#include "common/philox.h"

namespace ncsn {

enum class Noise : int64_t { kBits = 0, kUniform = 1, kNormal = 2 };

// Writes the values of `groups` groups of four elements, beginning with the counter's own group, to out[0 .. 4 groups).
// Bits are written as int32 bit patterns into the same memory.
void fill_noise(Noise kind, PhiloxKey key, PhiloxCounter counter, int64_t groups, float* out);

}  // namespace ncsn
