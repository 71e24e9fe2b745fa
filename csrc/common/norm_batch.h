// The arguments of cond_instance_norm_elu and its backward operator, checked, for every C++ backend.
//
// The public function in Python has checked everything with better words; these guard direct calls of the operators.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include "common/batch.h"

namespace ncsn {

inline torch::headeronly::ScalarType statistics_dtype(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Geometry check_norm(const torch::stable::Tensor& x, const torch::stable::Tensor& labels,
                           const torch::stable::Tensor& weight) {
  STD_TORCH_CHECK(is_floating(x.scalar_type()), "x must be floating point, got ",
                  torch::headeronly::toString(x.scalar_type()));
  STD_TORCH_CHECK(x.dim() >= 2, "x must have shape (N, C, *spatial), got ", x.dim(), " axes");
  const Geometry geometry = planar_geometry(x.sizes().data(), x.dim());
  STD_TORCH_CHECK(geometry.elements() > 0, "x must have channels and positions");
  STD_TORCH_CHECK(is_contiguous(x) || is_channels_last(x),
                  "x must be contiguous or channels_last");
  STD_TORCH_CHECK(labels.scalar_type() == torch::headeronly::ScalarType::Long,
                  "labels must be int64, got ",
                  torch::headeronly::toString(labels.scalar_type()));
  STD_TORCH_CHECK(labels.dim() == 1 && (labels.size(0) == geometry.samples || labels.size(0) == 1),
                  "labels must have shape (", geometry.samples, ",) or (1,)");
  STD_TORCH_CHECK(is_floating(weight.scalar_type()), "weight must be floating point, got ",
                  torch::headeronly::toString(weight.scalar_type()));
  STD_TORCH_CHECK(weight.dim() == 2 && (weight.size(1) == 2 * geometry.channels ||
                                        weight.size(1) == 3 * geometry.channels),
                  "weight must have shape (K, ", 2 * geometry.channels, ") or (K, ",
                  3 * geometry.channels, ")");
  STD_TORCH_CHECK(labels.device() == x.device() && weight.device() == x.device(),
                  "labels and weight must be on the device of x");
  return geometry;
}

inline void check_norm_gradient(const torch::stable::Tensor& grad_y,
                                const torch::stable::Tensor& x) {
  check_like(grad_y, x, "grad_y");
  STD_TORCH_CHECK(grad_y.scalar_type() == x.scalar_type(), "grad_y must have the dtype of x");
}

inline const void* statistics_data(const torch::stable::Tensor& t, const torch::stable::Tensor& x,
                                   const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == statistics_dtype(x.scalar_type()) && is_contiguous(t) &&
                      t.dim() == 2 && t.size(0) == x.size(0) && t.size(1) == x.size(1) &&
                      t.device() == x.device(),
                  name, " must be what the forward pass returned");
  return t.const_data_ptr();
}

}  // namespace ncsn
