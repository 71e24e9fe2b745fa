// max_pool5 and its gradient on CUDA.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <type_traits>

#include "common/batch.h"
#include "common/max_pool5.h"
#include "cuda/launch.h"
#include "cuda/max_pool5.cuh"

namespace ncsn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What thread `thread` does, for all threads; more of them than a launch can have go round again.
template <typename Args, void (*body)(const Args&, int64_t)>
__device__ __forceinline__ void each_thread(const Args& args) {
  const int64_t all = args.tiling.threads(), step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < all; i += step) {
    body(args, i);
  }
}

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

// Calls f(width, along) with what a tiling says as constants.
template <typename T, typename F>
void for_tiling(const PoolTiling& t, const F& f) {
  if constexpr (!std::is_same_v<T, double>) {
    constexpr std::integral_constant<int, kWide<T>> wide = {};
    if (t.along) return f(wide, std::true_type());
    if (t.width > 1) return f(wide, std::false_type());
  }
  f(std::integral_constant<int, 1>(), std::false_type());
}

LaunchShape shape_of(const PoolTiling& t) {
  const int64_t blocks = (t.threads() + t.block - 1) / t.block;
  constexpr int64_t kMost = (int64_t{1} << 31) - 1;
  return {blocks_of(blocks < kMost ? blocks : kMost, 1), dim3(static_cast<unsigned>(t.block))};
}

bool is_aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

template <typename T>
PoolTiling tiling_of(const Tensor& x, bool aligned) {
  const int multiprocessors = device_attribute<cudaDevAttrMultiProcessorCount>(x.get_device_index());
  return tile_pool<T>(x.size(0), x.size(1), x.size(2), x.size(3), is_contiguous(x), aligned,
                      multiprocessors);
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
