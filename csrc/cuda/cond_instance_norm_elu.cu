// cond_instance_norm_elu and its gradient on CUDA: the operators, their memory, and the order of their launches.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <map>
#include <mutex>
#include <optional>
#include <tuple>

#include "common/norm_batch.h"
#include "cuda/cond_instance_norm_elu_launch.h"
#include "cuda/launch.h"

namespace ncsn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename A>
__global__ void __launch_bounds__(kMiddleThreads, 1)
    affine_kernel(const __grid_constant__ MiddleArgs<A> args) {
  affine_block<A>(args, this_thread(shared_memory));
}

template <typename A>
__global__ void __launch_bounds__(kMiddleThreads, 1)
    gradient_kernel(const __grid_constant__ MiddleArgs<A> args) {
  gradient_block<A>(args, this_thread(shared_memory));
}

template <typename A>
__global__ void __launch_bounds__(kWeightColumns * kWeightStrands)
    grad_weight_kernel(const __grid_constant__ GradWeightArgs<A> args) {
  grad_weight_block<A>(args, this_thread(shared_memory));
}

// Whether the code that runs on a device knows clusters: it may be an older architecture's, compiled by the driver.
bool code_has_clusters(int device) {
  static std::mutex mutex;
  static std::map<int, bool> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  const torch::stable::accelerator::DeviceGuard guard(device);
  cudaFuncAttributes code = {};
  check_cuda(cudaFuncGetAttributes(&code, affine_kernel<float>), "asking for a kernel", device);
  return known[device] = code.ptxVersion >= 90;
}

DeviceLimits device_limits(const Tensor& x) {
  const int device = x.get_device_index();
  return {device_attribute<cudaDevAttrMultiProcessorCount>(device),
          device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(device),
          device_attribute<cudaDevAttrClusterLaunch>(device) != 0 && code_has_clusters(device)};
}

WeightTable weight_table(const Tensor& labels, const Tensor& weight, int64_t channels) {
  return {weight.const_data_ptr(),
          weight.scalar_type(),
          weight.size(0),
          weight.size(1),
          weight.stride(0),
          weight.stride(1),
          labels.const_data_ptr<int64_t>(),
          labels.size(0) == 1 ? 0 : labels.stride(0),
          channels};
}

bool is_aligned(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0; }

template <typename T>
PlaneTiling tiling_of(const Tensor& x, const Geometry& g, bool aligned, int tensors, bool whole) {
  const bool last = taken_as_last(g, is_contiguous(x));
  return tile_planes(g, last, vector_width<T>(g, last, aligned), sizeof(T), tensors, whole,
                     device_limits(x));
}

// One allocation, handed out in pieces.
template <typename A>
class Workspace {
 public:
  Workspace(const Tensor& x, int64_t numbers)
      : memory_(torch::stable::new_empty(x, {numbers}, statistics_dtype(x.scalar_type()))),
        next_(memory_.mutable_data_ptr<A>()) {}

  A* take(int64_t numbers) {
    A* const piece = next_;
    next_ += numbers;
    return piece;
  }

 private:
  Tensor memory_;
  A* next_;
};

template <typename A>
LaunchShape middle_shape(const MiddleArgs<A>& args) {
  return {blocks_of(divide_up(args.weight.channels, args.block_channels()),
                    args.tiling.geometry.samples),
          dim3(kMiddleThreads), kMiddleMemory};
}

// y, mean and rstd of x; or of the sum, whose terms are bias and residual, if it is to be written to z.
std::tuple<Tensor, Tensor, Tensor> normalise(const char* name, const Tensor& x, const Tensor& labels,
                                             const Tensor& weight, double eps, bool elu,
                                             const Tensor* bias = nullptr,
                                             const Tensor* residual = nullptr,
                                             Tensor* z = nullptr) {
  const Geometry g = check_norm(x, labels, weight);
  const ScalarType statistics = statistics_dtype(x.scalar_type());
  Tensor y = torch::stable::empty_like(x);
  Tensor mean = torch::stable::new_empty(x, {g.samples, g.channels}, statistics);
  Tensor rstd = torch::stable::new_empty(x, {g.samples, g.channels}, statistics);
  if (x.numel() == 0) return {y, mean, rstd};
  const WeightTable table = weight_table(labels, weight, g.channels);
  for_dtype(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Accumulator<T>;
    NormForwardArgs<T> args = {};
    bool aligned = is_aligned(x) && is_aligned(y);
    for (const Tensor* t : {residual, static_cast<const Tensor*>(z)}) {
      if (t) aligned = aligned && is_aligned(*t);
    }
    args.tiling = tiling_of<T>(x, g, aligned, 1, !table.plusplus());
    args.weight = table;
    args.planes.mean = mean.mutable_data_ptr<A>();
    args.planes.rstd = rstd.mutable_data_ptr<A>();
    args.x = static_cast<const T*>(x.const_data_ptr());
    args.y = static_cast<T*>(y.mutable_data_ptr());
    args.eps = static_cast<A>(eps);
    args.elu = elu;
    if (bias) {
      args.sum.bias = bias->const_data_ptr();
      args.sum.bias_dtype = bias->scalar_type();
    }
    if (residual) args.sum.residual = static_cast<const T*>(residual->const_data_ptr());
    if (z) args.sum.z = static_cast<T*>(z->mutable_data_ptr());
    if (args.tiling.spread != Spread::kSplit) return launch_norm_forward<T>(Pass::kWhole, args, x);

    const int64_t planes = g.samples * g.channels, parts = planes * args.tiling.chunks;
    Workspace<A> workspace(x, 2 * planes + kForwardParts * parts);
    args.planes.scale = workspace.take(planes);
    args.planes.shift = workspace.take(planes);
    args.planes.parts = workspace.take(kForwardParts * parts);
    launch_norm_forward<T>(Pass::kWhole, args, x);
    const MiddleArgs<A> middle = {args.tiling, table, args.planes, args.eps, true};
    launch(name, affine_kernel<A>, middle_shape(middle), x, middle);
    if (z) args.x = args.sum.z;
    launch_norm_forward<T>(Pass::kApply, args, x);
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> cond_instance_norm_elu(Tensor x, Tensor labels, Tensor weight,
                                                          double eps, bool elu) {
  return normalise("cond_instance_norm_elu", x, labels, weight, eps, elu);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_norm_elu(Tensor x, std::optional<Tensor> bias,
                                                        std::optional<Tensor> residual,
                                                        Tensor labels, Tensor weight, double eps,
                                                        bool elu) {
  const Geometry g = check_norm(x, labels, weight);
  if (bias) {
    STD_TORCH_CHECK(is_floating(bias->scalar_type()) && bias->dim() == 1 &&
                        bias->size(0) == g.channels && is_contiguous(*bias) &&
                        bias->device() == x.device(),
                    "bias must be floating point and contiguous, of shape (", g.channels,
                    ",), on the device of x");
  }
  if (residual) {
    check_like(*residual, x, "residual");
    STD_TORCH_CHECK(residual->scalar_type() == x.scalar_type(), "residual must have the dtype of x");
    residual = in_layout_of(x, *residual);
  }
  Tensor z = torch::stable::empty_like(x);
  auto [y, mean, rstd] = normalise("add_norm_elu", x, labels, weight, eps, elu,
                                   bias ? &*bias : nullptr, residual ? &*residual : nullptr, &z);
  return {z, y, mean, rstd};
}

std::tuple<Tensor, Tensor> cond_instance_norm_elu_backward(Tensor grad_y, Tensor x, Tensor labels,
                                                           Tensor weight, Tensor mean, Tensor rstd,
                                                           bool elu) {
  const char* name = "cond_instance_norm_elu_backward";
  const Geometry g = check_norm(x, labels, weight);
  check_norm_gradient(grad_y, x);
  const void* means = statistics_data(mean, x, "mean");
  const void* rstds = statistics_data(rstd, x, "rstd");
  const Tensor grad = in_layout_of(x, grad_y);
  Tensor grad_x = torch::stable::empty_like(x);
  Tensor grad_weight = torch::stable::new_empty(weight, {weight.size(0), weight.size(1)});
  if (grad_weight.numel() == 0) return {grad_x, grad_weight};
  const WeightTable table = weight_table(labels, weight, g.channels);
  for_dtype(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Accumulator<T>;
    NormBackwardArgs<T> args = {};
    const bool aligned = is_aligned(x) && is_aligned(grad) && is_aligned(grad_x);
    args.tiling = tiling_of<T>(x, g, aligned, 2, !table.plusplus());
    const bool split = args.tiling.spread == Spread::kSplit;
    const int64_t planes = g.samples * g.channels, rows = g.samples * table.columns;
    const int64_t parts = split ? kBackwardParts * planes * args.tiling.chunks : 0;
    Workspace<A> workspace(x, rows + (split ? 5 * planes : 0) + parts);
    args.weight = table;
    args.planes.mean = static_cast<A*>(const_cast<void*>(means));  // read only
    args.planes.rstd = static_cast<A*>(const_cast<void*>(rstds));
    args.planes.rows = workspace.take(rows);
    args.x = static_cast<const T*>(x.const_data_ptr());
    args.grad_y = static_cast<const T*>(grad.const_data_ptr());
    args.grad_x = static_cast<T*>(grad_x.mutable_data_ptr());
    args.elu = elu;
    if (x.numel() > 0 && !split) {
      launch_norm_backward<T>(Pass::kWhole, args, x);
    } else if (x.numel() > 0) {
      for (A** array : {&args.planes.scale, &args.planes.shift, &args.planes.average,
                        &args.planes.slope, &args.planes.through_mean}) {
        *array = workspace.take(planes);
      }
      args.planes.parts = workspace.take(parts);
      const MiddleArgs<A> middle = {args.tiling, table, args.planes, A(0), false};
      launch(name, affine_kernel<A>, middle_shape(middle), x, middle);
      launch_norm_backward<T>(Pass::kWhole, args, x);
      launch(name, gradient_kernel<A>, middle_shape(middle), x, middle);
      launch_norm_backward<T>(Pass::kApply, args, x);
    }
    const GradWeightArgs<A> sums = {table, g.samples, args.planes.rows,
                                    grad_weight.mutable_data_ptr()};
    const LaunchShape shape = {blocks_of(divide_up(table.columns, kWeightColumns), table.rows),
                               dim3(kWeightColumns, kWeightStrands),
                               grad_weight_memory(sizeof(A))};
    launch(name, grad_weight_kernel<A>, shape, x, sums);
  });
  return {grad_x, grad_weight};
}

}  // namespace
}  // namespace ncsn

STABLE_TORCH_LIBRARY_IMPL(ncsn_fast, CUDA, m) {
  m.impl("add_norm_elu", TORCH_BOX(&ncsn::add_norm_elu));
  m.impl("cond_instance_norm_elu", TORCH_BOX(&ncsn::cond_instance_norm_elu));
  m.impl("cond_instance_norm_elu_backward", TORCH_BOX(&ncsn::cond_instance_norm_elu_backward));
}
