// The statistics of channels_last float32 planes, for a norm that the convolution applies as it reads. (The norm alone
// has its own way, for every dtype and layout: cpu/planes.h.)

#pragma once

#include <algorithm>
#include <cmath>
#include <memory>

#include "common/elu.h"  // multiply_add
#include "cpu/cond_instance_norm_elu.h"
#include "cpu/multiversion.h"

namespace ncsn {

constexpr int64_t kBlockPixels = 256;

// For a block of pixels and every channel: the mean, and the sums of x - mean and of its square. The first sum is the
// error of the mean; with it the blocks are put together as if each mean were exact (Chan, Golub, LeVeque, 1983).
struct BlockStatistics {
  const float* x;
  int64_t pixels, channels;
  float *mean, *sum, *squares;

  template <bool kFma, int kBlock>
  NCSN_KERNEL void block(int64_t c) const {
    float m[kBlock] = {}, s[kBlock] = {}, q[kBlock] = {};
    for (int64_t p = 0; p < pixels; ++p) {
      const float* const row = x + p * channels + c;
      for (int i = 0; i < kBlock; ++i) m[i] += row[i];
    }
    for (int i = 0; i < kBlock; ++i) m[i] /= static_cast<float>(pixels);
    for (int64_t p = 0; p < pixels; ++p) {
      const float* const row = x + p * channels + c;
      for (int i = 0; i < kBlock; ++i) {
        const float d = row[i] - m[i];
        s[i] += d;
        q[i] = multiply_add<kFma>(d, d, q[i]);
      }
    }
    for (int i = 0; i < kBlock; ++i) mean[c + i] = m[i];
    for (int i = 0; i < kBlock; ++i) sum[c + i] = s[i];
    for (int i = 0; i < kBlock; ++i) squares[c + i] = q[i];
  }

  template <bool kFma>
  NCSN_KERNEL void run() const {
    int64_t c = 0;
    for (; c + 32 <= channels; c += 32) block<kFma, 32>(c);
    for (; c + 4 <= channels; c += 4) block<kFma, 4>(c);
    for (; c < channels; ++c) block<kFma, 1>(c);
  }
};

// The statistics of channels_last planes, in two steps: blocks of pixels in any order by any thread, then `finish`.
class Statistics {
 public:
  Statistics(const Geometry& geometry, const float* x)
      : geometry_(geometry),
        x_(x),
        blocks_((geometry.spatial + kBlockPixels - 1) / kBlockPixels),
        memory_(scratch<float>(3 * parts() * geometry.channels)) {}

  int64_t parts() const { return geometry_.samples * blocks_; }

  void measure(int64_t part) const {
    const int64_t first = part % blocks_ * kBlockPixels, channels = geometry_.channels;
    float* const out = memory_.get() + 3 * part * channels;
    run_simd(BlockStatistics{
        x_ + (part / blocks_ * geometry_.spatial + first) * channels,
        std::min(kBlockPixels, geometry_.spatial - first), channels, out, out + channels,
        out + 2 * channels});
  }

  // mean, 1 / sqrt(var + eps) and what rounding the mean has left out, of the planes of a sample.
  void finish(int64_t sample, double eps, float* mean, float* rstd, float* residue) const {
    const int64_t channels = geometry_.channels;
    const double size = static_cast<double>(geometry_.spatial);
    const float* const parts = memory_.get() + 3 * sample * blocks_ * channels;
    for (int64_t c = 0; c < channels; ++c) {
      double total = 0, squares = 0;
      for (int64_t b = 0; b < blocks_; ++b) {
        const float* const part = parts + 3 * b * channels + c;
        total += static_cast<double>(part[0]) * pixels(b) + part[channels];
      }
      const double exact = total / size;
      for (int64_t b = 0; b < blocks_; ++b) {
        const float* const part = parts + 3 * b * channels + c;
        const double error = part[channels] / pixels(b), off = part[0] + error - exact;
        squares += part[2 * channels] + pixels(b) * (off * off - error * error);
      }
      mean[c] = static_cast<float>(exact);
      rstd[c] = static_cast<float>(1 / std::sqrt(std::max(squares / size, 0.0) + eps));
      if (!(squares == squares)) rstd[c] = static_cast<float>(squares);
      residue[c] = static_cast<float>(exact - mean[c]);
    }
  }

 private:
  double pixels(int64_t block) const {
    return static_cast<double>(
        std::min(kBlockPixels, geometry_.spatial - block * kBlockPixels));
  }

  const Geometry& geometry_;
  const float* x_;
  int64_t blocks_;
  std::unique_ptr<float[]> memory_;
};

}  // namespace ncsn
