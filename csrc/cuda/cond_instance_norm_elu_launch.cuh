// The kernels over x of cond_instance_norm_elu, and the choice among them. Instantiated once for each element type, in a
// source of its own (cond_instance_norm_elu_<type>.cu), so that they compile side by side.

#pragma once

#include <type_traits>

#include "cuda/cond_instance_norm_elu_launch.h"
#include "cuda/launch.h"

namespace ncsn {

// Blocks that the forward kernels leave room for on a multiprocessor: 80 registers a thread let three share it, as the tiles
// of 64 KiB do; 64, four. Clusters would spill, and so would float32 across channels for compute capability 12.
template <typename T, int W, bool kLast, bool kCluster>
constexpr int forward_blocks() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
  if (kLast && W > 1 && sizeof(T) == 4) return 2;
#endif
  return kCluster ? 2 : W > 1 && !kLast ? 4 : 3;
}

template <typename T, int W, bool kLast, bool kCluster>
__global__ void __launch_bounds__(kMaxThreads, (forward_blocks<T, W, kLast, kCluster>()))
    norm_forward_kernel(const __grid_constant__ NormForwardArgs<T> args) {
  norm_forward_block<T, W, kLast, kCluster, false>(args, this_thread(shared_memory));
}

template <typename T, int W, bool kLast, bool kCluster>
__global__ void __launch_bounds__(kMaxThreads, (forward_blocks<T, W, kLast, kCluster>()))
    add_norm_forward_kernel(const __grid_constant__ NormForwardArgs<T> args) {
  norm_forward_block<T, W, kLast, kCluster, true>(args, this_thread(shared_memory));
}

template <typename T, int W, bool kLast>
__global__ void __launch_bounds__(kMaxThreads, 2)
    norm_apply_kernel(const __grid_constant__ NormForwardArgs<T> args) {
  norm_apply_block<T, W, kLast>(args, this_thread(nullptr));
}

template <typename T, int W, bool kLast, bool kCluster>
__global__ void __launch_bounds__(kMaxThreads, 2)
    norm_backward_kernel(const __grid_constant__ NormBackwardArgs<T> args) {
  norm_backward_block<T, W, kLast, kCluster>(args, this_thread(shared_memory));
}

template <typename T, int W, bool kLast>
__global__ void __launch_bounds__(kMaxThreads, 2)
    norm_backward_apply_kernel(const __grid_constant__ NormBackwardArgs<T> args) {
  norm_backward_apply_block<T, W, kLast>(args, this_thread(nullptr));
}

inline LaunchShape shape_of(const PlaneTiling& t, int64_t shared, bool cluster) {
  const auto teams = static_cast<unsigned>(t.teams), ranks = static_cast<unsigned>(t.ranks);
  return {blocks_of(t.slabs * t.chunks, t.geometry.samples),
          t.last ? dim3(teams, ranks) : dim3(ranks, teams), shared, cluster ? t.chunks : 1};
}

// Calls f(width, last, cluster) with what a tiling says as constants. Vectors of one element know no clusters.
template <typename T, typename F>
void for_tiling(const PlaneTiling& t, const F& f) {
  const auto with_layout = [&](auto width, auto cluster) {
    t.last ? f(width, std::true_type(), cluster) : f(width, std::false_type(), cluster);
  };
  if constexpr (!std::is_same_v<T, double>) {
    constexpr std::integral_constant<int, kWide<T>> wide = {};
    if (t.spread == Spread::kCluster) return with_layout(wide, std::true_type());
    if (t.width > 1) return with_layout(wide, std::false_type());
  }
  with_layout(std::integral_constant<int, 1>(), std::false_type());
}

template <typename T>
void launch_norm_forward(Pass pass, const NormForwardArgs<T>& args,
                         const torch::stable::Tensor& x) {
  const char* name = args.sum.z ? "add_norm_elu" : "cond_instance_norm_elu";
  for_tiling<T>(args.tiling, [&](auto width, auto last, auto cluster) {
    if (pass == Pass::kApply) {
      return launch(name, norm_apply_kernel<T, width(), last()>,
                    shape_of(args.tiling, 0, false), x, args);
    }
    const int64_t shared = forward_memory(args.tiling, sizeof(T), sizeof(Accumulator<T>));
    launch(name, args.sum.z ? add_norm_forward_kernel<T, width(), last(), cluster()>
                            : norm_forward_kernel<T, width(), last(), cluster()>,
           shape_of(args.tiling, shared, cluster()), x, args);
  });
}

template <typename T>
void launch_norm_backward(Pass pass, const NormBackwardArgs<T>& args,
                          const torch::stable::Tensor& x) {
  const char* name = "cond_instance_norm_elu_backward";
  for_tiling<T>(args.tiling, [&](auto width, auto last, auto cluster) {
    if (pass == Pass::kApply) {
      return launch(name, norm_backward_apply_kernel<T, width(), last()>,
                    shape_of(args.tiling, 0, false), x, args);
    }
    const int64_t shared = backward_memory(args.tiling, sizeof(T), sizeof(Accumulator<T>));
    launch(name, norm_backward_kernel<T, width(), last(), cluster()>,
           shape_of(args.tiling, shared, cluster()), x, args);
  });
}

}  // namespace ncsn
