// What the forward and the backward pass of cond_instance_norm_elu on the CPU share: the checked arguments, the norm as
// a scale and a shift for each plane, and the stages of a pass.
//
// Why the threads do not race: a stage is a loop over tiles, groups, samples or columns. An item writes the sums, the
// table entries or the elements of that tile, group, sample or column, which no other item of the stage reads or
// writes, and parallel_for returns when all are done, before the next stage reads them. Where one task runs all stages
// for its groups, it reads nothing that another task writes.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "common/cond_instance_norm_elu.h"
#include "common/norm_batch.h"
#include "cpu/planes.h"

namespace ncsn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Memory that is written before it is read.
template <typename A>
std::unique_ptr<A[]> scratch(int64_t n) {
  return std::unique_ptr<A[]>(new A[static_cast<size_t>(n)]);
}

struct NormArguments {
  Planes planes;
  std::vector<int64_t> labels;  // one a sample, each checked
  const void* weight;
  ScalarType weight_dtype;
  int64_t weight_rows, weight_columns;
  int64_t row_stride, column_stride;  // of the weight

  bool plusplus() const { return weight_columns == 3 * planes.geometry.channels; }
  int64_t beta_column() const { return weight_columns - planes.geometry.channels; }
};

inline NormArguments norm_arguments(const Tensor& x, const Tensor& labels, const Tensor& weight) {
  const Geometry geometry = check_norm(x, labels, weight);
  // Planes of one position are consecutive channels, in either layout: a row of lanes holds many of them.
  NormArguments a = {cut_planes(geometry, !is_contiguous(x) || geometry.spatial == 1),
                     std::vector<int64_t>(static_cast<size_t>(geometry.samples)),
                     weight.const_data_ptr(),
                     weight.scalar_type(),
                     weight.size(0),
                     weight.size(1),
                     weight.stride(0),
                     weight.stride(1)};
  const int64_t* label = labels.const_data_ptr<int64_t>();
  for (int64_t n = 0; n < std::max(labels.size(0), geometry.samples); ++n) {
    const int64_t row = labels.size(0) == 1 ? *label : label[n * labels.stride(0)];
    if (row < 0 || row >= a.weight_rows) {
      // Python sees a std::out_of_range as an IndexError.
      throw std::out_of_range("labels must be in 0.." + std::to_string(a.weight_rows - 1) +
                              ", got " + std::to_string(row));
    }
    if (n < geometry.samples) a.labels[static_cast<size_t>(n)] = row;
  }
  return a;
}

// The parts of a norm, for one channel of one sample.
template <typename A>
struct WeightEntry {
  A gamma, alpha, beta;  // alpha 0 where there is none
};

// Calls f(c, entry) for the channels first .. last - 1 of a sample.
template <typename A, typename F>
void for_weight_entries(const NormArguments& a, int64_t sample, int64_t first, int64_t last,
                        const F& f) {
  for_dtype(a.weight_dtype, [&](auto type) {
    using W = typename decltype(type)::type;
    const W* row = static_cast<const W*>(a.weight) +
                   a.labels[static_cast<size_t>(sample)] * a.row_stride;
    const int64_t channels = a.planes.geometry.channels, beta = a.beta_column();
    for (int64_t c = first; c < last; ++c) {
      f(c, WeightEntry<A>{static_cast<A>(widen(row[c * a.column_stride])),
                          a.plusplus()
                              ? static_cast<A>(widen(row[(channels + c) * a.column_stride]))
                              : A(0),
                          static_cast<A>(widen(row[(beta + c) * a.column_stride]))});
    }
  });
}

// The means of a sample's planes, normalised over its channels: InstanceNorm++'s m = (mean - middle) * rstd.
struct ChannelMeans {
  double middle, rstd;

  template <typename A>
  A m(A mean) const {
    return static_cast<A>((static_cast<double>(mean) - middle) * rstd);
  }
};

template <typename A>
ChannelMeans channel_means(const A* mean, int64_t channels) {
  double sum = 0, squares = 0;
  for (int64_t c = 0; c < channels; ++c) sum += static_cast<double>(mean[c]);
  const double middle = sum / static_cast<double>(channels);
  for (int64_t c = 0; c < channels; ++c) {
    const double d = static_cast<double>(mean[c]) - middle;
    squares += d * d;
  }
  return {middle, 1 / std::sqrt(squares / static_cast<double>(channels - 1) + kChannelMeanEps)};
}

// u = (x - mean) * scale + shift, for the lanes of a tile.
template <typename A>
struct LaneNorm {
  LaneChannels channels;
  const A *mean, *scale, *shift;  // of the group
};

// The scale and the shift of every plane, arrays of N * C.
template <typename A>
struct Affine {
  std::unique_ptr<A[]> scale, shift;

  explicit Affine(int64_t planes) : scale(scratch<A>(planes)), shift(scratch<A>(planes)) {}

  // For the channels first .. last - 1 of a sample.
  void compute(const NormArguments& a, const A* mean, const A* rstd, int64_t sample, int64_t first,
               int64_t last) {
    const int64_t channels = a.planes.geometry.channels, at = sample * channels;
    ChannelMeans means = {0, 0};
    if (a.plusplus()) means = channel_means(mean + at, channels);
    for_weight_entries<A>(a, sample, first, last, [&](int64_t c, WeightEntry<A> w) {
      scale[at + c] = w.gamma * rstd[at + c];
      shift[at + c] =
          a.plusplus() ? w.gamma * w.alpha * means.m(mean[at + c]) + w.beta : w.beta;
    });
  }

  LaneNorm<A> of_tile(const Planes& planes, int64_t group, int64_t tile, const A* mean) const {
    return {planes.channels(tile), planes.of_group(mean, group),
            planes.of_group<const A>(scale.get(), group),
            planes.of_group<const A>(shift.get(), group)};
  }
};

// Some groups of the batch (numbered through all samples), and the loops of a pass over them. A loop hands every tile
// and every group its two arrays of sums.
template <typename A>
struct Scope {
  const Planes& planes;
  int64_t first_group, groups;
  bool parallel;
  int64_t next_task;  // elements from a row to the next task's, worth a prefetch; 0 if that is no use
  std::unique_ptr<A[]> memory;

  Scope(const Planes& planes, int64_t groups, bool parallel)
      : planes(planes),
        first_group(0),
        groups(groups),
        parallel(parallel),
        next_task(parallel || !planes.consecutive() ? 0 : groups * planes.group_elements()),
        memory(scratch<A>(2 * groups * planes.tiles * kLanes)) {}

  A* sums(int64_t tile) const { return memory.get() + tile * kLanes; }
  A* more_sums(int64_t tile) const { return sums(groups * planes.tiles + tile); }

  // f(group, tile of the group, sums, more sums)
  template <typename F>
  void tiles(const F& f) const {
    if (parallel) {
      return parallel_items(groups * planes.tiles, kTileRows * kLanes, [&](int64_t i) {
        f(first_group + i / planes.tiles, i % planes.tiles, sums(i), more_sums(i));
      });
    }
    for (int64_t g = 0, i = 0; g < groups; ++g) {
      for (int64_t t = 0; t < planes.tiles; ++t, ++i) f(first_group + g, t, sums(i), more_sums(i));
    }
  }

  // f(group, sums of its first tile, more sums of its first tile)
  template <typename F>
  void each_group(const F& f) const {
    each(groups, planes.tiles * kLanes, [&](int64_t i) {
      f(first_group + i, sums(i * planes.tiles), more_sums(i * planes.tiles));
    });
  }

  // f(sample, first channel, last channel): once for each sample that has groups here, with the channels of these.
  template <typename F>
  void each_sample(const F& f) const {
    const int64_t here = std::min(groups, planes.groups);  // groups of a sample
    each(groups / here, here * planes.group_channels, [&](int64_t i) {
      const int64_t group = first_group + i * here;
      const int64_t channel = group % planes.groups * planes.group_channels;
      f(group / planes.groups, channel, channel + here * planes.group_channels);
    });
  }

 private:
  template <typename F>
  void each(int64_t n, int64_t elements, const F& f) const {
    if (parallel) return parallel_items(n, elements, f);
    for (int64_t i = 0; i < n; ++i) f(i);
  }
};

// Runs the stages of a pass, stages(scope), over the whole batch. A task is some groups of one sample that need no
// others' statistics: all of its groups if the means of all planes matter, else as many as fill a part of the first
// cache, so that the end of one plane's sums overlaps with the next plane's. With tasks enough to keep the threads
// evenly busy each runs all stages by itself, with its planes in the cache; else every stage spreads its tiles over the
// threads.
template <typename A, typename Stages>
void run_stages(const NormArguments& a, const Stages& stages) {
  constexpr int64_t kTaskElements = 4096;
  const Planes& planes = a.planes;
  const int64_t fitting = std::max<int64_t>(1, kTaskElements / planes.group_elements());
  const int64_t groups = a.plusplus() ? planes.groups : std::min(fitting, planes.groups);
  const int64_t sample_tasks = (planes.groups + groups - 1) / groups;
  const int64_t tasks = planes.geometry.samples * sample_tasks;
  const int64_t elements = groups * planes.group_elements();
  const int64_t threads = torch::stable::get_num_threads();
  if (tasks == 0) return;
  if (threads > 1 && tasks < 4 * threads && tasks * elements > kGrain) {
    return stages(Scope<A>(planes, planes.all_groups(), true));
  }
  parallel_ranges(tasks, elements, [&](int64_t begin, int64_t end) {
    Scope<A> scope(planes, groups, false);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = t % sample_tasks * groups;
      scope.first_group = t / sample_tasks * planes.groups + first;
      scope.groups = std::min(groups, planes.groups - first);
      stages(scope);
    }
  });
}

}  // namespace ncsn
