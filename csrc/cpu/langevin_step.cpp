// langevin_step_ for the CPU: noise, update and clamp in one pass over blocks that stay in the first cache.

#include "common/langevin_step.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <optional>

#include "common/batch.h"
#include "common/dtype.h"
#include "cpu/element_blocks.h"
#include "cpu/multiversion.h"
#include "cpu/noise.h"
#include "cpu/threads.h"

namespace ncsn {
namespace {

using torch::stable::Tensor;

struct Settings {
  float step_size, noise_scale, clip;
};

// Consecutive float32 elements.
struct Update {
  float* x;
  const float *score, *z;
  int64_t n;
  Settings settings;

  template <bool kFma>
  NCSN_KERNEL void run() const {
    for (int64_t i = 0; i < n; ++i) {
      x[i] = langevin_update(x[i], score[i], z[i], settings.step_size, settings.noise_scale,
                             settings.clip);
    }
  }
};

void langevin_step_(Tensor x, Tensor score, std::optional<Tensor> noise, double step_size,
                    std::optional<Tensor> step_size_tensor, int64_t seed, int64_t step,
                    std::optional<Tensor> step_tensor, int64_t sample_offset,
                    std::optional<double> clip) {
  const LangevinBatch batch = langevin_batch(x, score, noise);
  const Geometry& geometry = batch.geometry;
  const float* device_step_size = one_element<float>(step_size_tensor, x, "step_size_tensor");
  const int64_t* device_step = one_element<int64_t>(step_tensor, x, "step_tensor");
  const float eta = device_step_size ? *device_step_size : static_cast<float>(step_size);
  const uint32_t step_word = static_cast<uint32_t>(device_step ? *device_step : step);
  const Settings settings = {
      eta, langevin_noise_scale(eta),
      clip ? static_cast<float>(*clip) : std::numeric_limits<float>::infinity()};
  const PhiloxKey key = philox_key(static_cast<uint64_t>(seed));

  const int64_t blocks = (geometry.elements() + kBlock - 1) / kBlock;  // of a sample
  parallel_for(
      geometry.samples * blocks, kBlocksPerTask, [&](int64_t begin, int64_t end) {
        alignas(64) float noise_buffer[kBlock], score_buffer[kBlock], x_buffer[kBlock];
        for (int64_t i = begin; i < end; ++i) {
          const int64_t sample = i / blocks, first = (i % blocks) * kBlock;
          const int64_t last = std::min(first + kBlock, geometry.elements());
          const float* z = noise_buffer;
          if (batch.noise) {
            z = load(*batch.noise, geometry, sample, first, last, noise_buffer);
          } else {
            const PhiloxCounter counter = {static_cast<uint32_t>(first / 4),
                                           static_cast<uint32_t>(sample_offset + sample),
                                           step_word, kStreamLangevin};
            fill_noise(Noise::kNormal, key, counter, (last - first + 3) / 4, noise_buffer);
          }
          const float* s = load(batch.score, geometry, sample, first, last, score_buffer);
          const float* old = load(batch.x, geometry, sample, first, last, x_buffer);
          float* const data = static_cast<float*>(batch.x.data);
          if (old != x_buffer) {
            run_simd(Update{data + (old - data), s, z, last - first, settings});
            continue;
          }
          run_simd(Update{x_buffer, s, z, last - first, settings});
          store(x_buffer, batch.x, geometry, sample, first, last);
        }
      });
}

}  // namespace
}  // namespace ncsn

STABLE_TORCH_LIBRARY_IMPL(ncsn_fast, CPU, m) {
  m.impl("langevin_step_", TORCH_BOX(&ncsn::langevin_step_));
}
