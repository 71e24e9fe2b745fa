// What the CPU and the CUDA backend of avg_pool5 agree on: the checks.

#pragma once

#include "common/batch.h"

namespace ncsn {

inline void check_mean_pool(const torch::stable::Tensor& x) {
  check_like(x, x, "x");
  STD_TORCH_CHECK(x.dim() == 4, "x must have 4 axes, got ", x.dim());
  STD_TORCH_CHECK(is_contiguous(x) || is_channels_last(x), "x must be contiguous or channels_last");
}

}  // namespace ncsn
