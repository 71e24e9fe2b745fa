// The backward passes of cond_instance_norm_elu over x and grad_y, as functions that also run on the host.
//
//     grad_u = grad_y * elu'(u),  u = (x - mean) * scale + shift,  scale = gamma * rstd
//     grad_x = scale * (grad_u - average(grad_u) - xhat * average(grad_u * xhat)) + what comes by the channel means
//
// A block holds its parts of x and grad_y in shared memory, sums over them, and writes grad_x from them; u and its slope are
// computed twice, which costs less than keeping them.

#pragma once

#include "cuda/activation.cuh"
#include "cuda/cond_instance_norm_elu.cuh"

namespace ncsn {

template <typename T>
struct NormBackwardArgs {
  PlaneTiling tiling;
  WeightTable weight;
  PlaneArrays<Accumulator<T>> planes;
  const T *x, *grad_y;
  T* grad_x;
  bool elu;
};

// The shared memory of a block after its vectors: sums of two kinds, then the planes' numbers.
inline int64_t backward_memory(const PlaneTiling& t, int element_size, int accumulator_size) {
  return t.tile_bytes(element_size, 2) +
         static_cast<int64_t>(2 * t.slots + 5) * t.planes() * accumulator_size;
}

// What a thread needs to know of its planes.
template <typename A, int kPlanes>
struct TeamNorm {
  A mean[kPlanes], scale[kPlanes], shift[kPlanes];

  // grad_u of an element, and x - mean.
  template <typename T, bool kElu>
  NCSN_HD A gradient(T grad_y, T x, int p, A* centred) const {
    *centred = static_cast<A>(x) - mean[p];
    const A g = static_cast<A>(grad_y);
    if constexpr (!kElu) return g;
    return g * elu_slope_for<T>(multiply_add<true>(*centred, scale[p], shift[p]));
  }
};

// Adds a vector's grad_u, and grad_u * (x - mean), to the sums of its planes.
template <bool kElu, typename T, int W, int kPlanes, typename A>
NCSN_HD void add_gradients(const Vec<T, W>& grad_y, const Vec<T, W>& x,
                           const TeamNorm<A, kPlanes>& norm, A (&sums)[2][kPlanes]) {
#pragma unroll
  for (int i = 0; i < W; ++i) {
    const int p = kPlanes == 1 ? 0 : i;
    A centred;
    const A g = norm.template gradient<T, kElu>(grad_y.v[i], x.v[i], p, &centred);
    sums[0][p] += g;
    sums[1][p] = multiply_add<true>(g, centred, sums[1][p]);
  }
}

// grad_x = scale * (grad_u - average - (x - mean) * slope) + through_mean, for a vector.
template <bool kElu, typename T, int W, int kPlanes, typename A>
NCSN_HD Vec<T, W> gradient_of_x(const Vec<T, W>& grad_y, const Vec<T, W>& x,
                                const TeamNorm<A, kPlanes>& norm, const A (&average)[kPlanes],
                                const A (&slope)[kPlanes], const A (&through_mean)[kPlanes]) {
  Vec<T, W> grad_x;
#pragma unroll
  for (int i = 0; i < W; ++i) {
    const int p = kPlanes == 1 ? 0 : i;
    A d;
    const A g = norm.template gradient<T, kElu>(grad_y.v[i], x.v[i], p, &d);
    const A centred = multiply_add<true>(-d, slope[p], g - average[p]);
    grad_x.v[i] = static_cast<T>(multiply_add<true>(centred, norm.scale[p], through_mean[p]));
  }
  return grad_x;
}

// The sums of a block's planes, and grad_x if the block or its cluster has all of them.
template <typename T, int W, bool kLast, bool kCluster, typename Thread>
NCSN_HD void norm_backward_block(const NormBackwardArgs<T>& a, const Thread& thread) {
  using A = Accumulator<T>;
  constexpr int kPlanes = kLast ? W : 1;
  const PlaneTiling& tiling = a.tiling;
  const Geometry& g = tiling.geometry;
  const BlockPart block(tiling, thread.block_x);
  const ThreadPart part(tiling, block, thread);
  const int planes = tiling.planes(), threads = tiling.threads(), held = threads * tiling.items;
  const int mine = part.team * kPlanes;
  const int plane = static_cast<int>(thread.index());
  const int64_t channel = block.channel + plane;
  const bool finishes = plane < planes && channel < g.channels;  // one thread a plane
  const bool writes = tiling.spread != Spread::kSplit;

  Vec<T, W>* const own_x = thread.template own<Vec<T, W>>() + thread.index();
  Vec<T, W>* const own_grad = own_x + held;
  auto* const sums = thread.template cells<A>(
      static_cast<unsigned>(2 * held * static_cast<int>(sizeof(Vec<T, W>))));
  auto* const numbers = sums + 2 * tiling.slots * planes;

  for (int64_t n = thread.block_y; n < g.samples; n += thread.blocks_y) {
    const int64_t begin = n * g.elements() + part.offset, at = n * g.channels + channel;
    for (int i = 0; i < part.items; ++i) {
      copy_in(own_x + i * threads, a.x + begin + i * part.stride);
      copy_in(own_grad + i * threads, a.grad_y + begin + i * part.stride);
    }
    A rstd = 0;
    if (finishes) {
      rstd = a.planes.rstd[at];
      numbers[plane] = a.planes.mean[at];
      if (writes) {
        const WeightEntry<A> weight = a.weight.template entry<A>(n, channel);
        numbers[planes + plane] = weight.gamma * rstd;
        numbers[2 * planes + plane] = weight.beta;
      } else {
        numbers[planes + plane] = a.planes.scale[at];
        numbers[2 * planes + plane] = a.planes.shift[at];
      }
    }
    wait_for_copies();
    thread.sync();

    TeamNorm<A, kPlanes> norm;
    A totals[2][kPlanes] = {};
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
      norm.mean[p] = numbers[mine + p];
      norm.scale[p] = numbers[planes + mine + p];
      norm.shift[p] = numbers[2 * planes + mine + p];
    }
    if (a.elu) {
      for (int i = 0; i < part.items; ++i) {
        add_gradients<true>(load<T, W>(own_grad[i * threads].v),
                            load<T, W>(own_x[i * threads].v), norm, totals);
      }
    } else {
      for (int i = 0; i < part.items; ++i) {
        add_gradients<false>(load<T, W>(own_grad[i * threads].v),
                            load<T, W>(own_x[i * threads].v), norm, totals);
      }
    }
    sum_in_warps(tiling, part, thread, totals, sums);
    thread.sync();

    A sum = 0, products = 0;
    if (plane < planes) {
      sum = sum_of_plane<A>(tiling, sums, 0, plane);
      products = sum_of_plane<A>(tiling, sums, 1, plane);
    }
    if (!writes) {
      if (finishes) {
        A* const out = a.planes.parts + (at * tiling.chunks + block.chunk) * kBackwardParts;
        out[0] = sum;
        out[1] = products;
      }
      thread.sync();  // the cells and the vectors are written again for the next sample
      continue;
    }
    if constexpr (kCluster) {
      if (plane < planes) {
        numbers[3 * planes + plane] = sum;
        numbers[4 * planes + plane] = products;
      }
      thread.sync_cluster();
      if (finishes) {
        sum = products = 0;
        for (int rank = 0; rank < tiling.chunks; ++rank) {
          sum += thread.remote(numbers + 3 * planes + plane, static_cast<unsigned>(rank));
          products += thread.remote(numbers + 4 * planes + plane, static_cast<unsigned>(rank));
        }
      }
      thread.sync_cluster();  // the others have read this block's sums
    }
    if (finishes) {
      const PlaneGradient<A> gradient(sum, products, rstd, static_cast<A>(g.spatial));
      numbers[3 * planes + plane] = gradient.average;
      numbers[4 * planes + plane] = gradient.slope;
      if (block.chunk == 0) {
        A* const row = a.planes.rows + n * a.weight.columns;
        row[channel] = gradient.grad_gamma;
        row[a.weight.columns - g.channels + channel] = gradient.grad_beta;
      }
    }
    thread.sync();

    A average[kPlanes], slope[kPlanes];
    const A through_mean[kPlanes] = {};
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
      average[p] = numbers[3 * planes + mine + p];
      slope[p] = numbers[4 * planes + mine + p];
    }
    T* const grad_x = a.grad_x + begin;
    for (int i = 0; i < part.items; ++i) {
      const Vec<T, W> grad_y = load<T, W>(own_grad[i * threads].v);
      const Vec<T, W> x = load<T, W>(own_x[i * threads].v);
      store(grad_x + i * part.stride,
            a.elu ? gradient_of_x<true>(grad_y, x, norm, average, slope, through_mean)
                  : gradient_of_x<false>(grad_y, x, norm, average, slope, through_mean));
    }
    thread.sync();  // before the next sample: its copies begin at once, its numbers follow
  }
}

// grad_x from the planes' finished numbers: the second pass over x and grad_y where the first could not keep them.
template <typename T, int W, bool kLast, typename Thread>
NCSN_HD void norm_backward_apply_block(const NormBackwardArgs<T>& a, const Thread& thread) {
  using A = Accumulator<T>;
  constexpr int kPlanes = kLast ? W : 1;
  const Geometry& g = a.tiling.geometry;
  const BlockPart block(a.tiling, thread.block_x);
  const ThreadPart part(a.tiling, block, thread);
  if (part.items == 0) return;
  for (int64_t n = thread.block_y; n < g.samples; n += thread.blocks_y) {
    const int64_t at = n * g.channels + block.channel + part.team * kPlanes;
    const int64_t begin = n * g.elements() + part.offset;
    TeamNorm<A, kPlanes> norm;
    A average[kPlanes], slope[kPlanes], through_mean[kPlanes];
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
      norm.mean[p] = a.planes.mean[at + p];
      norm.scale[p] = a.planes.scale[at + p];
      norm.shift[p] = a.planes.shift[at + p];
      average[p] = a.planes.average[at + p];
      slope[p] = a.planes.slope[at + p];
      through_mean[p] = a.planes.through_mean[at + p];
    }
#pragma unroll 2
    for (int i = 0; i < part.items; ++i) {
      const int64_t here = begin + i * part.stride;
      const Vec<T, W> grad_y = load<T, W>(a.grad_y + here), x = load<T, W>(a.x + here);
      store(a.grad_x + here,
            a.elu ? gradient_of_x<true>(grad_y, x, norm, average, slope, through_mean)
                  : gradient_of_x<false>(grad_y, x, norm, average, slope, through_mean));
    }
  }
}

}  // namespace ncsn
