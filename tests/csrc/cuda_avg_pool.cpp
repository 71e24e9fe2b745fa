// The launch of avg_pool5 on the CPU, thread by thread, for test_cuda_avg_pool5.py.

#include <algorithm>
#include <iterator>

#include "cuda/avg_pool5.cuh"

using namespace ncsn;
using torch::headeronly::ScalarType;

namespace {

struct Call {
  int64_t samples, channels, rows, pixels;
  int64_t contiguous, dtype, aligned, multiprocessors;
  const void* x;
  void* y;
  int64_t tiling[3];  // out: width, along, bands
};

template <typename T, int W, bool kAlong>
void run(const Call& call, const PoolTiling& t) {
  const MeanPoolArgs<T> args = {t, static_cast<const T*>(call.x), static_cast<T*>(call.y)};
  for (int64_t i = 0; i < t.threads(); ++i) mean_pool_thread<T, W, kAlong>(args, i);
}

template <typename T>
void pool_of(Call& call) {
  const PoolTiling t =
      tile_pool<T>(call.samples, call.channels, call.rows, call.pixels, call.contiguous != 0,
                   call.aligned != 0, static_cast<int>(call.multiprocessors));
  const int64_t told[] = {t.width, t.along, t.bands};
  std::copy(std::begin(told), std::end(told), call.tiling);
  for_tiling<T>(t, [&](auto width, auto along) { run<T, width, along>(call, t); });
}

}  // namespace

extern "C" void pool(Call* call) {
  const ScalarType types[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half,
                              ScalarType::Double};
  for_dtype(types[call->dtype], [&](auto type) { pool_of<typename decltype(type)::type>(*call); });
}
