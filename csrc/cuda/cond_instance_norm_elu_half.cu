// The kernels of cond_instance_norm_elu for elements of type half.

#include "cuda/cond_instance_norm_elu_launch.cuh"

namespace ncsn {

template void launch_norm_forward<torch::headeronly::Half>(
    Pass, const NormForwardArgs<torch::headeronly::Half>&, const torch::stable::Tensor&);
template void launch_norm_backward<torch::headeronly::Half>(
    Pass, const NormBackwardArgs<torch::headeronly::Half>&, const torch::stable::Tensor&);

}  // namespace ncsn
