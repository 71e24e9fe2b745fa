// conv3x3_weight_gradient for the CPU: in the transformed domain, where it is 36 matrix products over the tiles.
//
// Some tiles at a time: first the strips' transforms of inputs and gradients, spread over the threads, then the
// products, each position and panel one thread's. So a sum over tiles has the same order for any number of threads.

// Changes no result. Else GCC keeps comparisons of floating-point numbers as branches, and loops stay scalar.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-trapping-math")
#endif

#include "cpu/cond_instance_norm_elu.h"
#include "cpu/conv3x3/arguments.h"
#include "cpu/conv3x3/inputs.h"

namespace ncsn {
namespace {

// Tiles at a time (measured): enough that adding to the gradient costs little beside the products, few enough that
// their transforms stay in the second caches of a few threads.
constexpr int64_t kTilesAtOnce = 64;

class WeightGradient {
 public:
  // grad_y as the input of a convolution: with `outputs` channels, no norm, no ELU.
  WeightGradient(const ConvShape& shape, const ConvInput& input, const float* grad_y)
      : kernels_(conv_kernels()),
        shape_(shape),
        grad_shape_{shape.samples, shape.outputs, 0, shape.height, shape.width, shape.dilation},
        input_(input),
        grad_{grad_y, nullptr, nullptr, nullptr, false},
        panels_((shape.outputs + kernels_.panel - 1) / kernels_.panel),
        u_position_(position_stride(shape.channels, kernels_.panel)),
        u_(thread_memory(Use::kWeightGradients, panels_ * kPositions * u_position_)),
        sums_(static_cast<size_t>(panels_ * kernels_.panel)) {}

  void run(float* grad_weight, float* grad_bias) {
    parallel_each(panels_ * kPositions, [&](int64_t i) {
      std::memset(u_ + i * u_position_, 0, static_cast<size_t>(u_position_) * sizeof(float));
    });
    const std::vector<Strip> strips = cut_strips(shape_, kTilesAtOnce);
    for (const Chunk& c : cut_chunks(strips.data(), strips.data() + strips.size(), kTilesAtOnce)) {
      add(c);
    }
    constexpr int64_t kPart = 16;  // channels
    const int64_t parts = (shape_.channels + kPart - 1) / kPart;
    parallel_each(panels_ * parts, [&](int64_t i) {
      const int64_t first = i % parts * kPart;
      finish(i / parts, first, std::min(kPart, shape_.channels - first), grad_weight);
    });
    std::copy_n(sums_.begin(), shape_.outputs, grad_bias);
  }

 private:
  void add(const Chunk& chunk) {
    const int64_t channels = shape_.padded_channels(), width = kernels_.panel;
    const int64_t outputs = panels_ * width, tiles = chunk.tiles();
    // v[position][block of channels][tile][channel], d[position][panel][tile][output]: each product reads both in
    // the order of the memory.
    const int64_t v_block = tiles * kChannelBlock, v_position = position_stride(tiles, channels);
    const int64_t d_panel = position_stride(tiles, width), d_position = panels_ * d_panel + 16;
    float* const v = thread_memory(Use::kSharedInputs, kPositions * v_position);
    float* const d = thread_memory(Use::kGradients, (kPositions + 1) * d_position);

    parallel_for(chunk.end - chunk.begin, 1, [&](int64_t from, int64_t to) {
      RowRing inputs(shape_, input_, channels, 1, kTilesAtOnce, Use::kRows);
      RowRing gradients(grad_shape_, grad_, outputs, 0, kTilesAtOnce, Use::kGradientRows);
      const float* rows[kTileInputs];
      for (const Strip* s = chunk.begin + from; s != chunk.begin + to; ++s) {
        const int64_t first = s->first - chunk.first();
        inputs.load(*s, rows);
        kernels_.transform_inputs(rows, s->tiles, channels, v + first * kChannelBlock,
                                  kChannelBlock, v_block, v_position);
        gradients.load(*s, rows);
        kernels_.transform_gradients(rows, s->tiles, outputs, d + first * width, d_panel,
                                     d_position);
      }
    });
    parallel_each(kPositions * panels_, [&](int64_t i) {
      const int64_t position = i / panels_, panel = i % panels_;
      const float* const gradients = d + position * d_position + panel * d_panel;
      float* const u = u_ + (panel * kPositions + position) * u_position_;
      for (int64_t c = 0; c < shape_.channels; c += kChannelBlock) {
        kernels_.accumulate(v + position * v_position + c / kChannelBlock * v_block,
                            std::min(kChannelBlock, shape_.channels - c), gradients, tiles,
                            u + c * width);
      }
      if (position == 0) {
        kernels_.sum_tiles(gradients + kPositions * d_position, tiles,
                           sums_.data() + panel * width);
      }
    });
  }

  // The gradient of some channels' weights for the outputs of a panel.
  void finish(int64_t panel, int64_t first, int64_t depth, float* grad_weight) const {
    const int64_t width = kernels_.panel;
    float* const g = thread_memory(Use::kTaps, depth * 9 * width);
    kernels_.transform_weight_gradients(
        u_ + panel * kPositions * u_position_ + first * width, u_position_, depth, g);
    const int64_t outputs = std::min(width, shape_.outputs - panel * width);
    for (int64_t o = 0; o < outputs; ++o) {
      float* const to = grad_weight + ((panel * width + o) * shape_.channels + first) * 9;
      for (int64_t i = 0; i < depth * 9; ++i) to[i] = g[i * width + o];
    }
  }

  const ConvKernels& kernels_;
  const ConvShape& shape_;
  ConvShape grad_shape_;
  const ConvInput& input_;
  ConvInput grad_;
  int64_t panels_, u_position_;
  float* u_;                 // [panel][position][channel][output of the panel]
  std::vector<float> sums_;  // padded to full panels
};

std::tuple<Tensor, Tensor> conv3x3_weight_gradient(Tensor grad_y, Tensor x,
                                                   std::optional<Tensor> labels,
                                                   std::optional<Tensor> norm_weight,
                                                   std::optional<Tensor> mean,
                                                   std::optional<Tensor> rstd, int64_t dilation,
                                                   bool elu) {
  check_channels_last(x, "x");
  check_channels_last(grad_y, "grad_y");
  STD_TORCH_CHECK(dilation >= 1, "dilation must be at least 1, got ", dilation);
  STD_TORCH_CHECK(grad_y.size(0) == x.size(0) && grad_y.size(2) == x.size(2) &&
                      grad_y.size(3) == x.size(3),
                  "grad_y must have the samples, height and width of x");
  const ConvShape s = {x.size(0), x.size(1), grad_y.size(1), x.size(2), x.size(3), dilation};
  Tensor grad_weight = torch::stable::new_zeros(x, {s.outputs, s.channels, 3, 3});
  Tensor grad_bias = torch::stable::new_zeros(x, {s.outputs});
  ConvInput input = {x.const_data_ptr<float>(), nullptr, nullptr, nullptr, elu};
  Affine<float> affine(labels ? s.samples * s.channels : 0);
  if (labels) {
    STD_TORCH_CHECK(norm_weight && mean && rstd, "labels must come with the norm's tensors");
    const NormArguments a = norm_arguments(x, *labels, *norm_weight);
    input.mean = statistics_of(x, *mean);
    const float* const rstds = statistics_of(x, *rstd);
    for (int64_t n = 0; n < s.samples; ++n) {
      affine.compute(a, input.mean, rstds, n, 0, s.channels);
    }
    input.scale = affine.scale.get();
    input.shift = affine.shift.get();
  }
  if (x.numel() > 0 && s.outputs > 0) {
    WeightGradient(s, input, grad_y.const_data_ptr<float>())
        .run(grad_weight.mutable_data_ptr<float>(), grad_bias.mutable_data_ptr<float>());
  }
  return {grad_weight, grad_bias};
}

}  // namespace
}  // namespace ncsn

STABLE_TORCH_LIBRARY_IMPL(ncsn_fast, CPU, m) {
  m.impl("conv3x3_weight_gradient", TORCH_BOX(&ncsn::conv3x3_weight_gradient));
}
