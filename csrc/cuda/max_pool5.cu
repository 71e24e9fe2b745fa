// max_pool5 and its gradient on CUDA.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/max_pool5.h"
#include "cuda/max_pool5.cuh"
#include "cuda/pool5_launch.cuh"

namespace ncsn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T, int W, bool kAlong>
__global__ void __launch_bounds__(kPoolThreads)
    pool_forward_kernel(const __grid_constant__ PoolForwardArgs<T> args) {
  each_thread<PoolForwardArgs<T>, pool_forward_thread<T, W, kAlong>>(args);
}

template <typename T, int W, bool kAlong>
__global__ void __launch_bounds__(kPoolThreads)
    pool_choice_kernel(const __grid_constant__ PoolBackwardArgs<T> args) {
  each_thread<PoolBackwardArgs<T>, pool_choice_thread<T, W, kAlong>>(args);
}

template <typename T, int W, bool kAlong>
__global__ void __launch_bounds__(kPoolThreads)
    pool_gather_kernel(const __grid_constant__ PoolBackwardArgs<T> args) {
  each_thread<PoolBackwardArgs<T>, pool_gather_thread<T, W, kAlong>>(args);
}

Tensor max_pool5(Tensor x, int64_t padding) {
  const bool zero_border = check_pool(x, padding);
  Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) return y;
  for_dtype(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const PoolForwardArgs<T> args = {tiling_of<T>(x, is_aligned(x) && is_aligned(y)),
                                     static_cast<const T*>(x.const_data_ptr()),
                                     static_cast<T*>(y.mutable_data_ptr()), zero_border};
    for_tiling<T>(args.tiling, [&](auto width, auto along) {
      launch("max_pool5", pool_forward_kernel<T, width(), along()>, shape_of(args.tiling), x, args);
    });
  });
  return y;
}

Tensor max_pool5_backward(Tensor grad_y, Tensor x, int64_t padding) {
  const bool zero_border = check_pool(x, padding);
  check_like(grad_y, x, "grad_y");
  STD_TORCH_CHECK(grad_y.scalar_type() == x.scalar_type(), "grad_y must have the dtype of x");
  Tensor grad_x = torch::stable::empty_like(x);
  if (x.numel() == 0) return grad_x;
  const Tensor grad = in_layout_of(x, grad_y);
  Tensor choices = torch::stable::new_empty(x, {x.numel()}, ScalarType::Byte);
  for_dtype(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const bool aligned = is_aligned(x) && is_aligned(grad) && is_aligned(grad_x);
    const PoolBackwardArgs<T> args = {tiling_of<T>(x, aligned),
                                      static_cast<const T*>(x.const_data_ptr()),
                                      static_cast<const T*>(grad.const_data_ptr()),
                                      static_cast<T*>(grad_x.mutable_data_ptr()),
                                      choices.mutable_data_ptr<uint8_t>(), zero_border};
    for_tiling<T>(args.tiling, [&](auto width, auto along) {
      const char* name = "max_pool5_backward";
      const LaunchShape shape = shape_of(args.tiling);
      launch(name, pool_choice_kernel<T, width(), along()>, shape, x, args);
      launch(name, pool_gather_kernel<T, width(), along()>, shape, x, args);
    });
  });
  return grad_x;
}

}  // namespace
}  // namespace ncsn

STABLE_TORCH_LIBRARY_IMPL(ncsn_fast, CUDA, m) {
  m.impl("max_pool5", TORCH_BOX(&ncsn::max_pool5));
  m.impl("max_pool5_backward", TORCH_BOX(&ncsn::max_pool5_backward));
}
