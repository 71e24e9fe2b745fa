// norm_elu_conv3x3 and conv3x3 for the CPU, by the convolution engine: checks, and the two operators.

// Changes no result. Else GCC keeps comparisons of floating-point numbers as branches, and loops stay scalar.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-trapping-math")
#endif

#include "cpu/cond_instance_norm_elu.h"
#include "cpu/conv3x3/arguments.h"
#include "cpu/conv3x3/convolver.h"
#include "cpu/conv3x3/statistics.h"

namespace ncsn {
namespace {

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
