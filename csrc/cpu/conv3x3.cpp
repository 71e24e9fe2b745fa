// norm_elu_conv3x3 and conv3x3 for the CPU, by the convolution engine: checks, statistics, and the two operators.

// Changes no result. Else GCC keeps comparisons of floating-point numbers as branches, and loops stay scalar.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-trapping-math")
#endif

#include "cpu/cond_instance_norm_elu.h"
#include "cpu/conv3x3_arguments.h"
#include "cpu/conv3x3_engine.h"

namespace ncsn {
namespace {

// --- statistics -----------------------------------------------------------------------------------

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

// --- checked arguments ----------------------------------------------------------------------------

ConvWeights conv_weights(const Tensor& weight) {
  return {weight.const_data_ptr<float>(), weight.stride(0), weight.stride(1), weight.stride(2),
          weight.stride(3)};
}

Tensor new_channels_last(const Tensor& like, const ConvShape& s) {
  return torch::stable::empty({s.samples, s.outputs, s.height, s.width}, like.scalar_type(),
                              std::nullopt, like.device(), std::nullopt,
                              torch::headeronly::MemoryFormat::ChannelsLast);
}

struct ConvCall {
  ConvShape shape;
  ConvWeights weights;
  const float *bias, *residual;
};

ConvCall conv_call(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& residual, int64_t dilation, bool transposed) {
  check_channels_last(x, "x");
  STD_TORCH_CHECK(dilation >= 1, "dilation must be at least 1, got ", dilation);
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float, "weight must be float32, got ",
                  torch::headeronly::toString(weight.scalar_type()));
  const int64_t from = transposed ? 0 : 1;
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(from) == x.size(1) && weight.size(2) == 3 &&
                      weight.size(3) == 3,
                  "weight must have shape (O, C, 3, 3) and fit the ", x.size(1), " channels of x");
  ConvCall call = {{x.size(0), x.size(1), weight.size(1 - from), x.size(2), x.size(3), dilation},
                   conv_weights(weight),
                   nullptr,
                   nullptr};
  if (transposed) call.weights = call.weights.transposed();
  if (bias) {
    STD_TORCH_CHECK(bias->scalar_type() == ScalarType::Float && bias->dim() == 1 &&
                        bias->size(0) == call.shape.outputs && is_contiguous(*bias),
                    "bias must be a contiguous float32 (", call.shape.outputs, ",)");
    call.bias = bias->const_data_ptr<float>();
  }
  if (residual) {
    check_channels_last(*residual, "residual");
    STD_TORCH_CHECK(residual->size(0) == x.size(0) &&
                        residual->size(1) == call.shape.outputs &&
                        residual->size(2) == x.size(2) && residual->size(3) == x.size(3),
                    "residual must have the shape of the result");
    call.residual = residual->const_data_ptr<float>();
  }
  return call;
}

// --- the operators --------------------------------------------------------------------------------

Tensor conv3x3(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
               int64_t dilation, bool transposed, bool elu) {
  const ConvCall call = conv_call(x, weight, bias, residual, dilation, transposed);
  Tensor y = new_channels_last(x, call.shape);
  if (y.numel() == 0) return y;
  const PackedWeights packed(call.shape, call.weights);
  const Convolver convolver(call.shape, packed,
                            {y.mutable_data_ptr<float>(), call.bias, call.residual});
  parallel_each(convolver.parts(), [&](int64_t part) { convolver.pack(part); });
  convolver.run({x.const_data_ptr<float>(), nullptr, nullptr, nullptr, elu});
  return y;
}

std::tuple<Tensor, Tensor, Tensor> norm_elu_conv3x3(Tensor x, Tensor labels, Tensor norm_weight,
                                                    Tensor weight, std::optional<Tensor> bias,
                                                    std::optional<Tensor> residual,
                                                    int64_t dilation, double eps, bool elu) {
  const ConvCall call = conv_call(x, weight, bias, residual, dilation, false);
  const NormArguments a = norm_arguments(x, labels, norm_weight);
  const ConvShape& s = call.shape;
  Tensor y = new_channels_last(x, s);
  Tensor mean = torch::stable::new_empty(x, {s.samples, s.channels});
  Tensor rstd = torch::stable::new_empty(x, {s.samples, s.channels});
  if (y.numel() == 0) return {y, mean, rstd};
  float* const means = mean.mutable_data_ptr<float>();
  float* const rstds = rstd.mutable_data_ptr<float>();
  const float* const values = x.const_data_ptr<float>();

  const PackedWeights packed(s, call.weights);
  const Convolver convolver(s, packed, {y.mutable_data_ptr<float>(), call.bias, call.residual});
  const Statistics statistics(a.planes.geometry, values);
  const int64_t threads = torch::stable::get_num_threads();
  parallel_each(threads, [&](int64_t part) {
    share_of(part, threads, statistics.parts(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) statistics.measure(i);
    });
    share_of(part, threads, convolver.parts(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) convolver.pack(i);
    });
  });

  Affine<float> affine(s.samples * s.channels);
  const auto residue = scratch<float>(s.channels);
  for (int64_t n = 0; n < s.samples; ++n) {
    const int64_t at = n * s.channels;
    statistics.finish(n, eps, means + at, rstds + at, residue.get());
    affine.compute(a, means, rstds, n, 0, s.channels);
    for (int64_t c = 0; c < s.channels; ++c) {
      affine.shift[at + c] -= residue[c] * affine.scale[at + c];
    }
  }
  convolver.run({values, means, affine.scale.get(), affine.shift.get(), elu});
  return {y, mean, rstd};
}

}  // namespace
}  // namespace ncsn

STABLE_TORCH_LIBRARY_IMPL(ncsn_fast, CPU, m) {
  m.impl("conv3x3", TORCH_BOX(&ncsn::conv3x3));
  m.impl("norm_elu_conv3x3", TORCH_BOX(&ncsn::norm_elu_conv3x3));
}
