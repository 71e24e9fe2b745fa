// The update of annealed Langevin dynamics for one element, shared by the CPU and the CUDA backend.
//
//     x <- clamp(x + step_size * score + sqrt(2 * step_size) * z, -clip, clip)
//
// Song, Ermon, "Generative modeling by estimating gradients of the data distribution", 2019, algorithm 1
// (their alpha is 2 * step_size). All in float32. Where x, score and z come from is the callers' business.

#pragma once

#include "common/philox.h"

namespace ncsn {

NCSN_HD float langevin_noise_scale(float step_size) { return square_root(2.0f * step_size); }

// clip = infinity leaves everything as it is. NaN stays NaN, as in torch.clamp.
NCSN_HD float langevin_update(float x, float score, float z, float step_size, float noise_scale,
                              float clip) {
  const float moved = x + step_size * score + noise_scale * z;
  const float floored = moved < -clip ? -clip : moved;
  return floored > clip ? clip : floored;
}

}  // namespace ncsn
