// The kernels of cond_instance_norm_elu for elements of type double.

#include "cuda/cond_instance_norm_elu_launch.cuh"

namespace ncsn {

template void launch_norm_forward<double>(
    Pass, const NormForwardArgs<double>&, const torch::stable::Tensor&);
template void launch_norm_backward<double>(
    Pass, const NormBackwardArgs<double>&, const torch::stable::Tensor&);

}  // namespace ncsn
