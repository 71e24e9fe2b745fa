// solver_step_ on CUDA: one pass that reads x, the score and the memory, draws the noise in registers, writes both back.

#include <torch/csrc/stable/library.h>

#include <optional>

#include "common/batch.h"
#include "common/dtype.h"
#include "cuda/launch.h"
#include "cuda/solver_step.cuh"

namespace ncsn {
namespace {

using torch::stable::Tensor;

template <Access access, typename Score>
__global__ void __launch_bounds__(kThreadsPerBlock, 4)
    solver_step_kernel(const __grid_constant__ SolverArgs args, const __grid_constant__ Grid grid) {
  solver_step_thread<access, Score>(
      args, thread_work(grid, blockIdx.x, blockIdx.y, threadIdx.x, threadIdx.y));
}

template <typename Score>
void launch_solver_step(const SolverArgs& args, const Tensor& x) {
  const Grid grid = make_grid(args.geometry);
  const char* name = "solver_step_";
  switch (solver_access<Score>(args)) {
    case Access::kVector:
      return launch(name, solver_step_kernel<Access::kVector, Score>, args, grid, x);
    case Access::kChannelMinor:
      return launch(name, solver_step_kernel<Access::kChannelMinor, Score>, args, grid, x);
    case Access::kGeneric:
      return launch(name, solver_step_kernel<Access::kGeneric, Score>, args, grid, x);
  }
}

void solver_step_(Tensor x, Tensor score, std::optional<Tensor> previous, Tensor table,
                  int64_t level, std::optional<Tensor> level_tensor, bool noisy, int64_t seed,
                  int64_t step, std::optional<Tensor> step_tensor, int64_t sample_offset) {
  const SolverBatch batch = solver_batch(x, score, previous, table);
  const SolverArgs args = {
      batch.geometry,
      static_cast<float*>(batch.x.data),
      batch.score.data,
      batch.previous ? static_cast<float*>(batch.previous->data) : nullptr,
      batch.x.strides,
      batch.score.strides,
      batch.table,
      batch.rows,
      level,
      one_element<int64_t>(level_tensor, x, "level_tensor"),
      one_element<int64_t>(step_tensor, x, "step_tensor"),
      philox_key(static_cast<uint64_t>(seed)),
      static_cast<uint32_t>(sample_offset),
      static_cast<uint32_t>(step),
      noisy,
  };
  if (x.numel() == 0) return;
  for_dtype(batch.score.dtype, [&](auto type) {
    launch_solver_step<typename decltype(type)::type>(args, x);
  });
}

}  // namespace
}  // namespace ncsn

STABLE_TORCH_LIBRARY_IMPL(ncsn_fast, CUDA, m) {
  m.impl("solver_step_", TORCH_BOX(&ncsn::solver_step_));
}
