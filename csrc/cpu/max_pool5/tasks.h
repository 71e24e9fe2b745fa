// How max_pool5 and its backward pass cut their images into tasks. What a task computes is in forward.cpp and in
// backward.cpp.
//
// A kernel works on images of rows x pixels x lanes: one channel of a contiguous sample (one lane), or all channels of
// a channels_last one. Either way a pixel's neighbour lies `lanes` elements on, so one code serves both. Where rows are
// too short for SIMD, the planes of a contiguous tensor are first laid side by side, as lanes.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>

#include "common/batch.h"
#include "cpu/multiversion.h"
#include "cpu/threads.h"

namespace ncsn {
namespace pool5 {

using torch::stable::Tensor;

constexpr int kWindow = 5, kReach = 2;
// Rows of the scratch are padded to a multiple of this many elements: no loop of any SIMD level has a remainder.
constexpr int64_t kVector = 16;
// Rows of few lanes are copied to the scratch this many rows before they are read there at other offsets, since a load
// that crosses two stores waits until both have left for the cache. A power of two, less one.
constexpr int kAhead = 3;

inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Pixels of a row, first .. last - 1.
struct Span {
  int64_t first, last;

  Span grown(int64_t pixels, int64_t reach = kReach) const {
    return {std::max<int64_t>(first - reach, 0), std::min(last + reach, pixels)};
  }
};

// The part of an image that a task computes: first_row .. last_row - 1 of the pixels of `span`.
struct Block {
  int64_t offset;               // of the image's first element
  int64_t rows, pixels, lanes;  // of the image
  int64_t first_row, last_row;
  Span span;

  int64_t at(int64_t row, int64_t pixel) const { return offset + (row * pixels + pixel) * lanes; }
  int64_t ahead() const { return lanes < kVector ? kAhead : 0; }
};

// The tasks of a tensor, cut without regard to the number of threads. A block computes again what its neighbours
// compute near it, so blocks are large where there are enough of them.
struct Tasks {
  static constexpr int64_t kEnough = 8, kFewRows = 16, kManyRows = 64, kFewPixels = 8;
  // Some tens of microseconds of work, far above what a thread costs to wake.
  static constexpr int64_t kTaskElements = 16384;

  // Planes of short rows become the lanes of one image if there are several images of them, and they stay in a cache.
  static constexpr int64_t kShortRow = 32, kManyPlanes = 2 * kVector, kPlaneElements = 4096;

  int64_t images, rows, pixels, lanes;
  int64_t blocks, bands;  // blocks of the pixels of a row, bands of the rows of an image
  int64_t planes = 0;     // of the tensor, if they are laid side by side

  // `row_elements` of a block's row, at most: so that the rows in work fit into a cache.
  Tasks(const Tensor& x, int64_t row_elements) : rows(x.size(2)), pixels(x.size(3)) {
    // Images of one pixel are contiguous as well, and are better taken as lanes.
    const bool channels_last = is_channels_last(x);
    images = x.size(0) * (channels_last ? 1 : x.size(1));
    lanes = channels_last ? x.size(1) : 1;
    if (!channels_last && pixels < kShortRow && rows * pixels <= kPlaneElements &&
        images >= kManyPlanes) {
      planes = images;
      images = divide_up(planes, kVector);
      lanes = kVector;
      blocks = bands = 1;
      return;
    }
    blocks = std::min(divide_up(pixels * lanes, row_elements), pixels / kFewPixels);
    blocks = std::max<int64_t>(blocks, 1);
    bands = std::min(kEnough / (images * blocks), rows / kFewRows);
    bands = std::max({rows / kManyRows, bands, int64_t{1}});
  }

  int64_t count() const { return images * blocks * bands; }
  int64_t grain() const {
    return std::max<int64_t>(1, kTaskElements * blocks * bands / (rows * pixels * lanes));
  }
  int64_t block_pixels() const { return divide_up(pixels, blocks); }

  // Elements of an image made of planes.
  int64_t side_by_side() const { return planes > 0 ? rows * pixels * kVector : 0; }

  Block block(int64_t task) const {
    const int64_t band = task % bands, block = task / bands % blocks, image = task / bands / blocks;
    return {planes > 0 ? 0 : image * rows * pixels * lanes,
            rows,
            pixels,
            lanes,
            band * rows / bands,
            (band + 1) * rows / bands,
            {block * pixels / blocks, (block + 1) * pixels / blocks}};
  }
};

// Some tasks of a pass, forward or backward.
template <typename Pass>
struct TaskRange {
  const Pass& pass;
  int64_t begin, end;

  template <bool kFma>
  NCSN_KERNEL void run() const {
    pass(begin, end);
  }
};

template <typename Pass>
void run_tasks(const Pass& pass) {
  parallel_for(pass.tasks.count(), pass.tasks.grain(), [&](int64_t begin, int64_t end) {
    run_simd(TaskRange<Pass>{pass, begin, end});
  });
}

}  // namespace pool5
}  // namespace ncsn
