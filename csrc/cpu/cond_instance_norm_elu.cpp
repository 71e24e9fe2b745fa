// cond_instance_norm_elu for the CPU: statistics in two passes over planes that stay in the cache, then norm and ELU.

// Changes no result. Else GCC keeps comparisons of floating-point numbers as branches, and loops stay scalar.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-trapping-math")
#endif

#include "cpu/cond_instance_norm_elu.h"

#include "common/elu.h"
#include "cpu/stream.h"

namespace ncsn {
namespace {

// The sum of each lane of a tile.
template <typename T>
struct Sum {
  using A = Accumulator<T>;
  const T* x;
  const Tile& tile;
  A* out;

  template <bool kFma>
  NCSN_KERNEL void run() const {
    A sum[kLanes] = {};
    for (int64_t r = 0; r < tile.rows; ++r) {
      const T* row = x + r * tile.stride;
      for (int i = 0; i < kLanes; ++i) sum[i] += widen(row[i]);
    }
    for (int i = 0; i < tile.tail; ++i) sum[i] += widen(x[tile.rows * tile.stride + i]);
    for (int i = 0; i < kLanes; ++i) out[i] = sum[i];
  }
};

// The sum of x - centre, which is the error of the centre as a mean, and of its square.
template <typename T>
struct Moments {
  using A = Accumulator<T>;
  const T* x;
  const Tile& tile;
  LaneChannels channels;
  const A* centres;
  A *out, *out_squares;

  template <bool kFma>
  NCSN_KERNEL void run() const {
    A sum[kLanes] = {}, squares[kLanes] = {};
    const Lanes<A> centre = spread(centres, channels);
    for (int64_t r = 0; r < tile.rows; ++r) {
      const T* row = x + r * tile.stride;
      for (int i = 0; i < kLanes; ++i) {
        const A d = widen(row[i]) - centre.v[i];
        sum[i] += d;
        squares[i] = multiply_add<kFma>(d, d, squares[i]);
      }
    }
    if (tile.tail > 0) {
      A row[kLanes];
      pad_tail(x + tile.rows * tile.stride, tile.tail, centre.v, row);
      for (int i = 0; i < kLanes; ++i) {
        const A d = row[i] - centre.v[i];
        sum[i] += d;
        squares[i] = multiply_add<kFma>(d, d, squares[i]);
      }
    }
    for (int i = 0; i < kLanes; ++i) out[i] = sum[i];
    for (int i = 0; i < kLanes; ++i) out_squares[i] = squares[i];
  }
};

template <typename T, bool kElu, bool kStreamed>
struct Apply {
  using A = Accumulator<T>;
  const T* x;
  T* y;
  const Tile& tile;
  LaneNorm<A> norm;
  int64_t next_task;

  template <bool kFma>
  NCSN_KERNEL void run() const {
    const Lanes<A> mean = spread(norm.mean, norm.channels),
                   scale = spread(norm.scale, norm.channels),
                   shift = spread(norm.shift, norm.channels);
    const auto value = [&](A v, int i) __attribute__((always_inline)) {
      const A u = multiply_add<kFma>(v - mean.v[i], scale.v[i], shift.v[i]);
      return narrow<T>(kElu ? elu<kFma>(u) : u);
    };
    for (int64_t r = 0; r < tile.rows; ++r) {
      const T* from = x + r * tile.stride;
      T* to = y + r * tile.stride;
      prefetch_row(from, next_task);
      alignas(64) T row[kLanes];
      T* const result = kStreamed ? row : to;
      NCSN_INDEPENDENT
      for (int i = 0; i < kLanes; ++i) result[i] = value(widen(from[i]), i);
      if (kStreamed) stream_row(row, kLanes, to);
    }
    if (kStreamed) end_stream();
    if (tile.tail > 0) {
      const int64_t at = tile.rows * tile.stride;
      A row[kLanes];
      T result[kLanes];
      pad_tail(x + at, tile.tail, mean.v, row);
      for (int i = 0; i < kLanes; ++i) result[i] = value(row[i], i);
      for (int i = 0; i < tile.tail; ++i) y[at + i] = result[i];
    }
  }
};

// The corrected two-pass algorithm (Chan, Golub, LeVeque, "Algorithms for computing the sample variance", 1983): the
// sums of x - mean and of its square give a better mean, and take the error of the first one out of the variance.
// Returns what rounding the better mean to its type has left out.
template <typename A>
A finish_statistics(A sum, A squares, A size, A eps, A* mean, A* rstd) {
  const A error = sum / size, variance = squares / size;
  if (!std::isfinite(error) || !std::isfinite(variance)) {  // nothing to correct in such a plane
    *rstd = 1 / std::sqrt(variance + eps);
    return 0;
  }
  const A better = *mean + error, residue = (*mean - better) + error;
  *mean = better;
  *rstd = 1 / std::sqrt(std::max(variance - error * error, A(0)) + eps);
  return residue;
}

template <typename T>
void forward(const NormArguments& a, const T* x, T* y, Accumulator<T>* mean, Accumulator<T>* rstd,
             Accumulator<T> eps, bool with_elu) {
  using A = Accumulator<T>;
  const Planes& planes = a.planes;
  const Geometry& geometry = planes.geometry;
  const A size = static_cast<A>(geometry.spatial);
  Affine<A> affine(geometry.samples * geometry.channels);
  const auto residue = scratch<A>(geometry.samples * geometry.channels);
  const bool streamed = is_streamed<T>(geometry.samples * geometry.elements()) &&
                        can_stream(y, planes.group_elements()) &&
                        can_stream(y, planes.row_stride);

  run_stages<A>(a, [&](const Scope<A>& scope) {
    scope.tiles([&](int64_t group, int64_t i, A* sums, A*) {
      const Tile tile = planes.tile(group, i);
      run_simd(Sum<T>{x + tile.offset, tile, sums});
    });
    scope.each_group([&](int64_t group, A* sums, A*) {
      fold(sums, planes);
      A* const means = planes.of_group(mean, group);
      for (int64_t c = 0; c < planes.group_channels; ++c) means[c] = sums[c] / size;
    });
    scope.tiles([&](int64_t group, int64_t i, A* sums, A* squares) {
      const Tile tile = planes.tile(group, i);
      run_simd(Moments<T>{x + tile.offset, tile, planes.channels(i), planes.of_group(mean, group),
                          sums, squares});
    });
    scope.each_group([&](int64_t group, A* sums, A* squares) {
      fold(sums, planes);
      fold(squares, planes);
      for (int64_t c = 0; c < planes.group_channels; ++c) {
        const int64_t at = group * planes.group_channels + c;
        residue[at] =
            finish_statistics(sums[c], squares[c], size, eps, mean + at, rstd + at);
      }
    });
    scope.each_sample([&](int64_t sample, int64_t first, int64_t last) {
      affine.compute(a, mean, rstd, sample, first, last);
      const int64_t at = sample * geometry.channels;
      for (int64_t c = at + first; c < at + last; ++c) {
        affine.shift[c] -= residue[c] * affine.scale[c];
      }
    });
    scope.tiles([&](int64_t group, int64_t i, A*, A*) {
      const Tile tile = planes.tile(group, i);
      const LaneNorm<A> norm = affine.of_tile(planes, group, i, mean);
      const T* from = x + tile.offset;
      T* to = y + tile.offset;
      const auto apply = [&](auto elu, auto past_caches) {
        run_simd(Apply<T, elu(), past_caches()>{from, to, tile, norm, scope.next_task});
      };
      const auto apply_by = [&](auto elu) {
        streamed ? apply(elu, std::true_type()) : apply(elu, std::false_type());
      };
      with_elu ? apply_by(std::true_type()) : apply_by(std::false_type());
    });
  });
}

std::tuple<Tensor, Tensor, Tensor> cond_instance_norm_elu(Tensor x, Tensor labels, Tensor weight,
                                                          double eps, bool elu) {
  const NormArguments a = norm_arguments(x, labels, weight);
  const ScalarType statistics = statistics_dtype(x.scalar_type());
  const Geometry& geometry = a.planes.geometry;
  Tensor y = torch::stable::empty_like(x);
  Tensor mean = torch::stable::new_empty(x, {geometry.samples, geometry.channels}, statistics);
  Tensor rstd = torch::stable::new_empty(x, {geometry.samples, geometry.channels}, statistics);
  for_dtype(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Accumulator<T>;
    forward<T>(a, static_cast<const T*>(x.const_data_ptr()), static_cast<T*>(y.mutable_data_ptr()),
               mean.mutable_data_ptr<A>(), rstd.mutable_data_ptr<A>(), static_cast<A>(eps), elu);
  });
  return {y, mean, rstd};
}

}  // namespace
}  // namespace ncsn

STABLE_TORCH_LIBRARY_IMPL(ncsn_fast, CPU, m) {
  m.impl("cond_instance_norm_elu", TORCH_BOX(&ncsn::cond_instance_norm_elu));
}
