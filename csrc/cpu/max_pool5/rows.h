// The rows of max_pool5's scratch, which stay in a cache: how elements get there and back, and how they are compared.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "common/dtype.h"
#include "cpu/max_pool5/tasks.h"

namespace ncsn {
namespace pool5 {

// An unsigned number as wide as an element.
template <typename T>
using BitsOf = std::conditional_t<sizeof(T) == 2, uint16_t,
                                  std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;

constexpr int kSquare = 8;  // elements on a side of what is transposed in registers

// to[j][i] = from[i][j]: every round interleaves row i with row i + 4, and three rounds transpose.
template <typename T>
NCSN_KERNEL void transpose_square(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
  typedef BitsOf<T> Row __attribute__((vector_size(kSquare * sizeof(T))));
  Row rows[kSquare], next[kSquare];
  for (int i = 0; i < kSquare; ++i) std::memcpy(&rows[i], from + i * from_stride, sizeof(Row));
  for (int round = 0; round < 3; ++round) {
    for (int i = 0; i < kSquare / 2; ++i) {
      const Row a = rows[i], b = rows[i + kSquare / 2];
      next[2 * i] = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
      next[2 * i + 1] = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
    }
    for (int i = 0; i < kSquare; ++i) rows[i] = next[i];
  }
  for (int j = 0; j < kSquare; ++j) std::memcpy(to + j * to_stride, &rows[j], sizeof(Row));
#else
  for (int i = 0; i < kSquare; ++i) {
    for (int j = 0; j < kSquare; ++j) to[j * to_stride + i] = from[i * from_stride + j];
  }
#endif
}

// to[j * to_stride + i] = from[i * from_stride + j] for i < m, j < n.
template <typename T>
NCSN_KERNEL void transpose(const T* from, int64_t from_stride, int64_t m, int64_t n, T* to,
                           int64_t to_stride) {
  const int64_t whole_m = m - m % kSquare, whole_n = n - n % kSquare;
  for (int64_t j = 0; j < whole_n; j += kSquare) {
    for (int64_t i = 0; i < whole_m; i += kSquare) {
      transpose_square(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride);
    }
  }
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = i < whole_m ? whole_n : 0; j < n; ++j) {
      to[j * to_stride + i] = from[i * from_stride + j];
    }
  }
}

// The planes of a task as an image in which they lie side by side, and back. The last image has lanes to spare.
template <typename T>
NCSN_KERNEL void to_image(const T* planes, const Tasks& tasks, int64_t task, T* image) {
  const int64_t area = tasks.rows * tasks.pixels, first = task * kVector;
  transpose(planes + first * area, area, std::min(kVector, tasks.planes - first), area, image,
            kVector);
}

template <typename T>
NCSN_KERNEL void from_image(const T* image, const Tasks& tasks, int64_t task, T* planes) {
  const int64_t area = tasks.rows * tasks.pixels, first = task * kVector;
  transpose(image, kVector, area, std::min(kVector, tasks.planes - first), planes + first * area,
            area);
}

// As wide as a lane, so that a comparison of indices is a mask of lanes.
template <typename Lane>
using IndexOf = std::conditional_t<std::is_same_v<Lane, double>, int64_t, int32_t>;

template <typename To, typename From>
NCSN_KERNEL To as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline int64_t padded(int64_t width) { return divide_up(width, kVector) * kVector; }

template <typename Lane>
NCSN_KERNEL void fill_row(Lane* row, int64_t n, Lane value) {
  for (int64_t i = 0; i < padded(n); ++i) row[i] = value;
}

// `count` zeroed rows, each on a cache line of its own.
template <typename Lane, int count>
class Rows {
 public:
  explicit Rows(int64_t width) : width_(padded(width)), memory_(count * width_ + kVector) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    Lane* const first = memory_.data() + (64 - address % 64) % 64 / sizeof(Lane);
    for (int i = 0; i < count; ++i) rows_[i] = first + i * width_;
  }
  Rows(const Rows&) = delete;

  Lane* operator[](int64_t row) const { return rows_[row]; }
  Lane* last() const { return rows_[count - 1]; }

  // Goes down the image: the first buffers become the last, for new rows.
  void advance(int by = 1) { std::rotate(rows_, rows_ + by, rows_ + count); }

  NCSN_KERNEL void fill(Lane value) {
    for (Lane* row : rows_) fill_row(row, width_, value);
  }

 private:
  int64_t width_;
  std::vector<Lane> memory_;
  Lane* rows_[count];
};

template <typename T, typename Lane>
NCSN_KERNEL void load(const T* from, int64_t n, Lane* __restrict to) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<Lane>(from[i]);
}

template <typename T, typename Lane>
NCSN_KERNEL void store(const Lane* __restrict from, int64_t n, T* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(from[i]);
}

// Whether `width` elements in memory serve as they are where a row of the scratch could.
template <typename T>
NCSN_KERNEL bool is_scratch(int64_t width) {
  return std::is_same_v<T, Accumulator<T>> && width % kVector == 0;
}

// The rows of x that the windows of a span reach: from two pixels to the left of it to two to its right, which are
// border where the image ends.
template <typename T>
class Input {
 public:
  using Lane = Accumulator<T>;

  explicit Input(int64_t elements) : rows_(elements) {}

  NCSN_KERNEL void start(const Block& block, Span windows, int64_t first_row, Lane border) {
    const Span there = windows.grown(block.pixels);
    first_ = there.first;
    width_ = (there.last - there.first) * block.lanes;
    place_ = (there.first - (windows.first - kReach)) * block.lanes;
    loaded_ = std::max<int64_t>(first_row, 0);
    if (windows_.first != windows.first || windows_.last != windows.last) rows_.fill(border);
    windows_ = windows;
  }

  // For rows of the image, in their order.
  NCSN_KERNEL const Lane* read(const T* x, const Block& block, int64_t row) {
    for (; loaded_ <= std::min(row + block.ahead(), block.rows - 1); ++loaded_) {
      load(x + block.at(loaded_, first_), width_, rows_[loaded_ & block.ahead()] + place_);
    }
    return rows_[row & block.ahead()];
  }

 private:
  Rows<Lane, kAhead + 1> rows_;
  Span windows_ = {0, 0};  // of the block before: the same ones have the same borders
  int64_t first_, width_, place_, loaded_;
};

// Five runs of elements that are taken together, place by place: five rows, or one row and its shifts by a pixel.
template <typename Element>
struct Five {
  Element *p0, *p1, *p2, *p3, *p4;

  template <int count>
  Five(const Rows<std::remove_const_t<Element>, count>& rows, int64_t first, int64_t offset)
      : p0(rows[first] + offset), p1(rows[first + 1] + offset), p2(rows[first + 2] + offset),
        p3(rows[first + 3] + offset), p4(rows[first + 4] + offset) {}
  Five(Element* row, int64_t lanes)
      : p0(row), p1(row + lanes), p2(row + 2 * lanes), p3(row + 3 * lanes), p4(row + 4 * lanes) {}
};

template <typename Lane>
Lane border_value(bool zero) {
  return zero ? Lane{0} : -std::numeric_limits<Lane>::infinity();
}

// --- comparisons ----------------------------------------------------------------------------------

// PyTorch's rule for a value that comes later in the window than the best so far: of equal ones the first stays, a NaN
// wins over every number, and the last NaN over the others. Without NaN it is one instruction.
template <bool nan, typename Lane>
NCSN_KERNEL Lane better(Lane later, Lane best) {
  const Lane larger = later > best ? later : best;
  return nan && later != later ? later : larger;
}

template <typename T>
NCSN_KERNEL bool has_nan(const T* x, int64_t n) {
  using Bits = std::conditional_t<sizeof(T) == 2, int16_t, IndexOf<Accumulator<T>>>;
  Bits largest = 0;  // magnitude, in bits: those of a NaN are above those of infinity
  for (int64_t i = 0; i < n; ++i) {
    const Bits magnitude = as<Bits>(x[i]) & std::numeric_limits<Bits>::max();
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest > as<Bits>(static_cast<T>(std::numeric_limits<Accumulator<T>>::infinity()));
}

// Whether there is one in a block or within `reach` pixels of it.
template <typename T>
NCSN_KERNEL bool has_nan(const T* x, const Block& block, int64_t reach) {
  const Span span = block.span.grown(block.pixels, reach);
  const int64_t first = std::max<int64_t>(block.first_row - reach, 0);
  const int64_t rows = std::min(block.last_row + reach, block.rows) - first;
  const int64_t width = (span.last - span.first) * block.lanes;
  x += block.at(first, span.first);
  if (span.last - span.first == block.pixels) return has_nan(x, rows * width);
  bool found = false;
  for (int64_t row = 0; row < rows; ++row, x += block.pixels * block.lanes) {
    found |= has_nan(x, width);
  }
  return found;
}

}  // namespace pool5
}  // namespace ncsn
