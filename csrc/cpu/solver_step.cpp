// solver_step_ for the CPU: noise, update and memory in one pass over blocks that stay in the first cache.

#include "common/solver_step.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "common/batch.h"
#include "cpu/element_blocks.h"
#include "cpu/multiversion.h"
#include "cpu/noise.h"
#include "cpu/threads.h"

namespace ncsn {
namespace {

using torch::stable::Tensor;

// Consecutive float32 elements.
struct Update {
  float* x;
  const float *score, *z;
  float* previous;  // null: there is none
  int64_t n;
  SolverRow row;

  template <bool kFma>
  NCSN_KERNEL void run() const {
    if (previous == nullptr) {
      for (int64_t i = 0; i < n; ++i) x[i] = solver_update(row, x[i], score[i], z[i]);
      return;
    }
    for (int64_t i = 0; i < n; ++i) {
      const float old = x[i];
      x[i] = multistep_update(row, old, score[i], previous[i], z[i]);
      previous[i] = solver_memory(row, old, score[i]);
    }
  }
};

// A block that is written too: in place, or as a copy in `buffer` that must be stored.
float* load_to_write(const Operand& from, const Geometry& geometry, int64_t sample, int64_t first,
                     int64_t last, float* buffer) {
  const float* at = load(from, geometry, sample, first, last, buffer);
  return at == buffer ? buffer : static_cast<float*>(from.data) + (at - static_cast<float*>(from.data));
}

void solver_step_(Tensor x, Tensor score, std::optional<Tensor> previous, Tensor table,
                  int64_t level, std::optional<Tensor> level_tensor, bool noisy, int64_t seed,
                  int64_t step, std::optional<Tensor> step_tensor, int64_t sample_offset) {
  const SolverBatch batch = solver_batch(x, score, previous, table);
  const Geometry& geometry = batch.geometry;
  const int64_t* device_level = one_element<int64_t>(level_tensor, x, "level_tensor");
  const int64_t* device_step = one_element<int64_t>(step_tensor, x, "step_tensor");
  const SolverRow row =
      solver_row(batch.table, batch.rows, device_level ? *device_level : level);
  const uint32_t step_word = static_cast<uint32_t>(device_step ? *device_step : step);
  const PhiloxKey key = philox_key(static_cast<uint64_t>(seed));

  const int64_t blocks = (geometry.elements() + kBlock - 1) / kBlock;  // of a sample
  parallel_for(
      geometry.samples * blocks, kBlocksPerTask, [&](int64_t begin, int64_t end) {
        alignas(64) float z[kBlock] = {}, score_buffer[kBlock], x_buffer[kBlock], old_buffer[kBlock];
        for (int64_t i = begin; i < end; ++i) {
          const int64_t sample = i / blocks, first = (i % blocks) * kBlock;
          const int64_t last = std::min(first + kBlock, geometry.elements());
          if (noisy) {
            const PhiloxCounter counter = {static_cast<uint32_t>(first / 4),
                                           static_cast<uint32_t>(sample_offset + sample),
                                           step_word, kStreamLangevin};
            fill_noise(Noise::kNormal, key, counter, (last - first + 3) / 4, z);
          }
          const float* s = load(batch.score, geometry, sample, first, last, score_buffer);
          float* const state = load_to_write(batch.x, geometry, sample, first, last, x_buffer);
          float* memory = nullptr;
          if (batch.previous) {
            memory = load_to_write(*batch.previous, geometry, sample, first, last, old_buffer);
          }
          run_simd(Update{state, s, z, memory, last - first, row});
          if (state == x_buffer) store(x_buffer, batch.x, geometry, sample, first, last);
          if (memory == old_buffer) {
            store(old_buffer, *batch.previous, geometry, sample, first, last);
          }
        }
      });
}

}  // namespace
}  // namespace ncsn

STABLE_TORCH_LIBRARY_IMPL(ncsn_fast, CPU, m) {
  m.impl("solver_step_", TORCH_BOX(&ncsn::solver_step_));
}
