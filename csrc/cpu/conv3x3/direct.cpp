// conv_direct for the CPU: a convolution of 3x3 or 1x1 taps, for the shapes where Winograd's algorithm does not pay.
//
// A thread computes some rows of a sample. The rows of x that these need are copied, activated and padded at their sides,
// into a ring; a block of pixels of a row is then a product of matrices that overlap in this memory. Taps that lie in the
// padding for the whole block are left out. Every number is made by the same operations in the same order whatever the
// batch, its neighbours and the number of threads: blocks are cut within a row, in the same way for all.

// Changes no result. Else GCC keeps comparisons of floating-point numbers as branches, and loops stay scalar.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-trapping-math")
#endif

#include <array>
#include <utility>
#include <vector>

#include "cpu/cond_instance_norm_elu.h"
#include "cpu/conv3x3/arguments.h"
#include "cpu/conv3x3/inputs.h"

namespace ncsn {
namespace {

class DirectConvolver {
 public:
  DirectConvolver(const ConvCall& call, const float* x, bool elu, float* y)
      : kernels_(direct_kernels(call.shape.outputs)),
        call_(call),
        s_(call.shape),
        x_(x),
        elu_(elu),
        y_(y),
        middle_(call.weights.side / 2),
        sides_(s_.dilation < s_.width ? middle_ * s_.dilation : 0),
        ring_(std::min(2 * middle_ * s_.dilation + 1, s_.height)),
        panels_((s_.outputs + kernels_.panel - 1) / kernels_.panel),
        panel_size_(call.weights.taps() * s_.channels * kernels_.panel),
        u_(thread_memory(Use::kWeights, panels_ * panel_size_)),
        bias_(static_cast<size_t>(panels_ * kernels_.panel)) {
    if (call.bias != nullptr) std::copy_n(call.bias, s_.outputs, bias_.begin());
  }

  void run() const {
    const int64_t parts = (s_.channels + kPart - 1) / kPart;
    parallel_each(panels_ * parts, [&](int64_t i) { pack(i / parts, i % parts * kPart); });
    const int64_t fair = s_.samples * s_.height / (4 * torch::stable::get_num_threads());
    const int64_t rows = std::clamp<int64_t>(fair, 1, kMostRows);
    const int64_t groups = (s_.height + rows - 1) / rows;
    parallel_each(s_.samples * groups, [&](int64_t i) {
      const int64_t first = i % groups * rows;
      convolve(i / groups, first, std::min(first + rows, s_.height));
    });
  }

 private:
  static constexpr int64_t kPart = 16;       // channels
  static constexpr int64_t kMostRows = 16;   // of a thread at a time
  static constexpr int64_t kLongestRun = 256;  // for the rounding of its sum

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

  // The rows first .. last - 1 of a sample.
  void convolve(int64_t sample, int64_t first, int64_t last) const {
    const int64_t row_size = (s_.width + 2 * sides_) * s_.channels;
    float* const memory = thread_memory(Use::kRows, ring_ * row_size);
    std::vector<int64_t> held(static_cast<size_t>(ring_), -1);  // the rows in the ring
    const int64_t most = 2 * s_.outputs <= kernels_.panel ? kernels_.direct_pixels_narrow
                                                          : kernels_.direct_pixels;
    const int64_t blocks = (s_.width + most - 1) / most;  // of equal size, as far as can be
    std::vector<DirectRun> runs;
    for (int64_t row = first; row < last; ++row) {
      std::array<const float*, 3> rows = {};
      for (int64_t i = 0; i < call_.weights.side; ++i) {
        const int64_t from = row + (i - middle_) * s_.dilation;
        if (from < 0 || from >= s_.height) continue;
        float* const slot = memory + from % ring_ * row_size;
        if (std::exchange(held[static_cast<size_t>(from % ring_)], from) != from) {
          load(sample, from, slot);
        }
        rows[static_cast<size_t>(i)] = slot;
      }
      for (int64_t b = 0; b < blocks; ++b) {
        convolve(sample, row, rows, b * s_.width / blocks, (b + 1) * s_.width / blocks, runs);
      }
    }
  }

  // A row of x, activated, with zeros at its sides.
  void load(int64_t sample, int64_t row, float* to) const {
    const int64_t n = s_.width * s_.channels, zeros = sides_ * s_.channels;
    const float* const from = x_ + (sample * s_.height + row) * n;
    std::fill_n(to, zeros, 0.0f);
    std::fill_n(to + zeros + n, zeros, 0.0f);
    if (elu_) {
      run_simd(InputPixels<false, true>{from, 0, 1, n, nullptr, nullptr, nullptr, to + zeros, 0, 0});
    } else {
      std::copy_n(from, n, to + zeros);
    }
  }

  // The pixels left .. right - 1 of a row. rows: those of the taps, null outside of the image.
  void convolve(int64_t sample, int64_t row, const std::array<const float*, 3>& rows, int64_t left,
                int64_t right, std::vector<DirectRun>& runs) const {
    const int64_t side = call_.weights.side, channels = s_.channels, d = s_.dilation;
    runs.clear();
    const auto add = [&](int64_t tap, const float* v, int64_t depth) {
      for (int64_t k = 0; k < depth; k += kLongestRun) {
        runs.push_back({v + k, (tap * channels + k) * kernels_.panel,
                        std::min(kLongestRun, depth - k)});
      }
    };
    for (int64_t i = 0; i < side; ++i) {
      if (rows[static_cast<size_t>(i)] == nullptr) continue;
      const float* const v = rows[static_cast<size_t>(i)] + left * channels;
      if (d == 1 && sides_ == middle_) {  // the taps lie side by side
        add(i * side, v, side * channels);
        continue;
      }
      for (int64_t j = 0; j < side; ++j) {
        const int64_t aside = (j - middle_) * d;
        if (right + aside > 0 && left + aside < s_.width) {
          add(i * side + j, v + (sides_ + aside) * channels, channels);
        }
      }
    }
    const int64_t at = ((sample * s_.height + row) * s_.width + left) * s_.outputs;
    for (int64_t i = 0; i < (right - left) * s_.outputs; i += 16) {
      __builtin_prefetch(y_ + at + i, 1, 3);
    }
    for (int64_t p = 0; p < panels_; ++p) {
      const int64_t output = p * kernels_.panel;
      kernels_.direct({runs.data(), static_cast<int64_t>(runs.size()), channels,
                       u_ + p * panel_size_, right - left,
                       std::min<int64_t>(kernels_.panel, s_.outputs - output),
                       bias_.data() + output,
                       call_.residual == nullptr ? nullptr : call_.residual + at + output,
                       y_ + at + output, s_.outputs});
    }
  }

  const ConvKernels& kernels_;
  const ConvCall& call_;
  const ConvShape& s_;
  const float* x_;
  bool elu_;
  float* y_;
  int64_t middle_;  // tap
  int64_t sides_;   // zeros on each side of a row of the ring, in pixels
  int64_t ring_;    // rows
  int64_t panels_, panel_size_;
  float* u_;                 // [panel][tap][channel][output of the panel]
  std::vector<float> bias_;  // padded to full panels
};

Tensor conv_direct(Tensor x, Tensor weight, std::optional<Tensor> bias,
                   std::optional<Tensor> residual, int64_t dilation, bool elu) {
  STD_TORCH_CHECK(weight.dim() == 4, "weight must have four axes");
  const int64_t side = weight.size(2) == 1 ? 1 : 3;
  const ConvCall call = conv_call(x, weight, bias, residual, dilation, side, false);
  Tensor y = new_channels_last(x, call.shape);
  if (y.numel() == 0) return y;
  DirectConvolver(call, x.const_data_ptr<float>(), elu, y.mutable_data_ptr<float>()).run();
  return y;
}

}  // namespace
}  // namespace ncsn

STABLE_TORCH_LIBRARY_IMPL(ncsn_fast, CPU, m) {
  m.impl("conv_direct", TORCH_BOX(&ncsn::conv_direct));
}
