// philox_ on CUDA: fills a tensor with the noise stream's words, uniforms or normals.

#include <torch/csrc/stable/library.h>

#include "common/batch.h"
#include "cuda/launch.h"
#include "cuda/philox.cuh"

namespace ncsn {
namespace {

using torch::stable::Tensor;

template <Access access>
__global__ void __launch_bounds__(kThreadsPerBlock)
    philox_kernel(const __grid_constant__ PhiloxArgs args, const __grid_constant__ Grid grid) {
  philox_thread<access>(
      args, thread_work(grid, blockIdx.x, blockIdx.y, threadIdx.x, threadIdx.y));
}

void philox_(Tensor out, int64_t seed, int64_t step, int64_t sample_offset, int64_t stream,
             int64_t kind) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(kind >= 0 && kind <= 2, "kind must be 0, 1 or 2, got ", kind);
  const ScalarType expected = kind == 0 ? ScalarType::Int : ScalarType::Float;
  STD_TORCH_CHECK(out.scalar_type() == expected, "out must be ",
                  torch::headeronly::toString(expected), ", got ",
                  torch::headeronly::toString(out.scalar_type()));
  const Geometry geometry = geometry_of(out, is_contiguous(out));
  const Operand to = operand(out, geometry, "out");
  const PhiloxArgs args = {geometry,
                           static_cast<uint32_t*>(to.data),
                           to.strides,
                           philox_key(static_cast<uint64_t>(seed)),
                           static_cast<uint32_t>(sample_offset),
                           static_cast<uint32_t>(step),
                           static_cast<uint32_t>(stream),
                           static_cast<Kind>(kind)};
  if (out.numel() == 0) return;
  const Grid grid = make_grid(geometry);
  switch (philox_access(args)) {
    case Access::kVector:
      return launch("philox_", philox_kernel<Access::kVector>, args, grid, out);
    case Access::kChannelMinor:
      return launch("philox_", philox_kernel<Access::kChannelMinor>, args, grid, out);
    case Access::kGeneric:
      return launch("philox_", philox_kernel<Access::kGeneric>, args, grid, out);
  }
}

}  // namespace
}  // namespace ncsn

STABLE_TORCH_LIBRARY_IMPL(ncsn_fast, CUDA, m) { m.impl("philox_", TORCH_BOX(&ncsn::philox_)); }
