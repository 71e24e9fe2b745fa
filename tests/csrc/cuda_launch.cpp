// Launches through csrc/cuda/launch.h, with a CUDA runtime that is not there (tests/fake_cuda).

#include "cuda/launch.h"

#include <stdexcept>
#include <thread>

namespace {

void large_kernel(int) {}
void small_kernel(int) {}
const torch::stable::Tensor kTensor;

void launch_with(int64_t shared) {
  ncsn::launch("large", large_kernel, {dim3(1), dim3(1), shared}, kTensor, 1);
}

}  // namespace

extern "C" {

// Another thread launches the same kernel with less shared memory, at the moment between what the first has asked for and
// its launch. 0: both launches went well.
int two_threads() {
  static bool other_done, other_failed;
  other_done = other_failed = false;
  fake::between = [] {
    if (other_done) return;
    other_done = true;
    std::thread([] {
      try {
        launch_with(60 * 1024);
      } catch (const std::exception&) {
        other_failed = true;
      }
    }).join();
  };
  int failed = 0;
  try {
    launch_with(200 * 1024);
  } catch (const std::exception&) {
    failed = 1;
  }
  fake::between = [] {};
  return failed + other_failed;
}

// How often the runtime was asked for shared memory, for one kernel and many launches.
int times_set() {
  fake::times_set = 0;
  for (int64_t kib : {64, 100, 64, 200, 50}) launch_with(kib * 1024);
  return fake::times_set;
}

// 1: a launch that failed was reported, and the good one after it too, which is wrong. 0: only the first. -1: none.
int after_a_failure() {
  fake::next_launch = cudaErrorLaunchFailure;
  try {
    ncsn::launch("small", small_kernel, {dim3(1), dim3(1)}, kTensor, 1);
    return -1;
  } catch (const std::exception&) {
  }
  try {
    ncsn::launch("small", small_kernel, {dim3(1), dim3(1)}, kTensor, 1);
  } catch (const std::exception&) {
    return 1;
  }
  return cudaGetLastError() == cudaSuccess ? 0 : 1;
}

// An error that somebody else's call has left behind is not this launch's. 0: right.
int of_somebody_else() {
  fake::left_behind = cudaErrorInvalidValue;
  int failed = 0;
  try {
    ncsn::launch("small", small_kernel, {dim3(1), dim3(1)}, kTensor, 1);
  } catch (const std::exception&) {
    failed = 1;
  }
  cudaGetLastError();
  return failed;
}
}
