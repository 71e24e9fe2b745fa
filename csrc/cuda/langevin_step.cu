// langevin_step_ on CUDA: one pass that reads x and the score, draws the noise in registers, writes x.

#include <torch/csrc/stable/library.h>

#include <limits>
#include <optional>

#include "common/batch.h"
#include "common/dtype.h"
#include "cuda/langevin_step.cuh"
#include "cuda/launch.h"

namespace ncsn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <Access access, typename Score>
__global__ void __launch_bounds__(kThreadsPerBlock)
    langevin_step_kernel(const __grid_constant__ LangevinArgs args,
                         const __grid_constant__ Grid grid) {
  langevin_step_thread<access, Score>(
      args, thread_work(grid, blockIdx.x, blockIdx.y, threadIdx.x, threadIdx.y));
}

template <typename Score>
void launch_langevin_step(const LangevinArgs& args, const Tensor& x) {
  const Grid grid = make_grid(args.geometry);
  const char* name = "langevin_step_";
  switch (langevin_access<Score>(args)) {
    case Access::kVector:
      return launch(name, langevin_step_kernel<Access::kVector, Score>, args, grid, x);
    case Access::kChannelMinor:
      return launch(name, langevin_step_kernel<Access::kChannelMinor, Score>, args, grid, x);
    case Access::kGeneric:
      return launch(name, langevin_step_kernel<Access::kGeneric, Score>, args, grid, x);
  }
}

void langevin_step_(Tensor x, Tensor score, std::optional<Tensor> noise, double step_size,
                    std::optional<Tensor> step_size_tensor, int64_t seed, int64_t step,
                    std::optional<Tensor> step_tensor, int64_t sample_offset,
                    std::optional<double> clip) {
  const LangevinBatch batch = langevin_batch(x, score, noise);
  const LangevinArgs args = {
      batch.geometry,
      static_cast<float*>(batch.x.data),
      batch.score.data,
      batch.noise ? batch.noise->data : nullptr,
      batch.x.strides,
      batch.score.strides,
      batch.noise ? batch.noise->strides : Strides{},
      batch.noise ? batch.noise->dtype : ScalarType::Float,
      static_cast<float>(step_size),
      clip ? static_cast<float>(*clip) : std::numeric_limits<float>::infinity(),
      one_element<float>(step_size_tensor, x, "step_size_tensor"),
      one_element<int64_t>(step_tensor, x, "step_tensor"),
      philox_key(static_cast<uint64_t>(seed)),
      static_cast<uint32_t>(sample_offset),
      static_cast<uint32_t>(step),
  };
  if (x.numel() == 0) return;
  for_dtype(batch.score.dtype, [&](auto type) {
    launch_langevin_step<typename decltype(type)::type>(args, x);
  });
}

}  // namespace
}  // namespace ncsn

STABLE_TORCH_LIBRARY_IMPL(ncsn_fast, CUDA, m) {
  m.impl("langevin_step_", TORCH_BOX(&ncsn::langevin_step_));
}
