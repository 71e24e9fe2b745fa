// The kernels of cond_instance_norm_elu for elements of type float.

#include "cuda/cond_instance_norm_elu_launch.cuh"

namespace ncsn {

template void launch_norm_forward<float>(
    Pass, const NormForwardArgs<float>&, const torch::stable::Tensor&);
template void launch_norm_backward<float>(
    Pass, const NormBackwardArgs<float>&, const torch::stable::Tensor&);

}  // namespace ncsn
