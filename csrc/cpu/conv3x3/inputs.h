// What a convolution reads: x, normalised, activated and padded, as the rows that a strip of tiles is made of.

#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "common/elu.h"
#include "cpu/conv3x3/memory.h"
#include "cpu/conv3x3/strips.h"
#include "cpu/multiversion.h"

namespace ncsn {

// What the convolution reads: x or (x - mean) * scale + shift, with arrays of (samples, channels); or the ELU of it.
struct ConvInput {
  const float* x;
  const float *mean, *scale, *shift;  // null without a norm
  bool elu;
};

template <bool kNorm, bool kElu>
struct InputPixels {
  const float* x;
  int64_t x_stride, pixels, channels;
  const float *mean, *scale, *shift;
  float* out;
  int64_t out_stride;
  int64_t ahead;  // elements to what is read some rows later

  // In the order of the memory, which is what processors fetch ahead.
  template <bool kFma>
  NCSN_KERNEL void run() const {
    for (int64_t p = 0; p < pixels; ++p) {
      const float* const from = x + p * x_stride;
      float* const to = out + p * out_stride;
      const auto soon = reinterpret_cast<uintptr_t>(from) + static_cast<uintptr_t>(ahead * 4);
      for (int64_t c = 0; c < channels; c += 16) {  // may lie outside of the tensor
        __builtin_prefetch(reinterpret_cast<const float*>(soon) + c, 0, 2);
      }
      NCSN_INDEPENDENT
      for (int64_t c = 0; c < channels; ++c) {
        float u = from[c];
        if constexpr (kNorm) u = multiply_add<kFma>(u - mean[c], scale[c], shift[c]);
        to[c] = kElu ? elu<kFma>(u) : u;
      }
    }
  }
};

// The rows that a strip's tiles are made of, normalised, activated and padded with zeros: those of the tiles and `halo`
// more on each side. A strip below the one before it keeps what both have.
class RowRing {
 public:
  RowRing(const ConvShape& shape, const ConvInput& input, int64_t padded_channels, int64_t halo,
          int64_t longest, Use use)
      : shape_(shape),
        input_(input),
        padded_(padded_channels),
        halo_(halo),
        count_(kTile + 2 * halo),
        row_size_((longest * kTile + 2 * halo) * padded_channels),
        memory_(thread_memory(use, (count_ + 1) * row_size_)) {
    std::memset(zeros(), 0, static_cast<size_t>(row_size_) * sizeof(float));
  }

  void load(const Strip& strip, const float** rows) {
    const bool below = last_ != nullptr && strip.continues(*last_);
    for (int64_t i = 0; i < count_; ++i) {
      const int64_t row = strip.tile_row * kTile - halo_ + i;
      if (row < 0 || row >= strip.rows) {
        rows[i] = zeros();
        continue;
      }
      float* const slot = memory_ + row % count_ * row_size_;
      if (!below || i >= 2 * halo_) fill(strip, row, slot);
      rows[i] = slot;
    }
    last_ = &strip;
  }

 private:
  float* zeros() const { return memory_ + count_ * row_size_; }

  void fill(const Strip& strip, int64_t row, float* out) const {
    const int64_t d = shape_.dilation, channels = shape_.channels, padded = padded_;
    const int64_t left = strip.tile_column * kTile - halo_;
    const int64_t right = left + strip.tiles * kTile + 2 * halo_;
    const int64_t begin = std::max<int64_t>(left, 0), end = std::min(right, strip.columns);
    const auto clear = [&](int64_t from, int64_t to) {
      std::memset(out + (from - left) * padded, 0,
                  static_cast<size_t>((to - from) * padded) * sizeof(float));
    };
    clear(left, begin);
    clear(end, right);
    float* const inside = out + (begin - left) * padded;
    const int64_t y = strip.phase_row + row * d, x = strip.phase_column + begin * d;
    const float* const from =
        input_.x + ((strip.sample * shape_.height + y) * shape_.width + x) * channels;
    const int64_t at = strip.sample * channels, stride = d * channels;
    const int64_t ahead = kTile * d * shape_.width * channels;
    const auto load = [&](auto norm, auto elu) {
      const float *mean = nullptr, *scale = nullptr, *shift = nullptr;
      if constexpr (norm) {
        mean = input_.mean + at;
        scale = input_.scale + at;
        shift = input_.shift + at;
      }
      run_simd(InputPixels<norm, elu>{from, stride, end - begin, channels, mean, scale, shift,
                                      inside, padded, ahead});
    };
    constexpr std::true_type yes;
    constexpr std::false_type no;
    if (input_.mean != nullptr) {
      input_.elu ? load(yes, yes) : load(yes, no);
    } else if (input_.elu) {
      load(no, yes);
    } else {
      for (int64_t p = 0; p < end - begin; ++p) {
        std::memcpy(inside + p * padded, from + p * stride,
                    static_cast<size_t>(channels) * sizeof(float));
      }
    }
    if (channels == padded) return;
    for (int64_t p = 0; p < end - begin; ++p) {
      std::memset(inside + p * padded + channels, 0,
                  static_cast<size_t>(padded - channels) * sizeof(float));
    }
  }

  const ConvShape& shape_;
  const ConvInput& input_;
  int64_t padded_, halo_, count_, row_size_;
  float* memory_;
  const Strip* last_ = nullptr;
};

}  // namespace ncsn
