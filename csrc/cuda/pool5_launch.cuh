// Launching the threads of pool5.cuh. Does not belong here: what a thread does.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "common/batch.h"
#include "cuda/launch.h"
#include "cuda/pool5.cuh"

namespace ncsn {

// What thread `thread` does, for all threads; more of them than a launch can have go round again.
template <typename Args, void (*body)(const Args&, int64_t)>
__device__ __forceinline__ void each_thread(const Args& args) {
  const int64_t all = args.tiling.threads(), step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < all; i += step) {
    body(args, i);
  }
}

inline LaunchShape shape_of(const PoolTiling& t) {
  const int64_t blocks = (t.threads() + t.block - 1) / t.block;
  constexpr int64_t kMost = (int64_t{1} << 31) - 1;
  return {blocks_of(blocks < kMost ? blocks : kMost, 1), dim3(static_cast<unsigned>(t.block))};
}

inline bool is_aligned(const torch::stable::Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

template <typename T>
PoolTiling tiling_of(const torch::stable::Tensor& x, bool aligned) {
  const int multiprocessors = device_attribute<cudaDevAttrMultiProcessorCount>(x.get_device_index());
  return tile_pool<T>(x.size(0), x.size(1), x.size(2), x.size(3), is_contiguous(x), aligned,
                      multiprocessors);
}

}  // namespace ncsn
