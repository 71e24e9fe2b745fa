// conv_direct for the CPU: a convolution of 3x3 or 1x1 taps, for the shapes where Winograd's algorithm does not pay.
//
// Pixels, some at a time, are copied into patches (of each tap, its channels), and these are multiplied by the weights.
// Taps that lie in the padding for all of these pixels are left out. Every number is made by the same operations in the
// same order whatever the batch, its neighbours and the number of threads: the pixels are cut within their sample, and
// rows of a product do not depend on each other.

// Changes no result. Else GCC keeps comparisons of floating-point numbers as branches, and loops stay scalar.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-trapping-math")
#endif

#include <vector>

#include "cpu/cond_instance_norm_elu.h"
#include "cpu/conv3x3/arguments.h"
#include "cpu/conv3x3/inputs.h"

namespace ncsn {
namespace {

class DirectConvolver {
 public:
  DirectConvolver(const ConvCall& call, const float* x, float* y)
      : kernels_(conv_kernels()),
        call_(call),
        s_(call.shape),
        x_(x),
        y_(y),
        panels_((s_.outputs + kernels_.panel - 1) / kernels_.panel),
        panel_size_(call.weights.taps() * s_.channels * kernels_.panel),
        u_(thread_memory(Use::kWeights, panels_ * panel_size_)),
        bias_(static_cast<size_t>(panels_ * kernels_.panel)) {
    if (call.bias != nullptr) std::copy_n(call.bias, s_.outputs, bias_.begin());
  }

  void run() const {
    const int64_t parts = (s_.channels + kPart - 1) / kPart;
    parallel_each(panels_ * parts, [&](int64_t i) { pack(i / parts, i % parts * kPart); });
    const int64_t pixels = s_.height * s_.width, chunks = (pixels + kPixels - 1) / kPixels;
    parallel_each(s_.samples * chunks, [&](int64_t i) {
      const int64_t first = i % chunks * kPixels;
      convolve(i / chunks, first, std::min(first + kPixels, pixels));
    });
  }

 private:
  static constexpr int64_t kPart = 16;    // channels
  static constexpr int64_t kPixels = 56;  // at a time: a multiple of the kernels' blocks of 14, almost of 6

  void pack(int64_t panel, int64_t first) const {
    const int64_t width = kernels_.panel, taps = call_.weights.taps();
    const int64_t depth = std::min(kPart, s_.channels - first);
    float* const g = thread_memory(Use::kTaps, kPart * 9 * width);
    call_.weights.gather(kernels_, panel, s_.outputs, first, depth, g);
    float* const u = u_ + panel * panel_size_ + first * width;
    for (int64_t t = 0; t < taps; ++t) {
      for (int64_t c = 0; c < depth; ++c) {
        std::copy_n(g + (c * taps + t) * width, width, u + (t * s_.channels + c) * width);
      }
    }
  }

  // The pixels first .. last - 1 of a sample.
  void convolve(int64_t sample, int64_t first, int64_t last) const {
    const int64_t side = call_.weights.side, middle = side / 2, d = s_.dilation;
    const int64_t top = first / s_.width, bottom = (last - 1) / s_.width;
    int64_t tap[9], taps = 0;
    for (int64_t t = 0; t < side * side; ++t) {
      const int64_t down = (t / side - middle) * d, right = (t % side - middle) * d;
      const bool rows = bottom + down >= 0 && top + down < s_.height;
      if (rows && -s_.width < right && right < s_.width) tap[taps++] = t;
    }
    float* const v = thread_memory(Use::kPatches, kPixels * 9 * s_.channels);
    for (int64_t i = 0; i < taps; ++i) {
      copy_tap(sample, first, last, (tap[i] / side - middle) * d, (tap[i] % side - middle) * d,
               v + i * s_.channels, taps * s_.channels);
    }
    const int64_t at = (sample * s_.height * s_.width + first) * s_.outputs;
    for (int64_t p = 0; p < panels_; ++p) {
      const int64_t output = p * kernels_.panel;
      kernels_.direct({v, u_ + p * panel_size_, tap, taps, s_.channels, last - first,
                       std::min<int64_t>(kernels_.panel, s_.outputs - output),
                       bias_.data() + output,
                       call_.residual == nullptr ? nullptr : call_.residual + at + output,
                       y_ + at + output, s_.outputs});
    }
  }

  // The channels of the pixels `down` rows and `right` columns away; zeros where there are none.
  void copy_tap(int64_t sample, int64_t first, int64_t last, int64_t down, int64_t right, float* v,
                int64_t v_pixel) const {
    const int64_t channels = s_.channels;
    for (int64_t p = first; p < last;) {
      const int64_t row = p / s_.width + down;
      int64_t column = p % s_.width + right;
      const int64_t end = std::min(last - p, s_.width - p % s_.width);  // of the row
      const float* const from = x_ + (sample * s_.height + row) * s_.width * channels;
      const bool inside = row >= 0 && row < s_.height;
      for (int64_t i = 0; i < end; ++i, ++column, v += v_pixel) {
        if (inside && column >= 0 && column < s_.width) {
          copy(from + column * channels, v);
        } else {
          std::fill_n(v, channels, 0.0f);
        }
      }
      p += end;
    }
  }

  void copy(const float* from, float* to) const {
    if (s_.channels >= 16) {
      std::memcpy(to, from, static_cast<size_t>(s_.channels) * sizeof(float));
    } else {
      for (int64_t c = 0; c < s_.channels; ++c) to[c] = from[c];
    }
  }

  const ConvKernels& kernels_;
  const ConvCall& call_;
  const ConvShape& s_;
  const float* x_;
  float* y_;
  int64_t panels_, panel_size_;
  float* u_;                 // [panel][tap][channel][output of the panel]
  std::vector<float> bias_;  // padded to full panels
};

// The ELU of channels_last x.
Tensor activated(const Tensor& x) {
  constexpr int64_t kBlock = 4096;
  const int64_t n = x.numel();
  Tensor h = torch::stable::empty_like(x);
  const float* const from = x.const_data_ptr<float>();
  float* const to = h.mutable_data_ptr<float>();
  parallel_each((n + kBlock - 1) / kBlock, [&](int64_t i) {
    const int64_t at = i * kBlock;
    run_simd(InputPixels<false, true>{from + at, 0, 1, std::min(kBlock, n - at), nullptr, nullptr,
                                      nullptr, to + at, 0, 0});
  });
  return h;
}

Tensor conv_direct(Tensor x, Tensor weight, std::optional<Tensor> bias,
                   std::optional<Tensor> residual, int64_t dilation, bool elu) {
  STD_TORCH_CHECK(weight.dim() == 4, "weight must have four axes");
  const int64_t side = weight.size(2) == 1 ? 1 : 3;
  const ConvCall call = conv_call(x, weight, bias, residual, dilation, side, false);
  Tensor y = new_channels_last(x, call.shape);
  if (y.numel() == 0) return y;
  const Tensor h = elu ? activated(x) : x;
  DirectConvolver(call, h.const_data_ptr<float>(), y.mutable_data_ptr<float>()).run();
  return y;
}

}  // namespace
}  // namespace ncsn

STABLE_TORCH_LIBRARY_IMPL(ncsn_fast, CPU, m) {
  m.impl("conv_direct", TORCH_BOX(&ncsn::conv_direct));
}
