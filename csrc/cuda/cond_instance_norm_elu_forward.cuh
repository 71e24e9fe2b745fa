// The forward passes of cond_instance_norm_elu over x, as functions that also run on the host (the tests walk them there).
//
// A block reads its part of x once, into shared memory, every thread its own vectors; sums them for a first mean, sums the
// differences from it for a better mean and the variance (the corrected two-pass algorithm of Chan, Golub, LeVeque), and
// then either writes y from what it holds, or leaves the chunk's moments for the launches that follow.
//
// add_norm_elu is the same passes with kSum: what a block holds is then z = x + bias + residual, added in registers on its
// way to shared memory, rounded, and written out as well.

#pragma once

#include "cuda/activation.cuh"
#include "cuda/cond_instance_norm_elu.cuh"

namespace ncsn {

// What x is the first term of; null where there is no such term.
template <typename T>
struct SumArgs {
  const void* bias;  // (C,)
  torch::headeronly::ScalarType bias_dtype;
  const T* residual;
  T* z;
};

template <typename T>
struct NormForwardArgs {
  PlaneTiling tiling;
  WeightTable weight;
  PlaneArrays<Accumulator<T>> planes;
  const T* x;
  T* y;
  Accumulator<T> eps;
  bool elu;
  SumArgs<T> sum;
};

// The shared memory of a block after its vectors: sums of two kinds, then the planes' numbers.
inline int64_t forward_memory(const PlaneTiling& t, int element_size, int accumulator_size) {
  return t.tile_bytes(element_size, 1) +
         static_cast<int64_t>(2 * t.slots + 3) * t.planes() * accumulator_size;
}

// y = elu((x - centre) * scale + shift) for a vector.
template <bool kElu, typename T, int W, int kPlanes, typename A>
NCSN_HD Vec<T, W> normalised(const Vec<T, W>& x, const A (&centre)[kPlanes],
                             const A (&scale)[kPlanes], const A (&shift)[kPlanes]) {
  Vec<T, W> y;
#pragma unroll
  for (int i = 0; i < W; ++i) {
    const int p = kPlanes == 1 ? 0 : i;
    const A u = multiply_add<true>(static_cast<A>(x.v[i]) - centre[p], scale[p], shift[p]);
    y.v[i] = static_cast<T>(kElu ? elu_for<T>(u) : u);
  }
  return y;
}

// The vectors of z that a thread holds, from x, bias and residual; and to the z of the tensor.
template <typename T, int W, int kPlanes, typename A>
NCSN_HD void add_in(Vec<T, W>* own, int threads, const T* x, const SumArgs<T>& sum, int64_t begin,
                    const ThreadPart& part, const A (&bias)[kPlanes]) {
#pragma unroll 2
  for (int i = 0; i < part.items; ++i) {
    const int64_t at = begin + i * part.stride;
    const Vec<T, W> term = load<T, W>(x + at);
    Vec<T, W> other = {}, z;
    if (sum.residual) other = load<T, W>(sum.residual + at);
#pragma unroll
    for (int j = 0; j < W; ++j) {
      const A with_bias = static_cast<A>(term.v[j]) + bias[kPlanes == 1 ? 0 : j];
      z.v[j] = static_cast<T>(with_bias + static_cast<A>(other.v[j]));
    }
    store_own(own + i * threads, z);
    store(sum.z + at, z);
  }
}

// Statistics of a block's planes, and y if the block or its cluster has all of them.
template <typename T, int W, bool kLast, bool kCluster, bool kSum, typename Thread>
NCSN_HD void norm_forward_block(const NormForwardArgs<T>& a, const Thread& thread) {
  using A = Accumulator<T>;
  constexpr int kPlanes = kLast ? W : 1;
  const PlaneTiling& tiling = a.tiling;
  const Geometry& g = tiling.geometry;
  const BlockPart block(tiling, thread.block_x);
  const ThreadPart part(tiling, block, thread);
  const int planes = tiling.planes(), threads = tiling.threads();
  const int mine = part.team * kPlanes;  // the first of the team's planes in the block
  const int plane = static_cast<int>(thread.index());
  const int64_t channel = block.channel + plane;
  const bool finishes = plane < planes && channel < g.channels;  // one thread a plane
  const A size = static_cast<A>(tiling.chunk_size(block.chunk));

  Vec<T, W>* const own = thread.template own<Vec<T, W>>() + thread.index();
  auto* const sums = thread.template cells<A>(
      static_cast<unsigned>(threads * tiling.items * static_cast<int>(sizeof(Vec<T, W>))));
  auto* const numbers = sums + 2 * tiling.slots * planes;

  A bias[kPlanes] = {};
  if constexpr (kSum) {
    if (a.sum.bias && part.items > 0) {
#pragma unroll
      for (int p = 0; p < kPlanes; ++p) {
        bias[p] = number_at<A>(a.sum.bias, a.sum.bias_dtype, block.channel + mine + p);
      }
    }
  }

  for (int64_t n = thread.block_y; n < g.samples; n += thread.blocks_y) {
    const int64_t begin = n * g.elements() + part.offset;
    if constexpr (kSum) {
      add_in(own, threads, a.x, a.sum, begin, part, bias);
    } else {
      for (int i = 0; i < part.items; ++i) copy_in(own + i * threads, a.x + begin + i * part.stride);
    }
    WeightEntry<A> weight = {0, 0, 0};
    const bool writes = tiling.spread != Spread::kSplit;
    if (finishes && writes) weight = a.weight.template entry<A>(n, channel);
    if constexpr (!kSum) wait_for_copies();

    A first[1][kPlanes] = {};
    for (int i = 0; i < part.items; ++i) {
      const Vec<T, W> x = load<T, W>(own[i * threads].v);
#pragma unroll
      for (int j = 0; j < W; ++j) first[0][kPlanes == 1 ? 0 : j] += static_cast<A>(x.v[j]);
    }
    sum_in_warps(tiling, part, thread, first, sums);
    thread.sync();
    if (plane < planes) {
      numbers[plane] = size > 0 ? sum_of_plane<A>(tiling, sums, 0, plane) / size : A(0);
    }
    thread.sync();

    A centre[kPlanes], moments[2][kPlanes] = {};
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) centre[p] = numbers[mine + p];
    for (int i = 0; i < part.items; ++i) {
      const Vec<T, W> x = load<T, W>(own[i * threads].v);
#pragma unroll
      for (int j = 0; j < W; ++j) {
        const int p = kPlanes == 1 ? 0 : j;
        const A d = static_cast<A>(x.v[j]) - centre[p];
        moments[0][p] += d;
        moments[1][p] = multiply_add<true>(d, d, moments[1][p]);
      }
    }
    sum_in_warps(tiling, part, thread, moments, sums);
    thread.sync();

    // The mean's error, and the sum of squares about the better mean.
    A error = 0, squares = 0;
    if (plane < planes && size > 0) {
      const A sum = sum_of_plane<A>(tiling, sums, 0, plane);
      error = sum / size;
      squares = sum_of_plane<A>(tiling, sums, 1, plane) - sum * error;
    }
    if (!writes) {
      if (finishes) {
        A* const out =
            a.planes.parts + ((n * g.channels + channel) * tiling.chunks + block.chunk) * kForwardParts;
        out[0] = numbers[plane];
        out[1] = error;
        out[2] = squares;
      }
      // The cells and the vectors are written again for the next sample.
      thread.sync();
      continue;
    }
    if constexpr (kCluster) {
      if (plane < planes) {
        numbers[planes + plane] = error;
        numbers[2 * planes + plane] = squares;
      }
      thread.sync_cluster();
    }
    Moments m = {static_cast<double>(size),
                 plane < planes ? static_cast<double>(static_cast<A>(numbers[plane])) +
                                      static_cast<double>(error)
                                : 0.0,
                 static_cast<double>(squares)};
    if constexpr (kCluster) {
      if (finishes) {
        m = {0, 0, 0};
        for (int rank = 0; rank < tiling.chunks; ++rank) {
          const auto r = static_cast<unsigned>(rank);
          const A mean = thread.remote(numbers + plane, r);
          const A its_error = thread.remote(numbers + planes + plane, r);
          m = merge(m, {static_cast<double>(tiling.chunk_size(rank)),
                        static_cast<double>(mean) + static_cast<double>(its_error),
                        static_cast<double>(thread.remote(numbers + 2 * planes + plane, r))});
        }
      }
      thread.sync_cluster();  // the others have read this block's numbers
    }
    if (finishes) {
      const A mean = static_cast<A>(m.mean), rstd = reciprocal_std(m, a.eps);
      const A scale = weight.gamma * rstd;
      numbers[plane] = mean;
      numbers[planes + plane] = scale;
      numbers[2 * planes + plane] =
          weight.beta - static_cast<A>(m.mean - static_cast<double>(mean)) * scale;
      if (block.chunk == 0) {
        a.planes.mean[n * g.channels + channel] = mean;
        a.planes.rstd[n * g.channels + channel] = rstd;
      }
    }
    thread.sync();

    A scale[kPlanes], shift[kPlanes];
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
      centre[p] = numbers[mine + p];
      scale[p] = numbers[planes + mine + p];
      shift[p] = numbers[2 * planes + mine + p];
    }
    T* const y = a.y + begin;
    if (a.elu) {
      for (int i = 0; i < part.items; ++i) {
        const Vec<T, W> x = load<T, W>(own[i * threads].v);
        store(y + i * part.stride, normalised<true>(x, centre, scale, shift));
      }
    } else {
      for (int i = 0; i < part.items; ++i) {
        const Vec<T, W> x = load<T, W>(own[i * threads].v);
        store(y + i * part.stride, normalised<false>(x, centre, scale, shift));
      }
    }
    thread.sync();  // before the next sample: its copies begin at once, its numbers follow
  }
}

// y from the planes' finished numbers: the second pass over x where the first could not keep it. No thread meets another.
template <typename T, int W, bool kLast, typename Thread>
NCSN_HD void norm_apply_block(const NormForwardArgs<T>& a, const Thread& thread) {
  using A = Accumulator<T>;
  constexpr int kPlanes = kLast ? W : 1;
  const Geometry& g = a.tiling.geometry;
  const BlockPart block(a.tiling, thread.block_x);
  const ThreadPart part(a.tiling, block, thread);
  if (part.items == 0) return;
  for (int64_t n = thread.block_y; n < g.samples; n += thread.blocks_y) {
    const int64_t at = n * g.channels + block.channel + part.team * kPlanes;
    const int64_t begin = n * g.elements() + part.offset;
    A centre[kPlanes], scale[kPlanes], shift[kPlanes];
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
      centre[p] = a.planes.mean[at + p];
      scale[p] = a.planes.scale[at + p];
      shift[p] = a.planes.shift[at + p];
    }
#pragma unroll 4
    for (int i = 0; i < part.items; ++i) {
      const int64_t here = begin + i * part.stride;
      const Vec<T, W> x = load<T, W>(a.x + here);
      store(a.y + here, a.elu ? normalised<true>(x, centre, scale, shift)
                              : normalised<false>(x, centre, scale, shift));
    }
  }
}

}  // namespace ncsn
