// The kernels of cond_instance_norm_elu for elements of type bfloat16.

#include "cuda/cond_instance_norm_elu_launch.cuh"

namespace ncsn {

template void launch_norm_forward<torch::headeronly::BFloat16>(
    Pass, const NormForwardArgs<torch::headeronly::BFloat16>&, const torch::stable::Tensor&);
template void launch_norm_backward<torch::headeronly::BFloat16>(
    Pass, const NormBackwardArgs<torch::headeronly::BFloat16>&, const torch::stable::Tensor&);

}  // namespace ncsn
