// What the CPU and the CUDA backend of max_pool5 agree on: the checks, and what a padding's number means.

#pragma once

#include "common/batch.h"

namespace ncsn {

// What surrounds the image. The numbers are those of PADDINGS in ncsn_fast/ops/schema.py: a string argument would be
// leaked by the conversions of the stable ABI at every call.
enum class Padding : int64_t { kNegInf = 0, kZero = 1 };

// Checks the arguments of a pool; whether its border counts as zero.
inline bool check_pool(const torch::stable::Tensor& x, int64_t padding) {
  check_like(x, x, "x");
  STD_TORCH_CHECK(x.dim() == 4, "x must have 4 axes, got ", x.dim());
  STD_TORCH_CHECK(is_contiguous(x) || is_channels_last(x), "x must be contiguous or channels_last");
  const bool zero = padding == static_cast<int64_t>(Padding::kZero);
  STD_TORCH_CHECK(zero || padding == static_cast<int64_t>(Padding::kNegInf),
                  "padding must be 0 (neg_inf) or 1 (zero), got ", padding);
  return zero;
}

}  // namespace ncsn
