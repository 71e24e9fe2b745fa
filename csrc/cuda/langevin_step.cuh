// One thread of langevin_step_, as a function that also runs on the host (the tests walk it there).

#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include "common/langevin_step.h"
#include "cuda/grid.h"

namespace ncsn {

struct LangevinArgs {
  Geometry geometry;
  float* x;
  const void* score;  // of the type that the kernel is compiled for
  const void* noise;  // of noise_type; null: drawn from the stream
  Strides x_strides, score_strides, noise_strides;
  torch::headeronly::ScalarType noise_type;
  float step_size, clip;         // clip = infinity for none
  const float* step_size_ptr;    // on the device; replaces step_size if not null
  const int64_t* step_ptr;       // on the device; replaces step if not null
  PhiloxKey key;
  uint32_t sample_offset, step;
};

// Explicit noise is for tests and unusual samplers: one kernel for all its types, by a uniform branch.
template <Access access>
NCSN_HD Quad load_noise(const LangevinArgs& args, int64_t sample, const Group& group) {
  using torch::headeronly::ScalarType;
  const Strides& strides = args.noise_strides;
  switch (args.noise_type) {
    case ScalarType::BFloat16:
      return load_group<access>(static_cast<const torch::headeronly::BFloat16*>(args.noise),
                                strides, sample, group);
    case ScalarType::Half:
      return load_group<access>(static_cast<const torch::headeronly::Half*>(args.noise), strides,
                                sample, group);
    case ScalarType::Double:
      return load_group<access>(static_cast<const double*>(args.noise), strides, sample, group);
    default:
      return load_group<access>(static_cast<const float*>(args.noise), strides, sample, group);
  }
}

template <Access access, typename Score>
NCSN_HD void langevin_step_thread(const LangevinArgs& args, const ThreadWork& work) {
  if (work.item >= args.geometry.groups()) return;
  const Group group = group_of<access>(args.geometry, work.item);
  const float step_size = args.step_size_ptr != nullptr ? *args.step_size_ptr : args.step_size;
  const uint32_t step =
      args.step_ptr != nullptr ? static_cast<uint32_t>(*args.step_ptr) : args.step;
  const float noise_scale = langevin_noise_scale(step_size);
  for (int64_t n = work.sample; n < args.geometry.samples; n += work.sample_stride) {
    const Quad x = load_group<access>(args.x, args.x_strides, n, group);
    const Quad score =
        load_group<access>(static_cast<const Score*>(args.score), args.score_strides, n, group);
    const Quad z =
        args.noise != nullptr
            ? load_noise<access>(args, n, group)
            : normal4(philox4x32_10({static_cast<uint32_t>(group.index),
                                     args.sample_offset + static_cast<uint32_t>(n), step,
                                     kStreamLangevin},
                                    args.key));
    store_group<access>(
        args.x, args.x_strides, n, group,
        Packed<float>{{langevin_update(x.v0, score.v0, z.v0, step_size, noise_scale, args.clip),
                       langevin_update(x.v1, score.v1, z.v1, step_size, noise_scale, args.clip),
                       langevin_update(x.v2, score.v2, z.v2, step_size, noise_scale, args.clip),
                       langevin_update(x.v3, score.v3, z.v3, step_size, noise_scale, args.clip)}});
  }
}

template <typename Score>
Access langevin_access(const LangevinArgs& args) {
  using torch::headeronly::ScalarType;
  const Geometry& g = args.geometry;
  const size_t noise_bytes = args.noise_type == ScalarType::BFloat16 ||
                                     args.noise_type == ScalarType::Half
                                 ? alignof(Packed<uint16_t>)
                                 : alignof(Packed<float>);
  const bool packable = is_packable(args.x) && is_packable(static_cast<const Score*>(args.score)) &&
                        reinterpret_cast<uintptr_t>(args.noise) % noise_bytes == 0;
  // One channel: every tensor is flat.
  if (g.channels == 1 && g.spatial % 4 == 0 && packable) return Access::kVector;
  if (args.x_strides.spatial != 1 && g.spatial % 4 == 0) return Access::kChannelMinor;
  return Access::kGeneric;
}

}  // namespace ncsn
