// philox_ for the CPU: fills a tensor with bits, uniforms or normals of the noise stream.

#include "common/philox.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "common/batch.h"
#include "cpu/noise.h"
#include "cpu/threads.h"

namespace ncsn {
namespace {

constexpr int64_t kBlockGroups = 256;
constexpr int64_t kBlock = 4 * kBlockGroups;
constexpr int64_t kBlocksPerTask = 4;

void philox_(torch::stable::Tensor out, int64_t seed, int64_t step, int64_t sample_offset,
             int64_t stream, int64_t kind) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(kind >= 0 && kind <= 2, "kind must be 0, 1 or 2, got ", kind);
  const Noise noise = static_cast<Noise>(kind);
  const ScalarType expected = noise == Noise::kBits ? ScalarType::Int : ScalarType::Float;
  STD_TORCH_CHECK(out.scalar_type() == expected, "out must be ",
                  torch::headeronly::toString(expected), ", got ",
                  torch::headeronly::toString(out.scalar_type()));
  const Geometry geometry = geometry_of(out, is_contiguous(out));
  const Operand to = operand(out, geometry, "out");
  // Bits travel as floats: they are only copied.
  float* const data = static_cast<float*>(to.data);
  const PhiloxKey key = philox_key(static_cast<uint64_t>(seed));

  const int64_t blocks = (geometry.elements() + kBlock - 1) / kBlock;  // of a sample
  parallel_for(geometry.samples * blocks, kBlocksPerTask, [&](int64_t begin, int64_t end) {
    alignas(64) float buffer[kBlock];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sample = i / blocks, first = (i % blocks) * kBlock;
      const int64_t n = std::min(kBlock, geometry.elements() - first);
      const PhiloxCounter counter = {static_cast<uint32_t>(first / 4),
                                     static_cast<uint32_t>(sample_offset + sample),
                                     static_cast<uint32_t>(step),
                                     static_cast<uint32_t>(stream)};
      fill_noise(noise, key, counter, (n + 3) / 4, buffer);
      Place place = place_of(geometry, first);
      for (int64_t j = 0; j < n; ++j, place = next_place(geometry, place)) {
        std::memcpy(data + offset_of(to.strides, sample, place), buffer + j, sizeof(float));
      }
    }
  });
}

}  // namespace
}  // namespace ncsn

STABLE_TORCH_LIBRARY_IMPL(ncsn_fast, CPU, m) {
  m.impl("philox_", TORCH_BOX(&ncsn::philox_));
}
