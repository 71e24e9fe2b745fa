// Elements of a sample in blocks that stay in the first cache, as float32 numbers side by side, whatever their layout and
// type in memory: for updates that go element by element.

#pragma once

#include <algorithm>
#include <cstdint>

#include "common/batch.h"
#include "common/dtype.h"

namespace ncsn {

constexpr int64_t kBlockGroups = 128;  // 512 elements: 2 KiB of each operand
constexpr int64_t kBlock = 4 * kBlockGroups;
constexpr int64_t kBlocksPerTask = 8;  // some tens of microseconds of work, far above what a thread costs to wake

// Calls run(offset of the first element, stride, number, place in the block) for each run of elements first .. last - 1 of a
// sample that lie in one channel.
template <typename Run>
void for_each_run(const Geometry& geometry, const Strides& strides, int64_t sample, int64_t first,
                  int64_t last, const Run& run) {
  for (int64_t e = first; e < last;) {
    const Place place = place_of(geometry, e);
    const int64_t n = std::min(last - e, geometry.spatial - place.position);
    run(offset_of(strides, sample, place), strides.spatial, n, e - first);
    e += n;
  }
}

template <typename T>
void gather(const Operand& from, const Geometry& geometry, int64_t sample, int64_t first,
            int64_t last, float* to) {
  const T* data = static_cast<const T*>(from.data);
  for_each_run(geometry, from.strides, sample, first, last,
               [&](int64_t offset, int64_t stride, int64_t n, int64_t at) {
                 for (int64_t i = 0; i < n; ++i) {
                   to[at + i] = static_cast<float>(data[offset + i * stride]);
                 }
               });
}

// A block of a score or of explicit noise as consecutive float32 numbers: in place if they are that already, else in `buffer`.
inline const float* load(const Operand& from, const Geometry& geometry, int64_t sample, int64_t first,
                  int64_t last, float* buffer) {
  using torch::headeronly::ScalarType;
  if (from.dtype == ScalarType::Float && from.strides.spatial == 1 && geometry.channels == 1) {
    return static_cast<const float*>(from.data) + offset_of(from.strides, sample, {0, first});
  }
  for_dtype(from.dtype, [&](auto type) {
    gather<typename decltype(type)::type>(from, geometry, sample, first, last, buffer);
  });
  return buffer;
}

// The other way: a block back to where it came from.
inline void store(const float* from, const Operand& to, const Geometry& geometry, int64_t sample,
                  int64_t first, int64_t last) {
  float* const data = static_cast<float*>(to.data);
  for_each_run(geometry, to.strides, sample, first, last,
               [&](int64_t offset, int64_t stride, int64_t n, int64_t at) {
                 for (int64_t j = 0; j < n; ++j) data[offset + j * stride] = from[at + j];
               });
}

}  // namespace ncsn
