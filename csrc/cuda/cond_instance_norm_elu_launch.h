// The launches over x of cond_instance_norm_elu, compiled for each element type in a source of its own.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include "cuda/cond_instance_norm_elu_backward.cuh"
#include "cuda/cond_instance_norm_elu_forward.cuh"

namespace ncsn {

// The two halves of a pass: the one that sums, and writes the result if it can; and the one that applies finished numbers.
enum class Pass { kWhole, kApply };

template <typename T>
void launch_norm_forward(Pass pass, const NormForwardArgs<T>& args,
                         const torch::stable::Tensor& x);

template <typename T>
void launch_norm_backward(Pass pass, const NormBackwardArgs<T>& args,
                          const torch::stable::Tensor& x);

}  // namespace ncsn
