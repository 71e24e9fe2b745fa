// Launching a kernel the way every operator here must: on the tensor's device, on PyTorch's current
// stream, checked, and without a synchronisation. What a kernel computes is in the operators' own files.

#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <utility>

#include "cuda/block.cuh"
#include "cuda/grid.h"

namespace ncsn {

NCSN_HD DeviceThread this_thread(char* memory) {
#if defined(__CUDA_ARCH__)
  return {threadIdx.x, threadIdx.y, blockDim.x, blockDim.y,
          blockIdx.x,  blockIdx.y,  gridDim.y,  memory};
#else
  return {0, 0, 1, 1, 0, 0, 1, memory};
#endif
}

extern __shared__ __align__(16) char shared_memory[];

inline void check_cuda(cudaError_t error, const char* what, int device) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it is reported here: left behind, the next call to look would take it for its own
  STD_TORCH_CHECK(false, "ncsn_fast: ", what, " on cuda:", device,
                  " failed: ", cudaGetErrorString(error));
}

// An attribute of a device, asked for once: the driver's answer takes longer than a small launch.
template <cudaDeviceAttr which>
int device_attribute(int device) {
  static std::mutex mutex;
  static std::map<int, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, which, device), "asking for an attribute", device);
  return known[device] = value;
}

struct LaunchShape {
  dim3 blocks, threads;
  int64_t shared = 0;  // bytes of dynamic shared memory
  int cluster = 1;     // blocks along x that share theirs
};

// A number of blocks along x; along y at most CUDA's limit, so that the kernel must loop.
inline dim3 blocks_of(int64_t x, int64_t y) {
  STD_TORCH_CHECK(x < (int64_t{1} << 31), "ncsn_fast: too many blocks for one launch: ", x);
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y < kMaxBlocksY ? y : kMaxBlocksY));
}

// Lets the kernel have as much dynamic shared memory as a block of the device can. Once, and at once the most: threads that
// each asked for what their launch needs would take it from each other between asking and launching.
inline void allow_shared_memory(const void* kernel, const char* name, int device) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device}) != 0) return;
  const int most = device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(device);
  cudaFuncAttributes code = {};
  check_cuda(cudaFuncGetAttributes(&code, kernel), name, device);
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  most - static_cast<int>(code.sharedSizeBytes)),
             name, device);
  allowed.insert({kernel, device});
}

// kernel(args...) on the current stream of the tensor's device.
template <typename... Args>
void launch(const char* name, void (*kernel)(Args...), const LaunchShape& shape,
            const torch::stable::Tensor& tensor, const Args&... args) {
  constexpr int64_t kAlways = 48 * 1024;  // what a block gets unasked
  const auto device = tensor.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  if (shape.shared > kAlways) {
    allow_shared_memory(reinterpret_cast<const void*>(kernel), name, device);
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.blocks;
  config.blockDim = shape.threads;
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  // What it returns is this launch's error; cudaGetLastError would also give one that others have left behind.
  check_cuda(cudaLaunchKernelEx(&config, kernel, args...), name, device);
}

// kernel(args, grid), a thread or several for each group of four elements.
template <typename Args>
void launch(const char* name, void (*kernel)(Args, Grid), const Args& args, const Grid& grid,
            const torch::stable::Tensor& tensor) {
  launch(name, kernel,
         {dim3(grid.blocks_x, grid.blocks_y), dim3(grid.threads_x, grid.threads_y)}, tensor, args,
         grid);
}

}  // namespace ncsn
