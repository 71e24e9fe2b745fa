// The weights of a convolution, of any strides, and their transforms, which the products read.

#pragma once

#include <algorithm>

#include "cpu/conv3x3/memory.h"
#include "cpu/conv3x3/strips.h"

namespace ncsn {

// Weights g(output, channel, row, column), of any strides; side x side taps.
struct ConvWeights {
  const float* data;
  int64_t output, channel, row, column;  // strides
  int64_t side;

  int64_t taps() const { return side * side; }

  // Those of the gradient: outputs and channels change places, rows and columns run backwards.
  ConvWeights transposed() const {
    return {data + (side - 1) * (row + column), channel, output, -row, -column, side};
  }

  // To g[channel][tap][output of the panel]: `depth` channels from `first` on and the outputs of panel p, of all that
  // are; where these end, zeros.
  void gather(const ConvKernels& kernels, int64_t p, int64_t all_outputs, int64_t first,
              int64_t depth, float* g) const {
    const int64_t width = kernels.panel, outputs = std::min(width, all_outputs - p * width);
    const float* const from = data + p * width * output + first * channel;
    const bool consecutive_taps = channel == taps() && row == side && column == 1;
    if (outputs == width && consecutive_taps) {
      return kernels.transpose_panel(from, output, depth * taps(), g, width);
    }
    for (int64_t tap = 0; tap < taps(); ++tap) {
      const float* const of_tap = from + tap / side * row + tap % side * column;
      float* to = g + tap * width;
      if (outputs == width && channel == 1) {
        // channels_last: short runs far apart, of which no processor foresees the next.
        for (int64_t o = 0; o < width; ++o) __builtin_prefetch(of_tap + o * output + depth, 0, 2);
        kernels.transpose_panel(of_tap, output, depth, to, taps() * width);
        continue;
      }
      for (int64_t k = 0; k < depth; ++k, to += taps() * width) {
        for (int64_t o = 0; o < outputs; ++o) to[o] = of_tap[k * channel + o * output];
        for (int64_t o = outputs; o < width; ++o) to[o] = 0;
      }
    }
  }
};

// The transformed weights of a convolution, by panels and parts of panels: u[panel][position][channel][output of the
// panel], each position padded to `position()` elements.
//
// They are transformed on every call, so that nothing can go stale, unless the caller has kept them from an earlier one.
class PackedWeights {
 public:
  PackedWeights(const ConvShape& shape, const ConvWeights& weights, const float* kept = nullptr)
      : kernels_(conv_kernels()), shape_(shape), weights_(weights), kept_(kept) {}

  int64_t panels() const { return (shape_.outputs + kernels_.panel - 1) / kernels_.panel; }
  int64_t position() const { return position_stride(shape_.channels, kernels_.panel); }
  int64_t panel_size() const { return kPositions * position(); }

  // What was kept, or null.
  const float* kept() const { return kept_; }

  // The parts, which any thread packs; none if they were kept.
  int64_t parts() const { return kept_ == nullptr ? panels() * parts_of_panel() : 0; }

  void pack(int64_t part, float* u) const {
    const int64_t p = part / parts_of_panel();
    pack_part(p, part % parts_of_panel(), u + p * panel_size());
  }

  // Panel p alone, to u[position][channel][output of the panel].
  void pack_panel(int64_t p, float* u) const {
    for (int64_t part = 0; part < parts_of_panel(); ++part) pack_part(p, part, u);
  }

 private:
  static constexpr int64_t kPart = 16;  // channels

  void pack_part(int64_t p, int64_t part, float* u) const {
    const int64_t first = part * kPart, depth = std::min(kPart, shape_.channels - first);
    float* const g = thread_memory(Use::kTaps, kPart * 9 * kernels_.panel);
    weights_.gather(kernels_, p, shape_.outputs, first, depth, g);
    kernels_.transform_weights(g, depth, u + first * kernels_.panel, position());
  }

  int64_t parts_of_panel() const { return (shape_.channels + kPart - 1) / kPart; }

  const ConvKernels& kernels_;
  const ConvShape& shape_;
  ConvWeights weights_;
  const float* kept_;
};

}  // namespace ncsn
