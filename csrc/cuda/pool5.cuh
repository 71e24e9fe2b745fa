// What the 5x5 pools on CUDA share: which thread does which part of the images, and its loads of five pixels, as functions
// that also run on the host. What is made of the five is in max_pool5.cuh and avg_pool5.cuh.
//
// An image is rows x pixels x lanes: a plane of a contiguous tensor has one lane, an image of a channels_last tensor has
// its channels as lanes. A thread goes down a band of rows with one vector of W elements: W pixels of a plane ("along"), or
// W lanes of one pixel. In every row it makes one number of five pixels, and keeps those of the last five rows in
// registers: ten operations an element instead of twenty-five, no shared memory, no barrier. Its neighbours read the same
// lines of memory at the same time, so that four of five reads are served by the first cache.

#pragma once

#include <cstdint>
#include <type_traits>

#include "common/dtype.h"
#include "cuda/block.cuh"

namespace ncsn {

constexpr int kPoolWindow = 5, kPoolReach = 2;
constexpr int kPoolThreads = 256, kPoolFewThreads = 64;  // of a block; of one where there are too few for all SMs
// Bands are cut until each multiprocessor has so many threads, but not to fewer rows than these.
constexpr int64_t kPoolWishedThreads = 1024, kPoolLeastRows = 8;
// Shorter bands read more rows twice; they are worth it as long as multiprocessors have nothing to do.
constexpr int64_t kPoolShortestBand = 2;

struct PoolTiling {
  int64_t images, rows, pixels, lanes;
  int width;            // elements of a vector
  bool along;           // whether a vector lies along a row
  int64_t row_vectors;
  int64_t bands, band_rows;
  int block;            // threads of a block

  NCSN_HD int64_t threads() const { return images * bands * row_vectors; }
  NCSN_HD bool row_bits32() const { return pixels * lanes <= INT32_MAX; }  // places in a row
};

template <typename T>
PoolTiling tile_pool(int64_t samples, int64_t channels, int64_t rows, int64_t pixels,
                     bool contiguous, bool aligned, int multiprocessors) {
  PoolTiling t = {};
  t.images = contiguous ? samples * channels : samples;
  t.lanes = contiguous ? 1 : channels;
  t.rows = rows;
  t.pixels = pixels;
  const bool wide =
      aligned && !std::is_same_v<T, double> && (contiguous ? pixels : channels) % kWide<T> == 0;
  t.width = wide ? kWide<T> : 1;
  t.along = wide && contiguous;
  t.row_vectors = pixels * t.lanes / t.width;
  t.bands = 1;
  while (t.threads() < kPoolWishedThreads * multiprocessors && rows >= 2 * t.bands * kPoolLeastRows) {
    t.bands *= 2;
  }
  while (t.threads() < int64_t{kPoolFewThreads} * multiprocessors &&
         rows >= 2 * t.bands * kPoolShortestBand) {
    t.bands *= 2;
  }
  t.block = t.threads() < int64_t{kPoolThreads} * multiprocessors ? kPoolFewThreads : kPoolThreads;
  t.band_rows = (rows + t.bands - 1) / t.bands;
  return t;
}

// Calls f(width, along) with what a tiling says as constants.
template <typename T, typename F>
void for_tiling(const PoolTiling& t, const F& f) {
  if constexpr (!std::is_same_v<T, double>) {
    constexpr std::integral_constant<int, kWide<T>> wide = {};
    if (t.along) return f(wide, std::true_type());
    if (t.width > 1) return f(wide, std::false_type());
  }
  f(std::integral_constant<int, 1>(), std::false_type());
}

// A thread's vector in the rows first .. last - 1 of an image.
struct PoolPlace {
  int64_t image, first, last;
  int64_t pixel;   // of the vector, or its first one
  int64_t offset;  // of the vector from the beginning of its row

  NCSN_HD PoolPlace(const PoolTiling& t, int64_t thread) {
    int64_t i, band;
    if (t.threads() <= INT32_MAX) {  // a division of 64 bits takes a hundred instructions
      const auto number = static_cast<uint32_t>(thread), bands = static_cast<uint32_t>(t.bands);
      const uint32_t rest = number / static_cast<uint32_t>(t.row_vectors);
      i = number - rest * static_cast<uint32_t>(t.row_vectors);
      image = rest / bands;
      band = rest - static_cast<uint32_t>(image) * bands;
    } else {
      const int64_t rest = thread / t.row_vectors;
      i = thread - rest * t.row_vectors;
      image = rest / t.bands;
      band = rest - image * t.bands;
    }
    first = band * t.band_rows;
    last = first + t.band_rows < t.rows ? first + t.band_rows : t.rows;
    offset = i * t.width;
    pixel = t.row_bits32() ? static_cast<uint32_t>(offset) / static_cast<uint32_t>(t.lanes)
                           : offset / t.lanes;
  }

  NCSN_HD int64_t at(const PoolTiling& t, int64_t row) const {
    return (image * t.rows + row) * t.pixels * t.lanes + offset;
  }
};

// The five pixels around each element of a vector, in one row.
template <typename E, int W, bool kAlong>
struct PoolRow {
  static constexpr int kSize = kAlong ? W + 2 * kPoolReach : W * kPoolWindow;
  E values[kSize];

  // The neighbours of all elements, dx as below.
  NCSN_HD Vec<E, W> all(int dx) const {
    Vec<E, W> v;
#pragma unroll
    for (int i = 0; i < W; ++i) v.v[i] = at(i, dx);
    return v;
  }

  // The neighbour of element i, dx = 0 .. 4 for the pixels -2 .. 2 from it.
  NCSN_HD E at(int i, int dx) const { return values[kAlong ? i + dx : dx * W + i]; }

  // `outside` stands for what lies beyond the image.
  NCSN_HD PoolRow(const PoolTiling& t, const PoolPlace& place, const E* row, E outside) {
    if constexpr (kAlong) {
      const bool left = place.pixel > 0, right = place.pixel + W < t.pixels;
      const Vec<E, W> middle = load<E, W>(row);
      Vec<E, 2> before = {{outside, outside}}, after = {{outside, outside}};
      if (left) before = load<E, 2>(row - 2);
      if (right) after = load<E, 2>(row + W);
      values[0] = before.v[0];
      values[1] = before.v[1];
#pragma unroll
      for (int i = 0; i < W; ++i) values[2 + i] = middle.v[i];
      values[W + 2] = after.v[0];
      values[W + 3] = after.v[1];
    } else {
#pragma unroll
      for (int dx = 0; dx < kPoolWindow; ++dx) {
        const int64_t pixel = place.pixel + dx - kPoolReach;
        Vec<E, W> v;
        if (pixel >= 0 && pixel < t.pixels) {
          v = load<E, W>(row + (dx - kPoolReach) * t.lanes);
        } else {
#pragma unroll
          for (int i = 0; i < W; ++i) v.v[i] = outside;
        }
#pragma unroll
        for (int i = 0; i < W; ++i) values[dx * W + i] = v.v[i];
      }
    }
  }
};

}  // namespace ncsn
