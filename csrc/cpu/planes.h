// How planes are cut into tiles for the statistics of a batch, one way for both layouts; and the loops over a tile.
//
// A group is a set of planes that lies in memory as rows of equal length, whose lane l always belongs to channel
// l % group_channels of the group:
//     contiguous                     a plane; rows of kLanes positions, all of one channel
//     channels_last, C % kLanes == 0 kLanes channels of a sample; a row is a position
//     channels_last, any other C     a sample; a row is lcm(C, kLanes) elements, a whole number of positions
// What does not fill a row is the group's short last row. So every loop works on kLanes lanes with a constant for each, and
// a sum over a plane is one accumulator for each lane, folded at the end.
//
// A tile is kLanes lanes of up to kTileRows rows. The cut, the order within a tile and the order in which the tiles' sums
// are added depend on the shape alone, never on the threads: so every number of threads gives the same bits, and a tile
// may be anybody's work.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "common/geometry.h"
#include "cpu/half.h"
#include "cpu/multiversion.h"

namespace ncsn {

constexpr int kLanes = 32;  // two to eight vectors: enough sums at a time to hide the latency of an addition
constexpr int64_t kTileRows = 256;
constexpr int64_t kGrain = 16384;  // elements: some microseconds of work, what a thread costs to wake

struct Tile {
  int64_t offset, stride, rows;  // full rows; in elements
  int tail;                      // elements of the short row after them
};

struct Planes {
  Geometry geometry;
  int64_t group_channels, groups;  // in a group; of a sample
  int64_t group_stride;            // from one group of a sample to the next, in elements
  int64_t row, rows, tail;         // elements of a row; full rows; elements of the short row
  int64_t row_stride;
  int64_t tiles;                   // of a group

  int64_t blocks() const { return row / kLanes; }
  int64_t all_groups() const { return geometry.samples * groups; }
  int64_t group_elements() const { return group_channels * geometry.spatial; }
  // The entries of a group's first channel in an (N, C) array.
  template <typename A>
  A* of_group(A* values, int64_t group) const {
    return values + group * group_channels;
  }

  Tile tile(int64_t group, int64_t index) const {
    const int64_t block = index % blocks(), first = index / blocks() * kTileRows;
    const int64_t last = std::min(first + kTileRows, rows + 1);
    const int64_t tail_here = std::clamp<int64_t>(tail - block * kLanes, 0, kLanes);
    return {group / groups * geometry.elements() + group % groups * group_stride +
                block * kLanes + first * row_stride,
            row_stride, std::min(last, rows) - first,
            last > rows ? static_cast<int>(tail_here) : 0};
  }
};

inline Planes cut_planes(const Geometry& g, bool channels_last) {
  Planes p = {g, 1, g.channels, g.spatial, kLanes, 0, 0, kLanes, 0};
  if (channels_last && g.channels % kLanes == 0) {
    p.group_channels = kLanes;
    p.groups = g.channels / kLanes;
    p.group_stride = kLanes;
    p.row_stride = g.channels;
    p.rows = g.spatial;
  } else {
    if (channels_last) {
      p.group_channels = g.channels;
      p.groups = 1;
      p.row = p.row_stride = std::lcm(g.channels, static_cast<int64_t>(kLanes));
    }
    p.rows = p.group_elements() / p.row;
    p.tail = p.group_elements() % p.row;
  }
  const int64_t rows = p.rows + (p.tail > 0 ? 1 : 0);
  p.tiles = (rows + kTileRows - 1) / kTileRows * p.blocks();
  return p;
}

// body(begin, end) for ranges that make up 0 .. n - 1, in parallel, where one item costs as much as `elements` elements.
template <typename Body>
void parallel_ranges(int64_t n, int64_t elements, const Body& body) {
  torch::stable::parallel_for(0, n, std::max<int64_t>(1, kGrain / elements), body);
}

template <typename Body>
void parallel_items(int64_t n, int64_t elements, const Body& body) {
  parallel_ranges(n, elements, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

// A constant for each lane of a tile, or a sum.
template <typename A>
struct alignas(64) Lanes {
  A v[kLanes];
};

// The group's values, one a channel, for the lanes of one of its blocks.
template <typename A>
Lanes<A> spread(const A* values, const Planes& planes, int64_t tile) {
  Lanes<A> lanes;
  const int64_t period = planes.group_channels;
  int64_t channel = tile % planes.blocks() * kLanes % period;
  for (int i = 0; i < kLanes; ++i) {
    lanes.v[i] = values[channel];
    if (++channel == period) channel = 0;
  }
  return lanes;
}

// Adds up the sums of a group's tiles, in the order of the tiles and then by halves, to a sum for each of its channels, at
// the beginning of `sums`. (row / group_channels is a power of two, a divisor of kLanes.)
template <typename A>
void fold(A* sums, const Planes& planes) {
  for (int64_t at = planes.row; at < planes.tiles * kLanes; at += planes.row) {
    for (int64_t l = 0; l < planes.row; ++l) sums[l] += sums[at + l];
  }
  for (int64_t half = planes.row / 2; half >= planes.group_channels; half /= 2) {
    for (int64_t l = 0; l < half; ++l) sums[l] += sums[half + l];
  }
}

// A tile's tail as a full row, the missing lanes filled up.
template <typename T, typename A>
NCSN_KERNEL void pad_tail(const T* tail, int n, const A* padding, A* row) {
  for (int i = 0; i < kLanes; ++i) row[i] = padding[i];
  for (int i = 0; i < n; ++i) row[i] = widen(tail[i]);
}

}  // namespace ncsn
