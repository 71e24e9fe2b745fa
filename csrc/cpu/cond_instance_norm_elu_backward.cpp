// cond_instance_norm_elu_backward for the CPU: a pass over x and grad_y for the sums of a plane, then one that writes
// grad_x.
//
//     grad_u = grad_y * elu'(u),  u = (x - mean) * scale + shift,  scale = gamma * rstd
//     grad_x = scale * (grad_u - average(grad_u) - xhat * average(grad_u * xhat)) + what comes by the channel means
//
// u and elu'(u) are computed in both passes: that costs less than writing them out and reading them again.

// Changes no result. Else GCC keeps comparisons of floating-point numbers as branches, and loops stay scalar.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-trapping-math")
#endif

#include "common/elu.h"
#include "cpu/cond_instance_norm_elu.h"

namespace ncsn {
namespace {

// For each lane of a tile the sum of grad_u, and of grad_u * (x - mean).
template <typename T, bool kElu>
struct SumGradients {
  using A = Accumulator<T>;
  const T *grad_y, *x;
  const Tile& tile;
  LaneNorm<A> norm;
  A *out, *out_products;

  template <bool kFma>
  NCSN_KERNEL void run() const {
    A sum[kLanes] = {}, products[kLanes] = {};
    const Lanes<A> mean = spread(norm.mean, norm.channels),
                   scale = spread(norm.scale, norm.channels),
                   shift = spread(norm.shift, norm.channels);
    const auto add = [&](A g, A v, int i) __attribute__((always_inline)) {
      const A d = v - mean.v[i];
      if (kElu) g *= elu_slope<kFma>(multiply_add<kFma>(d, scale.v[i], shift.v[i]));
      sum[i] += g;
      products[i] = multiply_add<kFma>(g, d, products[i]);
    };
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t at = r * tile.stride;
      for (int i = 0; i < kLanes; ++i) add(widen(grad_y[at + i]), widen(x[at + i]), i);
    }
    if (tile.tail > 0) {
      const int64_t at = tile.rows * tile.stride;
      const A zeros[kLanes] = {};
      A g[kLanes], v[kLanes];
      pad_tail(grad_y + at, tile.tail, zeros, g);
      pad_tail(x + at, tile.tail, mean.v, v);
      for (int i = 0; i < kLanes; ++i) add(g[i], v[i], i);
    }
    for (int i = 0; i < kLanes; ++i) out[i] = sum[i];
    for (int i = 0; i < kLanes; ++i) out_products[i] = products[i];
  }
};

// grad_x = scale * (grad_u - average - (x - mean) * slope) + through_mean
template <typename T, bool kElu>
struct ApplyGradient {
  using A = Accumulator<T>;
  const T *grad_y, *x;
  T* grad_x;
  const Tile& tile;
  LaneNorm<A> norm;
  const A *averages, *slopes, *through_means;  // of the group
  int64_t next_task;

  template <bool kFma>
  NCSN_KERNEL void run() const {
    const Lanes<A> mean = spread(norm.mean, norm.channels),
                   scale = spread(norm.scale, norm.channels),
                   shift = spread(norm.shift, norm.channels),
                   average = spread(averages, norm.channels),
                   slope = spread(slopes, norm.channels),
                   through_mean = spread(through_means, norm.channels);
    const auto value = [&](A g, A v, int i) __attribute__((always_inline)) {
      const A d = v - mean.v[i];
      if (kElu) g *= elu_slope<kFma>(multiply_add<kFma>(d, scale.v[i], shift.v[i]));
      const A centred = multiply_add<kFma>(-d, slope.v[i], g - average.v[i]);
      return narrow<T>(multiply_add<kFma>(centred, scale.v[i], through_mean.v[i]));
    };
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t at = r * tile.stride;
      prefetch_row(grad_y + at, next_task);
      prefetch_row(x + at, next_task);
      NCSN_INDEPENDENT
      for (int i = 0; i < kLanes; ++i) {
        grad_x[at + i] = value(widen(grad_y[at + i]), widen(x[at + i]), i);
      }
    }
    if (tile.tail > 0) {
      const int64_t at = tile.rows * tile.stride;
      A g[kLanes], v[kLanes];
      T result[kLanes];
      pad_tail(grad_y + at, tile.tail, mean.v, g);
      pad_tail(x + at, tile.tail, mean.v, v);
      for (int i = 0; i < kLanes; ++i) result[i] = value(g[i], v[i], i);
      for (int i = 0; i < tile.tail; ++i) grad_x[at + i] = result[i];
    }
  }
};

// What the second pass needs for each plane, arrays of N * C; and each sample's part of grad_weight, a row of the
// weight.
template <typename A>
struct Gradients {
  std::unique_ptr<A[]> average, slope, through_mean, rows;

  explicit Gradients(const NormArguments& a, int64_t planes)
      : average(scratch<A>(planes)),
        slope(scratch<A>(planes)),
        through_mean(scratch<A>(planes)),
        rows(scratch<A>(a.planes.geometry.samples * a.weight_columns)) {}

  // From the sums of grad_u and grad_u * (x - mean) of the channels first .. last - 1 of a sample, which it finds in
  // average and slope; all of them if the weight is InstanceNorm++'s.
  void compute(const NormArguments& a, const A* mean, const A* rstd, int64_t sample, int64_t first,
               int64_t last) const {
    const int64_t channels = a.planes.geometry.channels, at = sample * channels;
    const A size = static_cast<A>(a.planes.geometry.spatial);
    A* const row = rows.get() + sample * a.weight_columns;
    for (int64_t c = first; c < last; ++c) {
      const A grad_beta = average[at + c], grad_gamma = slope[at + c] * rstd[at + c];
      row[c] = grad_gamma;
      row[a.beta_column() + c] = grad_beta;
      average[at + c] = grad_beta / size;
      slope[at + c] = grad_gamma / size * rstd[at + c];
      through_mean[at + c] = 0;
    }
    if (a.plusplus()) add_channel_means(a, mean + at, sample, row, through_mean.get() + at);
  }

  // InstanceNorm++: u has the part gamma * alpha * m, and m depends on the means of all planes of the sample.
  static void add_channel_means(const NormArguments& a, const A* mean, int64_t sample, A* row,
                                A* through_mean) {
    const int64_t channels = a.planes.geometry.channels;
    const ChannelMeans means = channel_means(mean, channels);
    double sum = 0, products = 0;
    for_weight_entries<A>(a, sample, 0, channels, [&](int64_t c, WeightEntry<A> w) {
      const A m = means.m(mean[c]), grad_beta = row[2 * channels + c];
      const A grad_m = w.gamma * w.alpha * grad_beta;
      row[c] += w.alpha * m * grad_beta;
      row[channels + c] = w.gamma * m * grad_beta;
      through_mean[c] = grad_m;
      sum += static_cast<double>(grad_m);
      products += static_cast<double>(grad_m) * static_cast<double>(m);
    });
    const double average = sum / static_cast<double>(channels);
    const double spread = products / static_cast<double>(channels - 1);
    const double size = static_cast<double>(a.planes.geometry.spatial);
    for (int64_t c = 0; c < channels; ++c) {
      const double m = static_cast<double>(means.m(mean[c]));
      const double grad_mean =
          means.rstd * (static_cast<double>(through_mean[c]) - average - m * spread);
      through_mean[c] = static_cast<A>(grad_mean / size);
    }
  }
};

// Adds up the samples' parts by their labels, in the order of the samples; the threads share out the columns.
template <typename A, typename W>
void sum_rows(const NormArguments& a, const A* rows, W* grad_weight) {
  constexpr int64_t kColumns = 64;
  const int64_t samples = a.planes.geometry.samples, columns = a.weight_columns;
  const int64_t blocks = (columns + kColumns - 1) / kColumns;
  parallel_ranges(blocks, kColumns * (samples + a.weight_rows), [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kColumns, n = std::min(end * kColumns, columns) - first;
    std::vector<A> sums(static_cast<size_t>(a.weight_rows * n));
    for (int64_t s = 0; s < samples; ++s) {
      A* const sum = sums.data() + a.labels[static_cast<size_t>(s)] * n;
      for (int64_t c = 0; c < n; ++c) sum[c] += rows[s * columns + first + c];
    }
    for (int64_t k = 0; k < a.weight_rows; ++k) {
      for (int64_t c = 0; c < n; ++c) {
        grad_weight[k * columns + first + c] = narrow<W>(static_cast<Accumulator<W>>(sums[k * n + c]));
      }
    }
  });
}

template <typename T, bool kElu>
void backward(const NormArguments& a, const T* grad_y, const T* x, const Accumulator<T>* mean,
              const Accumulator<T>* rstd, T* grad_x, const Gradients<Accumulator<T>>& gradients) {
  using A = Accumulator<T>;
  const Planes& planes = a.planes;
  Affine<A> affine(planes.geometry.samples * planes.geometry.channels);

  run_stages<A>(a, [&](const Scope<A>& scope) {
    scope.each_sample([&](int64_t sample, int64_t first, int64_t last) {
      affine.compute(a, mean, rstd, sample, first, last);
    });
    scope.tiles([&](int64_t group, int64_t i, A* sums, A* products) {
      const Tile tile = planes.tile(group, i);
      run_simd(SumGradients<T, kElu>{grad_y + tile.offset, x + tile.offset, tile,
                                     affine.of_tile(planes, group, i, mean), sums, products});
    });
    scope.each_group([&](int64_t group, A* sums, A* products) {
      fold(sums, planes);
      fold(products, planes);
      std::copy_n(sums, planes.group_channels, planes.of_group(gradients.average.get(), group));
      std::copy_n(products, planes.group_channels, planes.of_group(gradients.slope.get(), group));
    });
    scope.each_sample([&](int64_t sample, int64_t first, int64_t last) {
      gradients.compute(a, mean, rstd, sample, first, last);
    });
    scope.tiles([&](int64_t group, int64_t i, A*, A*) {
      const Tile tile = planes.tile(group, i);
      run_simd(ApplyGradient<T, kElu>{grad_y + tile.offset, x + tile.offset, grad_x + tile.offset,
                                      tile, affine.of_tile(planes, group, i, mean),
                                      planes.of_group(gradients.average.get(), group),
                                      planes.of_group(gradients.slope.get(), group),
                                      planes.of_group(gradients.through_mean.get(), group),
                                      scope.next_task});
    });
  });
}

std::tuple<Tensor, Tensor> cond_instance_norm_elu_backward(Tensor grad_y, Tensor x, Tensor labels,
                                                           Tensor weight, Tensor mean, Tensor rstd,
                                                           bool elu) {
  const NormArguments a = norm_arguments(x, labels, weight);
  check_norm_gradient(grad_y, x);
  const void* means = statistics_data(mean, x, "mean");
  const void* rstds = statistics_data(rstd, x, "rstd");
  const Tensor grad = in_layout_of(x, grad_y);
  Tensor grad_x = torch::stable::empty_like(x);
  Tensor grad_weight = torch::stable::new_empty(weight, {a.weight_rows, a.weight_columns});
  for_dtype(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Accumulator<T>;
    const Gradients<A> gradients(a, a.planes.geometry.samples * a.planes.geometry.channels);
    const auto run = elu ? backward<T, true> : backward<T, false>;
    run(a, static_cast<const T*>(grad.const_data_ptr()), static_cast<const T*>(x.const_data_ptr()),
        static_cast<const A*>(means), static_cast<const A*>(rstds),
        static_cast<T*>(grad_x.mutable_data_ptr()), gradients);
    for_dtype(weight.scalar_type(), [&](auto weight_type) {
      using W = typename decltype(weight_type)::type;
      sum_rows(a, gradients.rows.get(), static_cast<W*>(grad_weight.mutable_data_ptr()));
    });
  });
  return {grad_x, grad_weight};
}

}  // namespace
}  // namespace ncsn

STABLE_TORCH_LIBRARY_IMPL(ncsn_fast, CPU, m) {
  m.impl("cond_instance_norm_elu_backward", TORCH_BOX(&ncsn::cond_instance_norm_elu_backward));
}
