// avg_pool5 on CUDA. Its gradient is the pool itself.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/avg_pool5.h"
#include "cuda/avg_pool5.cuh"
#include "cuda/pool5_launch.cuh"

namespace ncsn {
namespace {

using torch::stable::Tensor;

template <typename T, int W, bool kAlong>
__global__ void __launch_bounds__(kPoolThreads)
    mean_pool_kernel(const __grid_constant__ MeanPoolArgs<T> args) {
  each_thread<MeanPoolArgs<T>, mean_pool_thread<T, W, kAlong>>(args);
}

Tensor avg_pool5(Tensor x) {
  check_mean_pool(x);
  Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) return y;
  for_dtype(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const MeanPoolArgs<T> args = {tiling_of<T>(x, is_aligned(x) && is_aligned(y)),
                                  static_cast<const T*>(x.const_data_ptr()),
                                  static_cast<T*>(y.mutable_data_ptr())};
    for_tiling<T>(args.tiling, [&](auto width, auto along) {
      launch("avg_pool5", mean_pool_kernel<T, width(), along()>, shape_of(args.tiling), x, args);
    });
  });
  return y;
}

}  // namespace
}  // namespace ncsn

STABLE_TORCH_LIBRARY_IMPL(ncsn_fast, CUDA, m) { m.impl("avg_pool5", TORCH_BOX(&ncsn::avg_pool5)); }
