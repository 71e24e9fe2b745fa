// The weights of a convolution, of any strides, and their transforms, which the products read.

#pragma once

#include <algorithm>

#include "cpu/conv3x3/memory.h"
#include "cpu/conv3x3/strips.h"

namespace ncsn {

// Weights g(output, channel, row, column), of any strides.
struct ConvWeights {
  const float* data;
  int64_t output, channel, row, column;  // strides

  bool contiguous_taps() const { return channel == 9 && row == 3 && column == 1; }

  // Those of the gradient: outputs and channels change places, rows and columns run backwards.
  ConvWeights transposed() const {
    return {data + 2 * row + 2 * column, channel, output, -row, -column};
  }
};

// The transformed weights of a convolution, by panels and parts of panels.
//
// They are transformed on every call: nothing can go stale. A cache of them would be four times as large as the weights,
// and where it is not in a processor's cache, reading it takes as long as this does.
class PackedWeights {
 public:
  PackedWeights(const ConvShape& shape, const ConvWeights& weights)
      : kernels_(conv_kernels()), shape_(shape), weights_(weights) {}

  int64_t panels() const { return (shape_.outputs + kernels_.panel - 1) / kernels_.panel; }
  int64_t parts_of_panel() const { return (shape_.channels + kPart - 1) / kPart; }
  int64_t position() const { return position_stride(shape_.channels, kernels_.panel); }
  int64_t panel_size() const { return kPositions * position(); }

  // Part `part` of panel p, to u, which begins with the panel.
  void pack(int64_t p, int64_t part, float* u) const {
    const int64_t width = kernels_.panel, first = part * kPart;
    const int64_t depth = std::min(kPart, shape_.channels - first);
    const int64_t outputs = std::min(width, shape_.outputs - p * width);
    float* const g = thread_memory(Use::kTaps, kPart * 9 * width);
    const float* const from = weights_.data + p * width * weights_.output + first * weights_.channel;
    if (weights_.contiguous_taps() && outputs == width) {
      kernels_.transpose_panel(from, weights_.output, depth * 9, g);
    } else {
      gather(from, depth, outputs, g);
    }
    kernels_.transform_weights(g, depth, u + first * width, position());
  }

 private:
  static constexpr int64_t kPart = 16;  // channels

  void gather(const float* from, int64_t depth, int64_t outputs, float* g) const {
    const ConvWeights& w = weights_;
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t tap = 0; tap < 9; ++tap, g += kernels_.panel) {
        const float* const of_tap = from + k * w.channel + tap / 3 * w.row + tap % 3 * w.column;
        for (int64_t o = 0; o < outputs; ++o) g[o] = of_tap[o * w.output];
        for (int64_t o = outputs; o < kernels_.panel; ++o) g[o] = 0;
      }
    }
  }

  const ConvKernels& kernels_;
  const ConvShape& shape_;
  ConvWeights weights_;
};

}  // namespace ncsn
