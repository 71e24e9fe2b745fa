// What the convolution engine's operators check, so that a direct call cannot read or write outside of its tensors.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include "common/batch.h"
#include "cpu/conv3x3/weights.h"

namespace ncsn {

inline void check_channels_last(const torch::stable::Tensor& t, const char* name) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, " must be float32, got ",
                  torch::headeronly::toString(t.scalar_type()));
  STD_TORCH_CHECK(t.dim() == 4 && is_channels_last(t), name,
                  " must have shape (N, C, H, W) and be channels_last");
}

inline ConvWeights conv_weights(const torch::stable::Tensor& weight, int64_t side) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float, "weight must be float32, got ",
                  torch::headeronly::toString(weight.scalar_type()));
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == side && weight.size(3) == side,
                  "weight must have shape (O, C, ", side, ", ", side, ")");
  return {weight.const_data_ptr<float>(), weight.stride(0), weight.stride(1), weight.stride(2),
          weight.stride(3), side};
}

// A convolution of side x side taps.
struct ConvCall {
  ConvShape shape;
  ConvWeights weights;
  const float *bias, *residual;
};

inline ConvCall conv_call(const torch::stable::Tensor& x, const torch::stable::Tensor& weight,
                          const std::optional<torch::stable::Tensor>& bias,
                          const std::optional<torch::stable::Tensor>& residual, int64_t dilation,
                          int64_t side, bool transposed) {
  using torch::headeronly::ScalarType;
  check_channels_last(x, "x");
  STD_TORCH_CHECK(dilation >= 1, "dilation must be at least 1, got ", dilation);
  const ConvWeights weights = conv_weights(weight, side);
  const int64_t from = transposed ? 0 : 1;
  STD_TORCH_CHECK(weight.size(from) == x.size(1), "weight must fit the ", x.size(1),
                  " channels of x");
  ConvCall call = {{x.size(0), x.size(1), weight.size(1 - from), x.size(2), x.size(3), dilation},
                   transposed ? weights.transposed() : weights,
                   nullptr,
                   nullptr};
  if (bias) {
    STD_TORCH_CHECK(bias->scalar_type() == ScalarType::Float && bias->dim() == 1 &&
                        bias->size(0) == call.shape.outputs && is_contiguous(*bias),
                    "bias must be a contiguous float32 (", call.shape.outputs, ",)");
    call.bias = bias->const_data_ptr<float>();
  }
  if (residual) {
    check_channels_last(*residual, "residual");
    STD_TORCH_CHECK(residual->size(0) == x.size(0) &&
                        residual->size(1) == call.shape.outputs &&
                        residual->size(2) == x.size(2) && residual->size(3) == x.size(3),
                    "residual must have the shape of the result");
    call.residual = residual->const_data_ptr<float>();
  }
  return call;
}

inline torch::stable::Tensor new_channels_last(const torch::stable::Tensor& like,
                                               const ConvShape& s) {
  return torch::stable::empty({s.samples, s.outputs, s.height, s.width}, like.scalar_type(),
                              std::nullopt, like.device(), std::nullopt,
                              torch::headeronly::MemoryFormat::ChannelsLast);
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
