// How planes are cut into tiles for the statistics of a batch, one way for both layouts; and the loops over a tile.
//
// A group is a set of planes that lies in memory as rows of equal length, whose lane l always belongs to channel
// l % group_channels of the group:
//     contiguous                     a plane; rows of kLanes positions, all of one channel
//     channels_last, C % kLanes == 0 kLanes channels of a sample; a row is a position
//     channels_last, any other C     a sample; a row is lcm(C, kLanes) elements, a whole number of positions
// What does not fill a row is the group's short last row. So every loop works on kLanes lanes with a constant for each,
// and a sum over a plane is one accumulator for each lane, folded at the end.
//
// A tile is kLanes lanes of up to kTileRows rows. The cut, the order within a tile and the order in which the tiles'
// sums are added depend on the shape alone, never on the threads: every number of threads gives the same bits, and a
// tile may be any thread's work.

#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "common/geometry.h"
#include "cpu/half.h"
#include "cpu/multiversion.h"
#include "cpu/threads.h"

namespace ncsn {

constexpr int kLanes = 32;  // two to eight vectors: enough sums at a time to hide the latency of an addition
constexpr int64_t kTileRows = 256;
constexpr int64_t kGrain = 16384;  // elements: some microseconds of work, what a thread costs to wake

struct Tile {
  int64_t offset, stride, rows;  // full rows; in elements
  int tail;                      // elements of the short row after them
};

// The channels of a tile's lanes, within its group: first, first + 1, ..., and again from 0 after period - 1.
struct LaneChannels {
  int64_t first, period;
};

struct Planes {
  Geometry geometry;
  int64_t group_channels, groups;  // in a group; of a sample
  int64_t sample_stride, group_stride;
  int64_t row, row_stride;  // elements of a row, and from one row to the next
  int64_t rows, tail;       // full rows of a group; elements of its short row
  int64_t tiles;            // of a group: its blocks of kLanes lanes, for every kTileRows rows

  int64_t blocks() const { return row / kLanes; }
  int64_t all_groups() const { return geometry.samples * groups; }
  int64_t group_elements() const { return group_channels * geometry.spatial; }

  // The block of lanes that a tile of a group is in. (Divisions cost as much as a tile of a small plane.)
  int64_t block(int64_t tile) const { return row == kLanes ? 0 : tile % blocks(); }

  // Whether each group begins where the one before it ends.
  bool consecutive() const { return group_stride == group_elements(); }

  // Where a group begins; the groups are numbered through all samples.
  int64_t offset(int64_t group) const {
    if (consecutive()) return group * group_stride;
    return group / groups * sample_stride + group % groups * group_stride;
  }

  // The entries of a group in an (N, C) array.
  template <typename A>
  A* of_group(A* values, int64_t group) const {
    return values + group * group_channels;
  }

  LaneChannels channels(int64_t tile) const {
    return {row == kLanes ? 0 : block(tile) * kLanes % group_channels, group_channels};
  }

  Tile tile(int64_t group, int64_t index) const {
    const int64_t begin = block(index) * kLanes;
    const int64_t first = row == kLanes ? index * kTileRows : index / blocks() * kTileRows;
    const int64_t last = first + kTileRows;
    return {offset(group) + first * row_stride + begin, row_stride, std::min(last, rows) - first,
            last > rows ? static_cast<int>(std::clamp<int64_t>(tail - begin, 0, kLanes)) : 0};
  }
};

inline Planes cut_planes(const Geometry& g, bool channels_last) {
  Planes p = {g, 1, g.channels, g.elements(), g.spatial, kLanes, kLanes, 0, 0, 0};
  if (channels_last && g.channels % kLanes == 0) {
    p.group_channels = kLanes;
    p.groups = g.channels / kLanes;
    p.group_stride = p.groups == 1 ? g.elements() : kLanes;
    p.row_stride = g.channels;
  } else if (channels_last) {
    p.group_channels = g.channels;
    p.groups = 1;
    p.group_stride = g.elements();
    p.row = p.row_stride = std::lcm(g.channels, static_cast<int64_t>(kLanes));
  }
  p.rows = p.group_elements() / p.row;
  p.tail = p.group_elements() % p.row;
  p.tiles = (p.rows + (p.tail > 0 ? 1 : 0) + kTileRows - 1) / kTileRows * p.blocks();
  return p;
}

// body(begin, end) for ranges that make up 0 .. n - 1, in parallel, if an item costs as much as `elements` elements.
template <typename Body>
void parallel_ranges(int64_t n, int64_t elements, const Body& body) {
  parallel_for(n, std::max<int64_t>(1, kGrain / elements), body);
}

template <typename Body>
void parallel_items(int64_t n, int64_t elements, const Body& body) {
  parallel_ranges(n, elements, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

// A number for each lane.
template <typename A>
struct alignas(64) Lanes {
  A v[kLanes];
};

// The values of the lanes' channels. Inside of the kernels, since wide loads stall on numbers just stored one by one.
template <typename A>
NCSN_KERNEL Lanes<A> spread(const A* values, LaneChannels channels) {
  Lanes<A> lanes;
  if (channels.period == 1) {
    for (int i = 0; i < kLanes; ++i) lanes.v[i] = *values;
  } else if (channels.first + kLanes <= channels.period) {
    for (int i = 0; i < kLanes; ++i) lanes.v[i] = values[channels.first + i];
  } else {
    int64_t channel = channels.first;
    for (int i = 0; i < kLanes; ++i) {
      lanes.v[i] = values[channel];
      if (++channel == channels.period) channel = 0;
    }
  }
  return lanes;
}

// Adds up the sums of a group's tiles, in the order of the tiles and then by halves, to a sum for each of its channels,
// at the beginning of `sums`. (row / group_channels is a power of two, a divisor of kLanes.)
template <typename A>
void fold(A* sums, const Planes& planes) {
  for (int64_t at = planes.row; at < planes.tiles * kLanes; at += planes.row) {
    for (int64_t l = 0; l < planes.row; ++l) sums[l] += sums[at + l];
  }
  if (planes.row == kLanes && planes.group_channels == 1) {  // the same in registers, for small planes
    A a[16], b[8], c[4];
    for (int l = 0; l < 16; ++l) a[l] = sums[l] + sums[16 + l];
    for (int l = 0; l < 8; ++l) b[l] = a[l] + a[8 + l];
    for (int l = 0; l < 4; ++l) c[l] = b[l] + b[4 + l];
    sums[0] = (c[0] + c[2]) + (c[1] + c[3]);
    return;
  }
  for (int64_t half = planes.row / 2; half >= planes.group_channels; half /= 2) {
    for (int64_t l = 0; l < half; ++l) sums[l] += sums[half + l];
  }
}

// Asks for the row that lies some elements after this one; it may lie outside of the tensor.
template <typename T>
NCSN_KERNEL void prefetch_row(const T* row, int64_t ahead) {
#if defined(__GNUC__)
  const auto address = reinterpret_cast<uintptr_t>(row) + static_cast<uintptr_t>(ahead) * sizeof(T);
  for (size_t i = 0; i < kLanes * sizeof(T); i += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(address + i), 0, 2);
  }
#endif
}

// A tile's tail as a full row, the missing lanes filled up.
template <typename T, typename A>
NCSN_KERNEL void pad_tail(const T* tail, int n, const A* padding, A* row) {
  for (int i = 0; i < kLanes; ++i) row[i] = padding[i];
  for (int i = 0; i < n; ++i) row[i] = widen(tail[i]);
}

}  // namespace ncsn
