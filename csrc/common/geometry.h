// Where the elements of a batch lie: the canonical (N, C, S) geometry, strides and groups of four.
//
// A batch is N samples of C channels of S positions (any number of spatial axes, flattened). Element
// e = c * S + s of a sample is numbered in logical C, H, W order, whatever the strides, and group k holds
// elements 4k .. 4k + 3: one call of the generator. A group may straddle channels when S % 4 != 0, and the
// last one may be short. Everything is 64-bit. No tensors and no launch shapes here.

#pragma once

#include <cstdint>

#include "common/philox.h"  // NCSN_HD

namespace ncsn {

struct Geometry {
  int64_t samples, channels, spatial;

  NCSN_HD int64_t elements() const { return channels * spatial; }
  NCSN_HD int64_t groups() const { return (elements() + 3) / 4; }
};

// In elements, not bytes.
struct Strides {
  int64_t sample, channel, spatial;
};

// An element's place inside its sample.
struct Place {
  int64_t channel, position;
};

NCSN_HD int64_t offset_of(const Strides& strides, int64_t sample, Place place) {
  return sample * strides.sample + place.channel * strides.channel +
         place.position * strides.spatial;
}

NCSN_HD Place place_of(const Geometry& geometry, int64_t element) {
  const int64_t channel = element / geometry.spatial;
  return {channel, element - channel * geometry.spatial};
}

// The element after this one, without a division.
NCSN_HD Place next_place(const Geometry& geometry, Place place) {
  const bool wraps = place.position + 1 == geometry.spatial;
  return {place.channel + (wraps ? 1 : 0), wraps ? 0 : place.position + 1};
}

// How many elements group k has: four, or fewer in the last one.
NCSN_HD int group_size(const Geometry& geometry, int64_t group) {
  const int64_t left = geometry.elements() - 4 * group;
  return left < 4 ? static_cast<int>(left) : 4;
}

// All tensors contiguous: a sample is one run of elements. Any rank from 1; the first axis is N.
inline Geometry flat_geometry(const int64_t* sizes, int64_t rank) {
  int64_t elements = 1;
  for (int64_t i = 1; i < rank; ++i) elements *= sizes[i];
  return {sizes[0], 1, elements};
}

// Some tensor channels_last: (N, C, *spatial).
inline Geometry planar_geometry(const int64_t* sizes, int64_t rank) {
  int64_t spatial = 1;
  for (int64_t i = 2; i < rank; ++i) spatial *= sizes[i];
  return {sizes[0], rank > 1 ? sizes[1] : 1, spatial};
}

inline Strides contiguous_strides(const Geometry& g) { return {g.elements(), g.spatial, 1}; }

inline Strides channels_last_strides(const Geometry& g) { return {g.elements(), 1, g.channels}; }

// Whether strides mean a dense tensor in the usual order, or with channels last. The stride of an axis of
// size 1 means nothing, nor does any stride of an empty tensor.
inline bool is_contiguous(const int64_t* sizes, const int64_t* strides, int64_t rank) {
  int64_t expected = 1;
  bool dense = true;
  for (int64_t i = rank - 1; i >= 0; --i) {
    if (sizes[i] == 0) return true;
    if (sizes[i] != 1 && strides[i] != expected) dense = false;
    expected *= sizes[i];
  }
  return dense;
}

inline bool is_channels_last(const int64_t* sizes, const int64_t* strides, int64_t rank) {
  if (rank < 3) return false;
  int64_t expected = 1;
  bool dense = true;
  for (int64_t step = 0; step < rank; ++step) {
    const int64_t axis = step == 0 ? 1 : step == rank - 1 ? 0 : rank - step;
    if (sizes[axis] == 0) return true;
    if (sizes[axis] != 1 && strides[axis] != expected) dense = false;
    expected *= sizes[axis];
  }
  return dense;
}

}  // namespace ncsn
