// What the kernels of cond_instance_norm_elu share: their arguments, the gather of the weight, and the small kernels between
// a split pass over the planes and the next one. Everything here also runs on the host (the tests walk it there).
//
// The passes over x themselves are in cond_instance_norm_elu_forward.cuh and _backward.cuh.

#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/macros/Macros.h>

#include <cmath>

#include "common/cond_instance_norm_elu.h"
#include "common/dtype.h"
#include "cuda/plane_tiling.cuh"

namespace ncsn {

template <typename A>
struct WeightEntry {
  A gamma, alpha, beta;  // alpha 0 where there is none
};

// A number of a parameter, whatever its dtype.
template <typename A>
NCSN_HD A number_at(const void* data, torch::headeronly::ScalarType dtype, int64_t i) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::BFloat16:
      return static_cast<A>(
          static_cast<float>(static_cast<const torch::headeronly::BFloat16*>(data)[i]));
    case ScalarType::Half:
      return static_cast<A>(
          static_cast<float>(static_cast<const torch::headeronly::Half*>(data)[i]));
    case ScalarType::Double:
      return static_cast<A>(static_cast<const double*>(data)[i]);
    default:
      return static_cast<A>(static_cast<const float*>(data)[i]);
  }
}

struct WeightTable {
  const void* data;
  torch::headeronly::ScalarType dtype;
  int64_t rows, columns, row_stride, column_stride;
  const int64_t* labels;
  int64_t label_stride;  // 0 if one label serves all samples
  int64_t channels;

  NCSN_HD bool plusplus() const { return columns == 3 * channels; }

  NCSN_HD int64_t label(int64_t sample) const {
    const int64_t label = labels[sample * label_stride];
    CUDA_KERNEL_ASSERT(label >= 0 && label < rows);
    return label;
  }

  template <typename A>
  NCSN_HD A at(int64_t row, int64_t column) const {
    return number_at<A>(data, dtype, row * row_stride + column * column_stride);
  }

  template <typename A>
  NCSN_HD WeightEntry<A> entry(int64_t sample, int64_t channel) const {
    const int64_t row = label(sample);
    return {at<A>(row, channel), plusplus() ? at<A>(row, channels + channel) : A(0),
            at<A>(row, columns - channels + channel)};
  }
};

// Arrays of N * C, and what a split pass leaves for each chunk of a plane; null where a launch has no use for them.
template <typename A>
struct PlaneArrays {
  A *mean, *rstd;
  A *scale, *shift;                      // u = (x - mean) * scale + shift
  A *average, *slope, *through_mean;     // of the backward pass
  A* rows;                               // (N, columns): the samples' parts of grad_weight
  A* parts;                              // kParts numbers for each chunk of each plane
};

constexpr int kForwardParts = 3, kBackwardParts = 2;

// A chunk's or a plane's count, mean and sum of squares about it.
struct Moments {
  double count, mean, squares;
};

// Chan, Golub, LeVeque, "Algorithms for computing the sample variance", 1983.
NCSN_HD Moments merge(const Moments& a, const Moments& b) {
  if (a.count == 0) return b;
  if (b.count == 0) return a;
  const double count = a.count + b.count, delta = b.mean - a.mean, weight = b.count / count;
  return {count, a.mean + delta * weight,
          a.squares + b.squares + delta * delta * a.count * weight};
}

template <typename A>
NCSN_HD A reciprocal_std(const Moments& m, A eps) {
  const A variance = static_cast<A>(m.squares / m.count);
  return A(1) / sqrt((variance < A(0) ? A(0) : variance) + eps);
}

// --- the kernels between two passes ---------------------------------------------------------------

constexpr int kMiddleThreads = 256;
constexpr int kMiddleChannels = 64;  // of a block, where channels do not depend on each other

// A block's channels: all of a sample for InstanceNorm++.
template <typename A>
struct MiddleArgs {
  PlaneTiling tiling;  // of the passes
  WeightTable weight;
  PlaneArrays<A> planes;
  A eps;
  bool combine;  // whether there are parts of chunks; else mean and rstd are there

  NCSN_HD int64_t block_channels() const {
    return weight.plusplus() ? weight.channels : kMiddleChannels;
  }
};

// The sum over the block of two numbers, for every thread.
template <typename Thread>
NCSN_HD void sum_in_block(const Thread& thread, double (&sums)[2]) {
  auto* cells = thread.template cells<double>(0);
  const unsigned warp = thread.index() / kWarp, warps = thread.threads() / kWarp;
  for (unsigned step = 1; step < kWarp; step *= 2) {
    for (double& sum : sums) sum += thread.shuffle_xor(sum, step);
  }
  thread.sync();  // the cells may still be read from the last time
  if (thread.index() % kWarp == 0) {
    cells[warp] = sums[0];
    cells[warps + warp] = sums[1];
  }
  thread.sync();
  sums[0] = sums[1] = 0;
  for (unsigned w = 0; w < warps; ++w) {
    sums[0] += static_cast<double>(cells[w]);
    sums[1] += static_cast<double>(cells[warps + w]);
  }
}

constexpr unsigned kMiddleMemory = 2 * kMiddleThreads / kWarp * sizeof(double);

// InstanceNorm++'s m = (mean - middle) * rstd of a sample's planes.
struct ChannelMeans {
  double middle, rstd;

  template <typename A>
  NCSN_HD A m(A mean) const {
    return static_cast<A>((static_cast<double>(mean) - middle) * rstd);
  }
};

template <typename A, typename Thread>
NCSN_HD ChannelMeans channel_means(const A* mean, int64_t channels, const Thread& thread) {
  double sums[2] = {0, 0};
  for (int64_t c = thread.index(); c < channels; c += thread.threads()) {
    sums[0] += static_cast<double>(mean[c]);
  }
  sum_in_block(thread, sums);
  const double middle = sums[0] / static_cast<double>(channels);
  sums[0] = sums[1] = 0;
  for (int64_t c = thread.index(); c < channels; c += thread.threads()) {
    const double d = static_cast<double>(mean[c]) - middle;
    sums[0] += d * d;
  }
  sum_in_block(thread, sums);
  return {middle, 1 / sqrt(sums[0] / static_cast<double>(channels - 1) + kChannelMeanEps)};
}

// Calls load(channel, chunk) for each chunk of each of the block's channels, by as many neighbouring lanes as there are
// chunks, up to a warp's; folds the values, those of a lane first, and calls done(channel, value).
template <typename Value, typename Thread, typename Load, typename Fold, typename Done>
NCSN_HD void combine_chunks(const PlaneTiling& tiling, int64_t first, int64_t last,
                            const Thread& thread, Value nothing, const Load& load, const Fold& fold,
                            const Done& done) {
  unsigned lanes = 1;
  while (lanes < kWarp && static_cast<int>(lanes) < tiling.chunks) lanes *= 2;
  const int64_t together = thread.threads() / lanes;
  const unsigned lane = thread.index() % lanes;
  for (int64_t begin = first; begin < last; begin += together) {
    const int64_t channel = begin + thread.index() / lanes;
    Value value = nothing;
    if (channel < last) {
      for (int64_t k = lane; k < tiling.chunks; k += lanes) value = fold(value, load(channel, k));
    }
    for (unsigned step = 1; step < lanes; step *= 2) value = fold(value, value.shuffled(thread, step));
    if (channel < last && lane == 0) done(channel, value);
  }
}

struct SharedMoments : Moments {
  template <typename Thread>
  NCSN_HD SharedMoments shuffled(const Thread& t, unsigned bits) const {
    return {{t.shuffle_xor(count, bits), t.shuffle_xor(mean, bits), t.shuffle_xor(squares, bits)}};
  }
};

struct SharedSums {
  double sum, products;
  template <typename Thread>
  NCSN_HD SharedSums shuffled(const Thread& t, unsigned bits) const {
    return {t.shuffle_xor(sum, bits), t.shuffle_xor(products, bits)};
  }
};

// Statistics of the planes from those of their chunks, if there are any; then scale and shift of every plane.
template <typename A, typename Thread>
NCSN_HD void affine_block(const MiddleArgs<A>& a, const Thread& thread) {
  const PlaneTiling& tiling = a.tiling;
  const int64_t channels = a.weight.channels, first = thread.block_x * a.block_channels();
  const int64_t last = first + a.block_channels() < channels ? first + a.block_channels() : channels;
  for (int64_t n = thread.block_y; n < tiling.geometry.samples; n += thread.blocks_y) {
    const int64_t at = n * channels;
    if (a.combine) {
      combine_chunks(
          tiling, first, last, thread, SharedMoments{{0, 0, 0}},
          [&](int64_t c, int64_t chunk) {
            const A* part = a.planes.parts + ((at + c) * tiling.chunks + chunk) * kForwardParts;
            return SharedMoments{{static_cast<double>(tiling.chunk_size(chunk)),
                                  static_cast<double>(part[0]) + static_cast<double>(part[1]),
                                  static_cast<double>(part[2])}};
          },
          [](const SharedMoments& l, const SharedMoments& r) { return SharedMoments{merge(l, r)}; },
          [&](int64_t c, const SharedMoments& m) {
            const A mean = static_cast<A>(m.mean);
            a.planes.mean[at + c] = mean;
            a.planes.rstd[at + c] = reciprocal_std(m, a.eps);
            // What rounding the mean has left out, for the shift.
            a.planes.shift[at + c] = static_cast<A>(m.mean - static_cast<double>(mean));
          });
      thread.sync();
    }
    ChannelMeans means = {0, 0};
    if (a.weight.plusplus()) means = channel_means(a.planes.mean + at, channels, thread);
    for (int64_t c = first + thread.index(); c < last; c += thread.threads()) {
      const WeightEntry<A> w = a.weight.template entry<A>(n, c);
      const A scale = w.gamma * a.planes.rstd[at + c];
      const A residue = a.combine ? a.planes.shift[at + c] : A(0);
      const A m = a.weight.plusplus() ? means.m(a.planes.mean[at + c]) : A(0);
      a.planes.scale[at + c] = scale;
      a.planes.shift[at + c] = w.gamma * w.alpha * m + w.beta - residue * scale;
    }
  }
}

// What a plane's sums of grad_u and grad_u * (x - mean) mean for it: its part of grad_weight, and the numbers of grad_x.
template <typename A>
struct PlaneGradient {
  A grad_gamma, grad_beta, average, slope;

  NCSN_HD PlaneGradient(A sum, A products, A rstd, A size)
      : grad_gamma(products * rstd),
        grad_beta(sum),
        average(sum / size),
        slope(grad_gamma / size * rstd) {}
};

// The planes' gradients from the sums of their chunks; for InstanceNorm++ also what comes by the channel means.
template <typename A, typename Thread>
NCSN_HD void gradient_block(const MiddleArgs<A>& a, const Thread& thread) {
  const PlaneTiling& tiling = a.tiling;
  const int64_t channels = a.weight.channels, first = thread.block_x * a.block_channels();
  const int64_t last = first + a.block_channels() < channels ? first + a.block_channels() : channels;
  const double size = static_cast<double>(tiling.geometry.spatial);
  for (int64_t n = thread.block_y; n < tiling.geometry.samples; n += thread.blocks_y) {
    const int64_t at = n * channels;
    A* const row = a.planes.rows + n * a.weight.columns;
    A* const row_beta = row + a.weight.columns - channels;
    combine_chunks(
        tiling, first, last, thread, SharedSums{0, 0},
        [&](int64_t c, int64_t chunk) {
          const A* part = a.planes.parts + ((at + c) * tiling.chunks + chunk) * kBackwardParts;
          return SharedSums{static_cast<double>(part[0]), static_cast<double>(part[1])};
        },
        [](const SharedSums& l, const SharedSums& r) {
          return SharedSums{l.sum + r.sum, l.products + r.products};
        },
        [&](int64_t c, const SharedSums& s) {
          const PlaneGradient<A> g(static_cast<A>(s.sum), static_cast<A>(s.products),
                                   a.planes.rstd[at + c], static_cast<A>(size));
          row[c] = g.grad_gamma;
          row_beta[c] = g.grad_beta;
          a.planes.average[at + c] = g.average;
          a.planes.slope[at + c] = g.slope;
          a.planes.through_mean[at + c] = A(0);
        });
    if (!a.weight.plusplus()) continue;
    thread.sync();
    const ChannelMeans means = channel_means(a.planes.mean + at, channels, thread);
    double sums[2] = {0, 0};  // of the gradient of m, and of that times m
    for (int64_t c = thread.index(); c < channels; c += thread.threads()) {
      const WeightEntry<A> w = a.weight.template entry<A>(n, c);
      const A m = means.m(a.planes.mean[at + c]), grad_beta = row_beta[c];
      const A grad_m = w.gamma * w.alpha * grad_beta;
      row[c] += w.alpha * m * grad_beta;
      row[channels + c] = w.gamma * m * grad_beta;
      a.planes.through_mean[at + c] = grad_m;
      sums[0] += static_cast<double>(grad_m);
      sums[1] += static_cast<double>(grad_m) * static_cast<double>(m);
    }
    sum_in_block(thread, sums);
    const double average = sums[0] / static_cast<double>(channels);
    const double spread = sums[1] / static_cast<double>(channels - 1);
    for (int64_t c = thread.index(); c < channels; c += thread.threads()) {
      const double m = static_cast<double>(means.m(a.planes.mean[at + c]));
      const double grad_m = static_cast<double>(a.planes.through_mean[at + c]);
      a.planes.through_mean[at + c] =
          static_cast<A>(means.rstd * (grad_m - average - m * spread) / size);
    }
  }
}

// --- grad_weight ----------------------------------------------------------------------------------

constexpr int kWeightColumns = 32, kWeightStrands = 8;  // a block's threads

template <typename A>
struct GradWeightArgs {
  WeightTable weight;
  int64_t samples;
  const A* rows;  // (N, columns)
  void* grad_weight;  // (K, columns), contiguous, of the weight's dtype
};

constexpr int grad_weight_memory(int accumulator_size) {
  return kWeightColumns * kWeightStrands * accumulator_size;
}

// Sums the samples' rows by their labels: a strand of threads takes every eighth sample, and the strands' sums are added in
// their order. Nothing depends on when a thread runs.
template <typename A, typename Thread>
NCSN_HD void grad_weight_block(const GradWeightArgs<A>& a, const Thread& thread) {
  using torch::headeronly::ScalarType;
  auto* cells = thread.template cells<A>(0);
  const int64_t column = static_cast<int64_t>(thread.block_x) * kWeightColumns + thread.x;
  const int64_t columns = a.weight.columns;
  for (int64_t k = thread.block_y; k < a.weight.rows; k += thread.blocks_y) {
    A sum = 0;
    if (column < columns) {
      for (int64_t n = thread.y; n < a.samples; n += kWeightStrands) {
        if (a.weight.label(n) == k) sum += a.rows[n * columns + column];
      }
    }
    thread.sync();  // the cells may still be read from the last k
    cells[thread.index()] = sum;
    thread.sync();
    if (thread.y != 0 || column >= columns) continue;
    for (int s = 1; s < kWeightStrands; ++s) {
      sum += static_cast<A>(cells[thread.x + s * kWeightColumns]);
    }
    const int64_t at = k * columns + column;
    switch (a.weight.dtype) {
      case ScalarType::BFloat16:
        static_cast<torch::headeronly::BFloat16*>(a.grad_weight)[at] = static_cast<float>(sum);
        break;
      case ScalarType::Half:
        static_cast<torch::headeronly::Half*>(a.grad_weight)[at] = static_cast<float>(sum);
        break;
      case ScalarType::Double:
        static_cast<double*>(a.grad_weight)[at] = static_cast<double>(sum);
        break;
      default:
        static_cast<float*>(a.grad_weight)[at] = static_cast<float>(sum);
    }
  }
}

}  // namespace ncsn
