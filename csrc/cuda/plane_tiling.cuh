// How the planes of a batch are shared out among blocks and threads, one way for both layouts.
//
// A vector is W neighbouring elements: of one plane if x is contiguous, of W planes if it is channels_last (which counts
// planes of one position as well). A team is the threads that share one vector-wide set of planes; rank r of R takes
// vectors r, r + R, r + 2R, ... of it:
//
//     contiguous      a team's planes: 1.  Ranks are neighbouring threads.
//     channels_last   a team's planes: W.  Teams are neighbouring threads, and a row of teams reads one position.
//
// The teams of a block are a slab of neighbouring channels of one sample; the vectors of a plane may be cut into chunks, a
// block each. W is 16 bytes where alignment and sizes allow, else one element: so no vector has a tail.

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common/geometry.h"
#include "cuda/block.cuh"

namespace ncsn {

constexpr int kMaxThreads = 256;  // of a block: three of them share a multiprocessor's registers, 80 for each thread
constexpr int kMaxCluster = 8;  // blocks; what every GPU with clusters can do

// A launch's shape for a kind of planes. The numbers are hypotheses until someone measures.
struct TilingRule {
  int min_ranks;           // on a plane; neighbours read 128 bytes
  int threads;             // of a block, as long as there are planes enough
  int slab_bytes;          // of one position, at least: two sectors of memory
  int64_t preferred_tile;  // bytes of a block's elements: three blocks fit on an SM of an H200
  int64_t least_tile;      // below it a plane is not cut to occupy more SMs
  int64_t wished_blocks;   // for each SM
};

constexpr TilingRule kContiguousRule = {8, 256, 0, 64 * 1024, 4 * 1024, 2};
constexpr TilingRule kChannelsLastRule = {8, 256, 64, 64 * 1024, 4 * 1024, 2};

// What the device can do.
struct DeviceLimits {
  int multiprocessors;
  int64_t shared_memory;  // bytes a block may have
  bool clusters;
};

enum class Spread {
  kBlock,    // a block has whole planes
  kCluster,  // the blocks of a cluster share them
  kSplit,    // statistics and application are launches of their own, the chunks' numbers go through memory
};

struct PlaneTiling {
  Geometry geometry;
  bool last;
  int width;           // elements of a vector
  int teams, ranks;    // powers of two; 32 threads at least
  int together, slots; // ranks of a team that one warp holds, and how many warps' sums a plane has
  int rank_bits, together_bits;  // logarithms: a thread divides by none of these
  int items;           // vectors of a thread, at most
  int chunks;          // of a plane
  int64_t slabs;       // of a sample
  int64_t count, span; // vectors of a plane; of a chunk
  Spread spread;

  NCSN_HD int team_planes() const { return last ? width : 1; }
  NCSN_HD int planes() const { return teams * team_planes(); }
  NCSN_HD int threads() const { return teams * ranks; }

  // Elements of each plane in a chunk; 0 if there are more chunks than vectors.
  NCSN_HD int64_t chunk_size(int64_t chunk) const {
    const int64_t begin = chunk * span, end = begin + span < count ? begin + span : count;
    return begin < end ? (end - begin) * (last ? 1 : width) : 0;
  }

  int64_t tile_bytes(int element_size, int tensors) const {
    return static_cast<int64_t>(threads()) * items * width * element_size * tensors;
  }
};

inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

inline int bits_of_power(int power) {
  int bits = 0;
  while (int64_t{1} << bits < power) ++bits;
  return bits;
}

inline int power_of_two(int64_t n, int64_t limit) {  // the first one from n on, at most limit
  int64_t p = 1;
  while (p < n && p < limit) p *= 2;
  return static_cast<int>(p);
}

// Whether the planes are taken as channels_last: planes of one position are consecutive channels, in either layout.
inline bool taken_as_last(const Geometry& g, bool contiguous) { return !contiguous || g.spatial == 1; }

// Elements of a vector; aligned: all tensors begin at a multiple of 16 bytes.
template <typename T>
int vector_width(const Geometry& g, bool last, bool aligned) {
  const bool wide = aligned && (last ? g.channels : g.spatial) % kWide<T> == 0;
  return wide && !std::is_same_v<T, double> ? kWide<T> : 1;  // float64 need not be fast
}

// The tiling for `tensors` tensors of the geometry that a block must hold. whole: planes may stay in blocks or clusters.
inline PlaneTiling tile_planes(const Geometry& g, bool last, int width, int element_size, int tensors,
                               bool whole, const DeviceLimits& device) {
  const TilingRule& rule = last ? kChannelsLastRule : kContiguousRule;
  PlaneTiling t = {};
  t.geometry = g;
  t.last = last;
  t.width = width;
  t.count = last ? g.spatial : g.spatial / width;
  const int64_t columns = divide_up(g.channels, t.team_planes());  // vectors of a position
  const int64_t most_teams = power_of_two(columns, kMaxThreads);
  const int64_t few_teams =
      std::min<int64_t>(std::max(rule.slab_bytes / (width * element_size), 1), most_teams);
  const int64_t bytes = few_teams * width * element_size * tensors;  // of the slab's vectors at one position
  constexpr int64_t kScratch = 24 * 1024;  // more than the sums, the planes' numbers and rounding up take
  const int64_t most_tile = device.shared_memory - kScratch;
  const int64_t preferred_tile = std::min(rule.preferred_tile, most_tile);
  const int64_t most_vectors = most_tile / bytes, preferred_vectors = preferred_tile / bytes;

  // Vectors of one element are the exception: correct, and not worth more kernels.
  const bool clusters = whole && device.clusters && width > 1;
  int64_t chunks = divide_up(t.count, preferred_vectors);
  if (whole && chunks > 1) chunks = clusters ? power_of_two(chunks, kMaxCluster) : 1;
  const bool split = !whole || divide_up(t.count, chunks) > most_vectors;
  if (split) chunks = divide_up(t.count, preferred_vectors);
  const int64_t wished = rule.wished_blocks * device.multiprocessors;
  const int64_t blocks = g.samples * divide_up(columns, few_teams);
  while ((split || (clusters && chunks < kMaxCluster)) && 2 * blocks * chunks <= wished &&
         t.count * bytes >= 2 * chunks * rule.least_tile) {
    chunks *= 2;
  }
  t.spread = split ? Spread::kSplit : chunks > 1 ? Spread::kCluster : Spread::kBlock;
  t.chunks = static_cast<int>(chunks);
  t.span = divide_up(t.count, chunks);

  t.ranks = power_of_two(divide_up(t.span, 4), rule.threads / few_teams);
  t.ranks = std::max(t.ranks, power_of_two(last ? width : t.count, rule.min_ranks));
  t.teams = static_cast<int>(
      std::min(std::max<int64_t>(rule.threads / t.ranks, few_teams), most_teams));
  t.items = static_cast<int>(divide_up(t.span, t.ranks));
  // Wide slabs only of small planes, and only if there are samples enough.
  while (t.teams > few_teams &&
         (t.tile_bytes(element_size, tensors) > preferred_tile / 2 ||
          g.samples * divide_up(columns, t.teams) * chunks < device.multiprocessors)) {
    t.teams /= 2;
  }
  const int missing = static_cast<int>(kWarp) / (t.teams * t.ranks);
  if (missing > 1) {
    t.ranks *= missing;
    t.items = static_cast<int>(divide_up(t.span, t.ranks));
  }
  t.slabs = divide_up(columns, t.teams);
  constexpr int kLanes = static_cast<int>(kWarp);
  t.together = std::min(t.last ? std::max(kLanes / t.teams, 1) : kLanes, t.ranks);
  t.slots = t.ranks / t.together;
  t.rank_bits = bits_of_power(t.ranks);
  t.together_bits = bits_of_power(t.together);
  return t;
}

// A block's part of one sample.
struct BlockPart {
  int64_t chunk, channel;  // the slab's first channel

  NCSN_HD BlockPart(const PlaneTiling& t, unsigned block_x) : chunk(0), channel(0) {
    unsigned slab = block_x;
    if (t.chunks > 1) {  // the one division there is
      slab = block_x / static_cast<unsigned>(t.chunks);
      chunk = block_x - slab * static_cast<unsigned>(t.chunks);
    }
    channel = static_cast<int64_t>(slab) * t.planes();
  }
};

// A thread's part of that: `items` vectors, the first at `offset` from the sample's beginning, `stride` elements apart.
struct ThreadPart {
  int team, rank, items;
  int64_t offset, stride;

  template <typename Thread>
  NCSN_HD ThreadPart(const PlaneTiling& t, const BlockPart& block, const Thread& thread)
      : team(static_cast<int>(t.last ? thread.x : thread.y)),
        rank(static_cast<int>(t.last ? thread.y : thread.x)) {
    const Geometry& g = t.geometry;
    const int64_t channel = block.channel + static_cast<int64_t>(team) * t.team_planes();
    const int64_t first = block.chunk * t.span + rank;
    const int64_t end = (block.chunk + 1) * t.span < t.count ? (block.chunk + 1) * t.span : t.count;
    const int64_t mine = (end - first + t.ranks - 1) >> t.rank_bits;
    items = channel < g.channels && first < end ? static_cast<int>(mine) : 0;
    offset = t.last ? first * g.channels + channel : channel * g.spatial + first * t.width;
    stride = t.ranks * (t.last ? g.channels : static_cast<int64_t>(t.width));
  }
};

// Adds up K numbers for each of a team's planes over the ranks in this warp, and leaves the sums in `cells`, an array of
// slots x planes for each of the K. The order depends on the tiling alone.
template <int K, int kPlanes, typename A, typename Cell, typename Thread>
NCSN_HD void sum_in_warps(const PlaneTiling& t, const ThreadPart& part, const Thread& thread,
                          A (&sums)[K][kPlanes], Cell* cells) {
  const int together = t.together, lanes = t.last ? t.teams : 1;
  for (int step = 1; step < together; step *= 2) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
#pragma unroll
      for (int p = 0; p < kPlanes; ++p) {
        sums[k][p] += thread.shuffle_xor(sums[k][p], static_cast<unsigned>(step * lanes));
      }
    }
  }
  if ((part.rank & (together - 1)) != 0) return;
  const int at = (part.rank >> t.together_bits) * t.planes() + part.team * kPlanes;
#pragma unroll
  for (int k = 0; k < K; ++k) {
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) cells[k * t.slots * t.planes() + at + p] = sums[k][p];
  }
}

// The k-th sum of a plane of the block, after a barrier.
template <typename A, typename Cell>
NCSN_HD A sum_of_plane(const PlaneTiling& t, const Cell* cells, int k, int plane) {
  const Cell* first = cells + k * t.slots * t.planes() + plane;
  A sum = *first;
  for (int s = 1; s < t.slots; ++s) sum += static_cast<A>(first[s * t.planes()]);
  return sum;
}

}  // namespace ncsn
