// As much of the CUDA runtime as csrc/cuda/launch.h calls, for a host program that watches it: what is asked of a kernel's
// shared memory, what a launch sees of it, and the error that a failed call leaves behind.

#pragma once

#include <cstddef>
#include <map>
#include <mutex>

#define __global__
#define __shared__
#define __align__(n)

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
struct cudaFuncAttributes { size_t sharedSizeBytes; };
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct { struct { unsigned x, y, z; } clusterDim; } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace fake {
constexpr int kMost = 232448, kStatic = 1024;  // of a block of an H100; what the kernel has of its own
inline std::mutex mutex;
inline std::map<const void*, int> allowed;
inline cudaError_t left_behind = cudaSuccess, next_launch = cudaSuccess;
inline int times_set = 0;
inline void (*between)() = [] {};  // called before a launch looks at what it may have
}  // namespace fake

inline cudaError_t fake_fail(cudaError_t error) {
  if (error != cudaSuccess) fake::left_behind = error;
  return error;
}
inline cudaError_t cudaGetLastError() {
  const cudaError_t error = fake::left_behind;
  fake::left_behind = cudaSuccess;
  return error;
}
inline const char* cudaGetErrorString(cudaError_t) { return "made to fail"; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = fake::kMost;
  return cudaSuccess;
}
template <typename F>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, F) {
  attributes->sharedSizeBytes = fake::kStatic;
  return cudaSuccess;
}
template <typename F>
cudaError_t cudaFuncSetAttribute(F kernel, cudaFuncAttribute, int bytes) {
  const std::lock_guard<std::mutex> lock(fake::mutex);
  ++fake::times_set;
  if (bytes > fake::kMost - fake::kStatic) return fake_fail(cudaErrorInvalidValue);
  fake::allowed[reinterpret_cast<const void*>(kernel)] = bytes;
  return cudaSuccess;
}
template <typename... Parameters, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Args&&...) {
  fake::between();
  const std::lock_guard<std::mutex> lock(fake::mutex);
  const auto found = fake::allowed.find(reinterpret_cast<const void*>(kernel));
  const int may = found == fake::allowed.end() ? 48 * 1024 : found->second;
  if (static_cast<int>(config->dynamicSmemBytes) > may) return fake_fail(cudaErrorInvalidValue);
  const cudaError_t error = fake::next_launch;
  fake::next_launch = cudaSuccess;
  return fake_fail(error);
}
