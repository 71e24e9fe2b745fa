// What the convolution engine's operators check, so that a direct call cannot read or write outside of its tensors.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include "common/batch.h"

namespace ncsn {

inline void check_channels_last(const torch::stable::Tensor& t, const char* name) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, " must be float32, got ",
                  torch::headeronly::toString(t.scalar_type()));
  STD_TORCH_CHECK(t.dim() == 4 && is_channels_last(t), name,
                  " must have shape (N, C, H, W) and be channels_last");
}

// An (N, C) array that the forward pass returned.
inline const float* statistics_of(const torch::stable::Tensor& x,
                                  const torch::stable::Tensor& values) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(values.scalar_type() == ScalarType::Float && values.dim() == 2 &&
                      values.size(0) == x.size(0) && values.size(1) == x.size(1) &&
                      is_contiguous(values),
                  "mean and rstd must be what the forward pass returned");
  return values.const_data_ptr<float>();
}

}  // namespace ncsn
