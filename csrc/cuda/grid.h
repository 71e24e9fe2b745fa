// Which thread does which group of four elements, as functions that also run on the host.
//
// The tests walk every thread of a launch on the CPU through exactly these functions. Nothing here
// launches anything: that is launch.h.

#pragma once

#include <algorithm>

#include "common/geometry.h"

namespace ncsn {

// How a thread reaches the four elements of its group.
enum class Access {
  kVector,        // every tensor flat, aligned, E % 4 == 0: one load or store of four elements
  kChannelMinor,  // x channels_last and S % 4 == 0: neighbouring threads take neighbouring channels
  kGeneric,       // anything else: element by element, groups straddle channels, the last is short
};

constexpr int kThreadsPerBlock = 128;
constexpr int64_t kMaxBlocksY = 65535;  // CUDA's limit on gridDim.y

// x counts the groups of a sample, y the samples: no division finds either. Small samples share a block.
struct Grid {
  unsigned blocks_x, blocks_y, threads_x, threads_y;
};

inline Grid make_grid(const Geometry& geometry) {
  const int64_t groups = geometry.groups();
  const int64_t threads_x = std::min<int64_t>(groups, kThreadsPerBlock);
  const int64_t threads_y = std::min<int64_t>(geometry.samples, kThreadsPerBlock / threads_x);
  const int64_t blocks_x = (groups + threads_x - 1) / threads_x;
  const int64_t blocks_y = (geometry.samples + threads_y - 1) / threads_y;
  return {static_cast<unsigned>(blocks_x), static_cast<unsigned>(std::min(blocks_y, kMaxBlocksY)),
          static_cast<unsigned>(threads_x), static_cast<unsigned>(threads_y)};
}

// One thread's work: the item-th group (in the order of Access) of samples sample, sample + stride, ...
struct ThreadWork {
  int64_t item, sample, sample_stride;
};

NCSN_HD ThreadWork thread_work(const Grid& grid, unsigned block_x, unsigned block_y,
                               unsigned thread_x, unsigned thread_y) {
  return {static_cast<int64_t>(block_x) * grid.threads_x + thread_x,
          static_cast<int64_t>(block_y) * grid.threads_y + thread_y,
          static_cast<int64_t>(grid.blocks_y) * grid.threads_y};
}

struct Group {
  int64_t index;  // the counter's k: elements 4k .. 4k + 3
  int size;       // 4, or fewer at the end of a sample
  Place places[4];
};

template <Access access>
NCSN_HD Group group_of(const Geometry& geometry, int64_t item) {
  Group group;
  if constexpr (access == Access::kChannelMinor) {
    const int64_t quad = item / geometry.channels;
    const int64_t channel = item - quad * geometry.channels;
    group.index = channel * (geometry.spatial / 4) + quad;
    group.size = 4;
    for (int j = 0; j < 4; ++j) group.places[j] = {channel, 4 * quad + j};
  } else if constexpr (access == Access::kVector) {
    group.index = item;
    group.size = 4;
    for (int j = 0; j < 4; ++j) group.places[j] = {0, 4 * item + j};
  } else {
    group.index = item;
    group.size = group_size(geometry, item);
    group.places[0] = place_of(geometry, 4 * item);
    for (int j = 1; j < 4; ++j) group.places[j] = next_place(geometry, group.places[j - 1]);
  }
  return group;
}

// Four elements in one access of at most 16 bytes.
template <typename T>
struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) Packed {
  T v[4];
};

template <typename T>
bool is_packable(const T* data) {
  return reinterpret_cast<uintptr_t>(data) % alignof(Packed<T>) == 0;
}

template <Access access, typename T>
NCSN_HD Quad load_group(const T* data, const Strides& strides, int64_t sample, const Group& group) {
  float v[4];
  if constexpr (access == Access::kVector) {
    const Packed<T> packed = *reinterpret_cast<const Packed<T>*>(
        data + offset_of(strides, sample, group.places[0]));
    for (int j = 0; j < 4; ++j) v[j] = static_cast<float>(packed.v[j]);
  } else {
    for (int j = 0; j < 4; ++j) {
      v[j] = access == Access::kChannelMinor || j < group.size
                 ? static_cast<float>(data[offset_of(strides, sample, group.places[j])])
                 : 0.0f;
    }
  }
  return {v[0], v[1], v[2], v[3]};
}

template <Access access, typename T>
NCSN_HD void store_group(T* data, const Strides& strides, int64_t sample, const Group& group,
                         const Packed<T>& values) {
  if constexpr (access == Access::kVector) {
    *reinterpret_cast<Packed<T>*>(data + offset_of(strides, sample, group.places[0])) = values;
  } else {
    for (int j = 0; j < 4; ++j) {
      if (access == Access::kChannelMinor || j < group.size) {
        data[offset_of(strides, sample, group.places[j])] = values.v[j];
      }
    }
  }
}

}  // namespace ncsn
