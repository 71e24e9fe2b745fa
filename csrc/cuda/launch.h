// Launching a kernel the way every operator here must: on the tensor's device, on PyTorch's current
// stream, checked, and without a synchronisation. What a kernel computes is in the operators' own files.

#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include "cuda/grid.h"

namespace ncsn {

// kernel(args, grid) on the current stream of the tensor's device.
template <typename Args>
void launch(const char* name, void (*kernel)(Args, Grid), const Args& args, const Grid& grid,
            const torch::stable::Tensor& tensor) {
  const auto device = tensor.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  kernel<<<dim3(grid.blocks_x, grid.blocks_y), dim3(grid.threads_x, grid.threads_y), 0,
           static_cast<cudaStream_t>(stream)>>>(args, grid);
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "ncsn_fast: launching ", name, " on cuda:", device,
                  " failed: ", cudaGetErrorString(error));
}

}  // namespace ncsn
