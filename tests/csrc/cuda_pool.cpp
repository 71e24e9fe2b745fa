// The launches of max_pool5 on the CPU, thread by thread, for test_cuda_max_pool5.py.

#include "cuda/max_pool5.cuh"

using namespace ncsn;
using torch::headeronly::ScalarType;

namespace {

struct Call {
  int64_t samples, channels, rows, pixels;
  int64_t contiguous, dtype, aligned, zero, multiprocessors;
  const void *x, *grad_y;
  void* out;
  uint8_t* choices;
  int64_t tiling[3];  // out: width, along, bands
};

template <typename T, int W, bool kAlong>
void run(const Call& call, const PoolTiling& t) {
  const auto* x = static_cast<const T*>(call.x);
  auto* out = static_cast<T*>(call.out);
  const bool zero = call.zero != 0;
  if (!call.grad_y) {
    const PoolForwardArgs<T> args = {t, x, out, zero};
    for (int64_t i = 0; i < t.threads(); ++i) pool_forward_thread<T, W, kAlong>(args, i);
    return;
  }
  const PoolBackwardArgs<T> args = {t, x, static_cast<const T*>(call.grad_y), out, call.choices, zero};
  for (int64_t i = 0; i < t.threads(); ++i) pool_choice_thread<T, W, kAlong>(args, i);
  for (int64_t i = 0; i < t.threads(); ++i) pool_gather_thread<T, W, kAlong>(args, i);
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
  for_dtype(types[call->dtype],
            [&](auto type) { pool_of<typename decltype(type)::type>(*call); });
}
