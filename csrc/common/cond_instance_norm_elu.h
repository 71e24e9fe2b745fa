// What cond_instance_norm_elu is on the CPU and on CUDA alike.

#pragma once

namespace ncsn {

// InstanceNorm++ normalises the channel means with this epsilon, whatever the epsilon of the planes.
constexpr double kChannelMeanEps = 1e-5;

}  // namespace ncsn
