// The launches of cond_instance_norm_elu on the CPU, thread by thread, for test_cuda_cond_instance_norm_elu.py.

#include <algorithm>

#include "cuda/cond_instance_norm_elu_backward.cuh"
#include "cuda/cond_instance_norm_elu_forward.cuh"
#include "cuda_fibres.h"

using namespace ncsn;
using fibres::Launch;
using fibres::Thread;
using torch::headeronly::ScalarType;

namespace {

constexpr ScalarType kTypes[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half,
                                 ScalarType::Double};

struct Call {
  int64_t samples, channels, spatial;
  int64_t contiguous, dtype, aligned;
  const void *x, *grad_y;
  void* out;
  const int64_t* labels;
  int64_t label_stride;
  const void* weight;
  int64_t weight_dtype, rows, columns;
  void *mean, *rstd, *grad_weight;
  double eps;
  int64_t elu;
  int64_t multiprocessors, shared_memory, clusters;  // of the device
  int64_t order, max_blocks_y;
  const void *bias, *residual;  // of add_norm_elu, whose sum goes to z
  void* z;
  int64_t bias_dtype;
  int64_t tiling[6];  // out: spread, width, teams, ranks, items, chunks
};

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
struct Emulation {
  using A = Accumulator<T>;
  Call& call;
  WeightTable table;
  PlaneTiling tiling;
  std::vector<A> memory;  // NaN, as what nobody has written

  explicit Emulation(Call& call, int tensors) : call(call) {
    const Geometry g = {call.samples, call.channels, call.spatial};
    table = {call.weight, kTypes[call.weight_dtype], call.rows, call.columns, call.columns, 1,
             call.labels, call.label_stride, call.channels};
    const bool last = taken_as_last(g, call.contiguous);
    tiling = tile_planes(g, last, vector_width<T>(g, last, call.aligned), sizeof(T), tensors,
                         !table.plusplus(),
                         {static_cast<int>(call.multiprocessors), call.shared_memory,
                          call.clusters != 0});
    const int64_t told[] = {static_cast<int64_t>(tiling.spread), tiling.width, tiling.teams,
                            tiling.ranks, tiling.items, tiling.chunks};
    std::copy(std::begin(told), std::end(told), call.tiling);
  }

  Launch over_planes(int64_t shared, bool cluster) const {
    if (shared > call.shared_memory) fibres::report("more shared memory than the device has");
    if (tiling.planes() > tiling.threads()) fibres::report("more planes than threads");
    if (tiling.threads() > kMaxThreads) fibres::report("too many threads");
    const auto teams = static_cast<unsigned>(tiling.teams), ranks = static_cast<unsigned>(tiling.ranks);
    return {static_cast<unsigned>(tiling.slabs * tiling.chunks), blocks_y(call.samples),
            tiling.last ? teams : ranks, tiling.last ? ranks : teams, shared,
            cluster ? static_cast<unsigned>(tiling.chunks) : 1u};
  }

  unsigned blocks_y(int64_t wanted) const {
    return static_cast<unsigned>(std::min(wanted, call.max_blocks_y));
  }

  Launch middle(const MiddleArgs<A>& args) const {
    return {static_cast<unsigned>(divide_up(call.channels, args.block_channels())),
            blocks_y(call.samples), kMiddleThreads, 1, kMiddleMemory};
  }

  template <typename Body>
  void run(const Launch& launch, const Body& body) const {
    fibres::run(launch, static_cast<int>(call.order), body);
  }

  A* take(std::vector<std::vector<A>>& held, int64_t numbers) const {
    held.emplace_back(static_cast<size_t>(numbers), std::numeric_limits<A>::quiet_NaN());
    return held.back().data();
  }

  void forward() {
    std::vector<std::vector<A>> held;
    const int64_t planes = call.samples * call.channels;
    NormForwardArgs<T> args = {};
    args.tiling = tiling;
    args.weight = table;
    args.planes.mean = static_cast<A*>(call.mean);
    args.planes.rstd = static_cast<A*>(call.rstd);
    args.x = static_cast<const T*>(call.x);
    args.y = static_cast<T*>(call.out);
    args.eps = static_cast<A>(call.eps);
    args.elu = call.elu != 0;
    args.sum = {call.bias, kTypes[call.bias_dtype], static_cast<const T*>(call.residual),
                static_cast<T*>(call.z)};
    const bool split = tiling.spread == Spread::kSplit;
    if (split) {
      args.planes.scale = take(held, planes);
      args.planes.shift = take(held, planes);
      args.planes.parts = take(held, planes * tiling.chunks * kForwardParts);
    }
    for_tiling<T>(tiling, [&](auto width, auto last, auto cluster) {
      run(over_planes(forward_memory(tiling, sizeof(T), sizeof(A)), cluster()),
          [&](const Thread& t) {
            args.sum.z ? norm_forward_block<T, width(), last(), cluster(), true>(args, t)
                       : norm_forward_block<T, width(), last(), cluster(), false>(args, t);
          });
      if (!split) return;
      if (args.sum.z) args.x = args.sum.z;
      const MiddleArgs<A> middle_args = {tiling, table, args.planes, args.eps, true};
      run(middle(middle_args), [&](const Thread& t) { affine_block<A>(middle_args, t); });
      run(over_planes(0, false),
          [&](const Thread& t) { norm_apply_block<T, width(), last()>(args, t); });
    });
  }

  void backward() {
    std::vector<std::vector<A>> held;
    const int64_t planes = call.samples * call.channels;
    NormBackwardArgs<T> args = {};
    args.tiling = tiling;
    args.weight = table;
    args.planes.mean = static_cast<A*>(call.mean);
    args.planes.rstd = static_cast<A*>(call.rstd);
    args.planes.rows = take(held, call.samples * call.columns);
    args.x = static_cast<const T*>(call.x);
    args.grad_y = static_cast<const T*>(call.grad_y);
    args.grad_x = static_cast<T*>(call.out);
    args.elu = call.elu != 0;
    const bool split = tiling.spread == Spread::kSplit;
    if (split) {
      for (A** array : {&args.planes.scale, &args.planes.shift, &args.planes.average,
                        &args.planes.slope, &args.planes.through_mean}) {
        *array = take(held, planes);
      }
      args.planes.parts = take(held, planes * tiling.chunks * kBackwardParts);
    }
    const MiddleArgs<A> middle_args = {tiling, table, args.planes, A(0), false};
    for_tiling<T>(tiling, [&](auto width, auto last, auto cluster) {
      if (split) run(middle(middle_args), [&](const Thread& t) { affine_block<A>(middle_args, t); });
      run(over_planes(backward_memory(tiling, sizeof(T), sizeof(A)), cluster()),
          [&](const Thread& t) { norm_backward_block<T, width(), last(), cluster()>(args, t); });
      if (!split) return;
      run(middle(middle_args), [&](const Thread& t) { gradient_block<A>(middle_args, t); });
      run(over_planes(0, false),
          [&](const Thread& t) { norm_backward_apply_block<T, width(), last()>(args, t); });
    });
    const GradWeightArgs<A> sums = {table, call.samples, args.planes.rows, call.grad_weight};
    run({static_cast<unsigned>(divide_up(call.columns, kWeightColumns)), blocks_y(call.rows),
         kWeightColumns, kWeightStrands, grad_weight_memory(sizeof(A))},
        [&](const Thread& t) { grad_weight_block<A>(sums, t); });
  }
};

// float16 is bfloat16 but for its conversions.
template <typename F>
const char* for_call(const Call& call, const F& f) {
  fibres::problem.clear();
  switch (kTypes[call.dtype]) {
    case ScalarType::Float: f(Type<float>{}); break;
    case ScalarType::Double: f(Type<double>{}); break;
    default: f(Type<torch::headeronly::BFloat16>{});
  }
  return fibres::problem.c_str();
}

}  // namespace

extern "C" const char* norm(Call* call) {
  return for_call(*call, [&](auto type) {
    using T = typename decltype(type)::type;
    Emulation<T> emulation(*call, call->grad_y ? 2 : 1);
    call->grad_y ? emulation.backward() : emulation.forward();
  });
}

// Only the tiling, for shapes of any size: whether it covers the planes, and can be launched.
extern "C" const char* tile(Call* call, int64_t tensors) {
  return for_call(*call, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Accumulator<T>;
    const Emulation<T> emulation(*call, static_cast<int>(tensors));
    const PlaneTiling& t = emulation.tiling;
    emulation.over_planes(tensors == 1 ? forward_memory(t, sizeof(T), sizeof(A))
                                       : backward_memory(t, sizeof(T), sizeof(A)),
                          t.spread == Spread::kCluster);
    const auto require = [](bool good, const char* what) {
      if (!good) fibres::report(what);
    };
    const auto is_power = [](int n) { return n > 0 && (n & (n - 1)) == 0; };
    require(is_power(t.teams) && is_power(t.ranks), "teams and ranks must be powers of two");
    require(t.threads() % static_cast<int>(kWarp) == 0, "part of a warp");
    require(t.slots * t.together == t.ranks, "ranks that are in no warp's sum");
    require(t.items * int64_t{t.ranks} >= t.span, "vectors that no thread has");
    require(t.chunks * t.span >= t.count && t.slabs * t.planes() >= call->channels, "planes left out");
    require((t.slabs - 1) * t.planes() < call->channels, "empty slabs");
    require(t.spread == Spread::kSplit || t.chunks <= kMaxCluster, "too large a cluster");
    require((t.spread == Spread::kBlock) <= (t.chunks == 1), "a block without all of its planes");
    require(t.slabs * t.chunks < int64_t{1} << 31, "too many blocks");
    require(static_cast<int64_t>(t.threads()) * t.items * t.width * int64_t{sizeof(T)} < int64_t{1} << 31,
            "offsets in shared memory beyond 32 bits");
  });
}
