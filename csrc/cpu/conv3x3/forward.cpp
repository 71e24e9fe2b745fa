// norm_elu_conv3x3 and conv3x3 for the CPU, by the convolution engine, and their weights packed in advance.

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

// What conv3x3_pack has made of the weight, or null.
const float* kept_weights(const ConvShape& shape, const std::optional<Tensor>& packed) {
  if (!packed) return nullptr;
  const PackedWeights expected(shape, {});
  STD_TORCH_CHECK(packed->scalar_type() == ScalarType::Float && is_contiguous(*packed) &&
                      packed->dim() == 3 && packed->size(0) == expected.panels() &&
                      packed->size(1) == kPositions && packed->size(2) == expected.position(),
                  "packed must be what conv3x3_pack made of a weight of this shape");
  return packed->const_data_ptr<float>();
}

Tensor conv3x3_pack(Tensor weight, int64_t panel) {
  STD_TORCH_CHECK(panel == conv_kernels().panel, "panel must be that of the processor's level, ",
                  conv_kernels().panel, ", got ", panel);
  const ConvWeights w = conv_weights(weight, 3);
  const ConvShape shape = {0, weight.size(1), weight.size(0), 0, 0, 1};
  const PackedWeights weights(shape, w);
  Tensor packed = torch::stable::new_empty(
      weight, {weights.panels(), kPositions, weights.position()});
  float* const u = packed.mutable_data_ptr<float>();
  const int64_t used = shape.channels * panel, unused = weights.position() - used;
  parallel_each(weights.panels() * kPositions, [&](int64_t i) {
    std::fill_n(u + i * weights.position() + used, unused, 0.0f);
  });
  parallel_each(weights.parts(), [&](int64_t part) { weights.pack(part, u); });
  return packed;
}

Tensor conv3x3(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
               int64_t dilation, bool transposed, bool elu, std::optional<Tensor> packed) {
  const ConvCall call = conv_call(x, weight, bias, residual, dilation, 3, transposed);
  Tensor y = new_channels_last(x, call.shape);
  if (y.numel() == 0) return y;
  STD_TORCH_CHECK(!(transposed && packed), "packed weights are not those of the gradient");
  const PackedWeights weights(call.shape, call.weights, kept_weights(call.shape, packed));
  const Convolver convolver(call.shape, weights,
                            {y.mutable_data_ptr<float>(), call.bias, call.residual});
  parallel_each(convolver.parts(), [&](int64_t part) { convolver.pack(part); });
  convolver.run({x.const_data_ptr<float>(), nullptr, nullptr, nullptr, elu});
  return y;
}

std::tuple<Tensor, Tensor, Tensor> norm_elu_conv3x3(Tensor x, Tensor labels, Tensor norm_weight,
                                                    Tensor weight, std::optional<Tensor> bias,
                                                    std::optional<Tensor> residual,
                                                    int64_t dilation, double eps, bool elu,
                                                    std::optional<Tensor> packed) {
  const ConvCall call = conv_call(x, weight, bias, residual, dilation, 3, false);
  const NormArguments a = norm_arguments(x, labels, norm_weight);
  const ConvShape& s = call.shape;
  Tensor y = new_channels_last(x, s);
  Tensor mean = torch::stable::new_empty(x, {s.samples, s.channels});
  Tensor rstd = torch::stable::new_empty(x, {s.samples, s.channels});
  if (y.numel() == 0) return {y, mean, rstd};
  float* const means = mean.mutable_data_ptr<float>();
  float* const rstds = rstd.mutable_data_ptr<float>();
  const float* const values = x.const_data_ptr<float>();

  const PackedWeights weights(s, call.weights, kept_weights(s, packed));
  const Convolver convolver(s, weights, {y.mutable_data_ptr<float>(), call.bias, call.residual});
  const Statistics statistics(a.planes.geometry, values);
  const int64_t shares = Pool::kRangesPerThread * torch::stable::get_num_threads();
  parallel_each(shares, [&](int64_t part) {
    share_of(part, shares, statistics.parts(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) statistics.measure(i);
    });
    share_of(part, shares, convolver.parts(), [&](int64_t begin, int64_t end) {
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
  m.impl("conv3x3_pack", TORCH_BOX(&ncsn::conv3x3_pack));
  m.impl("norm_elu_conv3x3", TORCH_BOX(&ncsn::norm_elu_conv3x3));
}
