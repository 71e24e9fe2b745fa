// max_pool5 and max_pool5_backward for the CPU: rows of five, then columns of five, through rows that stay in a cache.
//
// A kernel works on images of rows x pixels x lanes: one channel of a contiguous sample (one lane), or all channels of
// a channels_last one. Either way a pixel's neighbour lies `lanes` elements on, so one code serves both. Where rows are
// too short for SIMD, the planes of a contiguous tensor are first laid side by side, as lanes.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "common/batch.h"
#include "common/dtype.h"
#include "common/max_pool5.h"
#include "cpu/multiversion.h"

namespace ncsn {
namespace {

using torch::stable::Tensor;

constexpr int kWindow = 5, kReach = 2;
// Rows of the scratch are padded to a multiple of this many elements: no loop of any SIMD level has a remainder.
constexpr int64_t kVector = 16;
// Rows of few lanes are copied to the scratch this many rows before they are read there at other offsets, since a load
// that crosses two stores waits until both have left for the cache. A power of two, less one.
constexpr int kAhead = 3;

int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// --- how the images lie in a tensor ---------------------------------------------------------------

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

// --- rows of the scratch --------------------------------------------------------------------------

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

int64_t padded(int64_t width) { return divide_up(width, kVector) * kVector; }

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

// --- forward --------------------------------------------------------------------------------------

// PyTorch's rule for a value that comes later in the window than the best so far: of equal ones the first stays, a NaN
// wins over every number, and the last NaN over the others. Without NaN it is one instruction.
template <bool nan, typename Lane>
NCSN_KERNEL Lane better(Lane later, Lane best) {
  const Lane larger = later > best ? later : best;
  return nan && later != later ? later : larger;
}

template <bool nan, typename Lane>
NCSN_KERNEL void find_maxima(Five<const Lane> x, int64_t n, Lane* __restrict maxima) {
  for (int64_t i = 0; i < padded(n); ++i) {
    Lane best = better<nan>(x.p1[i], x.p0[i]);
    best = better<nan>(x.p2[i], best);
    best = better<nan>(x.p3[i], best);
    maxima[i] = better<nan>(x.p4[i], best);
  }
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

template <typename T>
struct Forward {
  using Lane = Accumulator<T>;
  static constexpr int64_t kRowElements = 1024;  // five rows of maxima are 20 KiB: the first cache

  const T* x;
  T* y;
  bool zero_border;
  Tasks tasks;

  struct Scratch {
    Input<T> x;
    Rows<Lane, kWindow> maxima;
    Rows<Lane, 1> y;
    std::vector<T> image_x, image_y;

    explicit Scratch(const Tasks& tasks)
        : Scratch(tasks.block_pixels() * tasks.lanes, tasks.lanes) {
      image_x.resize(tasks.side_by_side());
      image_y.resize(tasks.side_by_side());
    }
    Scratch(int64_t n, int64_t lanes) : x(padded(n) + 2 * kReach * lanes), maxima(n), y(n) {}
  };

  template <bool nan>
  NCSN_KERNEL void run(const T* x, T* y, const Block& block, Scratch& scratch) const {
    const Lane border = border_value<Lane>(zero_border);
    const int64_t n = (block.span.last - block.span.first) * block.lanes;
    const int64_t start = block.first_row - kReach;
    scratch.x.start(block, block.span, start, border);
    for (int64_t row = start; row < block.last_row + kReach; ++row) {
      scratch.maxima.advance();
      if (row < 0 || row >= block.rows) {
        fill_row(scratch.maxima.last(), n, border);
      } else {
        find_maxima<nan>(Five<const Lane>(scratch.x.read(x, block, row), block.lanes), n,
                         scratch.maxima.last());
      }
      const int64_t middle = row - kReach;
      if (middle < block.first_row) continue;
      T* const out = y + block.at(middle, block.span.first);
      Lane* const maxima = is_scratch<T>(n) ? reinterpret_cast<Lane*>(out) : scratch.y[0];
      find_maxima<nan>(Five<const Lane>(scratch.maxima, 0, 0), n, maxima);
      if (!is_scratch<T>(n)) store(maxima, n, out);
    }
  }

  NCSN_KERNEL void operator()(int64_t begin, int64_t end) const {
    Scratch scratch(tasks);
    for (int64_t task = begin; task < end; ++task) {
      const Block block = tasks.block(task);
      if (tasks.planes > 0) {
        to_image(x, tasks, task, scratch.image_x.data());
        run(scratch.image_x.data(), scratch.image_y.data(), block, scratch);
        from_image(scratch.image_y.data(), tasks, task, y);
      } else {
        run(x, y, block, scratch);
      }
    }
  }

  NCSN_KERNEL void run(const T* x, T* y, const Block& block, Scratch& scratch) const {
    has_nan(x, block, kReach) ? run<true>(x, y, block, scratch) : run<false>(x, y, block, scratch);
  }
};

// --- backward -------------------------------------------------------------------------------------

// The maxima, by the rule of `better`, and which of the five each is.
template <bool nan, typename Lane>
NCSN_KERNEL void find_argmaxima(Five<const Lane> x, int64_t n, Lane* __restrict maxima,
                                IndexOf<Lane>* __restrict at) {
  for (int64_t i = 0; i < padded(n); ++i) {
    const Lane values[kWindow] = {x.p0[i], x.p1[i], x.p2[i], x.p3[i], x.p4[i]};
    Lane best = values[0];
    IndexOf<Lane> where = 0;
    if constexpr (nan) {
      for (int k = 1; k < kWindow; ++k) {
        const bool takes_over = (values[k] > best) | (values[k] != values[k]);
        best = takes_over ? values[k] : best;
        where = takes_over ? k : where;
      }
    } else {
      for (int k = 1; k < kWindow; ++k) best = better<false>(values[k], best);
      where = kWindow - 1;
      for (int k = kWindow - 2; k >= 0; --k) where = values[k] == best ? k : where;
    }
    maxima[i] = best;
    at[i] = where;
  }
}

// Minus infinity outside the image is no part of a window, though nothing in a window of minus infinity is larger.
template <typename Index>
NCSN_KERNEL void at_least(Index first, int64_t n, Index* at) {
  for (int64_t i = 0; i < n; ++i) at[i] = at[i] < first ? first : at[i];
}

// `value` where the indices are equal, else 0: in bits, since compilers make branches of a choice before an addition.
template <typename Lane>
NCSN_KERNEL Lane where_equal(IndexOf<Lane> a, IndexOf<Lane> b, Lane value) {
  return as<Lane>(as<IndexOf<Lane>>(value) & -static_cast<IndexOf<Lane>>(a == b));
}

// Hands a row of grad_y to those of the five rows around it in which its windows have their maxima. The last of the
// five has no other contribution yet.
template <typename Lane>
NCSN_KERNEL void distribute(const Lane* __restrict grad_y, const IndexOf<Lane>* __restrict at,
                            int64_t n, Five<Lane> sums) {
  Lane *__restrict sum0 = sums.p0, *__restrict sum1 = sums.p1, *__restrict sum2 = sums.p2,
       *__restrict sum3 = sums.p3, *__restrict sum4 = sums.p4;
  for (int64_t i = 0; i < padded(n); ++i) {
    sum0[i] += where_equal<Lane>(at[i], 0, grad_y[i]);
    sum1[i] += where_equal<Lane>(at[i], 1, grad_y[i]);
    sum2[i] += where_equal<Lane>(at[i], 2, grad_y[i]);
    sum3[i] += where_equal<Lane>(at[i], 3, grad_y[i]);
    sum4[i] = where_equal<Lane>(at[i], 4, grad_y[i]);
  }
}

// Each element of a row gathers from the fives of the row whose maximum it is.
template <typename Lane>
NCSN_KERNEL void gather(Five<const Lane> sums, Five<const IndexOf<Lane>> at, int64_t n,
                        Lane* __restrict grad_x) {
  for (int64_t i = 0; i < padded(n); ++i) {
    Lane sum = where_equal<Lane>(at.p0[i], 4, sums.p0[i]);
    sum += where_equal<Lane>(at.p1[i], 3, sums.p1[i]);
    sum += where_equal<Lane>(at.p2[i], 2, sums.p2[i]);
    sum += where_equal<Lane>(at.p3[i], 1, sums.p3[i]);
    grad_x[i] = sum + where_equal<Lane>(at.p4[i], 0, sums.p4[i]);
  }
}

// The gradient goes the way of the maximum back: along the column of a window to the row that had it, then along that
// row. So an element sums over columns of windows first, in an order that depends on nothing else; the sums' last bits
// are not those of PyTorch, which goes over rows of windows.
template <typename T>
struct Backward {
  using Lane = Accumulator<T>;
  using Index = IndexOf<Lane>;
  // Rows are taken in groups, so that five rows around each of them are fetched once for all of them ...
  static constexpr int kGroup = 4, kHeld = kGroup + kWindow - 1;
  // ... in runs of elements that stay in the first cache. The rows themselves fit into the second.
  static constexpr int64_t kChunk = 512, kRowElements = 4096;

  const T* grad_y;
  const T* x;
  T* grad_x;
  bool zero_border;
  Tasks tasks;

  struct Scratch {
    Input<T> x;
    Rows<Lane, kHeld> maxima, sums;
    Rows<Index, kHeld> at;
    Rows<Index, 1> window_at;
    Rows<Lane, 1> window_maxima, grad_y, grad_x;
    std::vector<T> image_x, image_grad_y, image_grad_x;

    explicit Scratch(const Tasks& tasks)
        : Scratch((tasks.block_pixels() + 2 * kReach) * tasks.lanes, tasks.lanes) {
      for (auto* image : {&image_x, &image_grad_y, &image_grad_x}) {
        image->resize(tasks.side_by_side());
      }
    }
    // n: a row of the block with two pixels on either side, whose windows reach into it.
    Scratch(int64_t n, int64_t lanes)
        : x(padded(n) + 2 * kReach * lanes), maxima(n), sums(n + kVector), at(n + kVector),
          window_at(kChunk), window_maxima(kChunk), grad_y(kChunk), grad_x(n) {}
  };

  NCSN_KERNEL void run(const T* grad_y, const T* x, T* grad_x, const Block& block,
                       Scratch& scratch) const {
    has_nan(x, block, 2 * kReach) ? run<true>(grad_y, x, grad_x, block, scratch)
                                  : run<false>(grad_y, x, grad_x, block, scratch);
  }

  template <bool nan>
  NCSN_KERNEL void run(const T* grad_y, const T* x, T* grad_x, const Block& block,
                       Scratch& scratch) const {
    const Span windows = block.span.grown(block.pixels);
    const int64_t n = (windows.last - windows.first) * block.lanes;
    const int64_t width = (block.span.last - block.span.first) * block.lanes;
    // Of the windows in a row of `sums` and `at`, which begins two pixels to the left of the block.
    const int64_t place = (windows.first - (block.span.first - kReach)) * block.lanes;
    const int64_t start = block.first_row - 2 * kReach;
    scratch.x.start(block, windows, start, border_value<Lane>(zero_border));
    scratch.sums.fill(0);
    for (int64_t group = start; group < block.last_row + 2 * kReach; group += kGroup) {
      scratch.maxima.advance(kGroup);
      scratch.at.advance(kGroup);
      scratch.sums.advance(kGroup);
      for (int k = 0; k < kGroup; ++k) {
        const int held = kHeld - kGroup + k;
        find_row<nan>(x, block, windows, group + k, n, scratch.maxima[held], scratch.at[held] + place,
                 scratch);
      }
      for (int64_t i = 0; i < n; i += kChunk) {
        for (int k = 0; k < kGroup; ++k) {
          const int64_t row = group - kReach + k;
          if (row < std::max<int64_t>(block.first_row - kReach, 0)) continue;
          if (row >= std::min(block.last_row + kReach, block.rows)) break;
          hand_down<nan>(grad_y + block.at(row, windows.first) + i, row, k, i, std::min(kChunk, n - i),
                    place, scratch);
        }
      }
      for (int k = 0; k < kGroup; ++k) {
        const int64_t row = group - 2 * kReach + k;
        if (row < block.first_row || row >= block.last_row) continue;
        T* const out = grad_x + block.at(row, block.span.first);
        Lane* const sums = is_scratch<T>(width) ? reinterpret_cast<Lane*>(out) : scratch.grad_x[0];
        gather(Five<const Lane>(scratch.sums[k], block.lanes),
               Five<const Index>(scratch.at[k], block.lanes), width, sums);
        if (!is_scratch<T>(width)) store(sums, width, out);
      }
    }
  }

  // The maxima of a row's fives, and which of the five they are.
  template <bool nan>
  NCSN_KERNEL void find_row(const T* x, const Block& block, Span windows, int64_t row, int64_t n,
                            Lane* maxima, Index* at, Scratch& scratch) const {
    if (row < 0 || row >= block.rows) {
      return fill_row(maxima, n, border_value<Lane>(zero_border));
    }
    find_argmaxima<nan>(Five<const Lane>(scratch.x.read(x, block, row), block.lanes), n, maxima, at);
    if (zero_border) return;
    for (int64_t p = windows.first; p < std::min<int64_t>(kReach, windows.last); ++p) {
      at_least(Index(kReach - p), block.lanes, at + (p - windows.first) * block.lanes);
    }
  }

  // Elements i .. i + n - 1 of a row of windows, the middle one of the held rows k .. k + 4.
  template <bool nan>
  NCSN_KERNEL void hand_down(const T* grad_y, int64_t row, int k, int64_t i, int64_t n,
                             int64_t place, Scratch& scratch) const {
    Index* const at = scratch.window_at[0];
    find_argmaxima<nan>(Five<const Lane>(scratch.maxima, k, i), n, scratch.window_maxima[0], at);
    if (!zero_border && row < kReach) at_least(Index(kReach - row), n, at);
    const Lane* grad = reinterpret_cast<const Lane*>(grad_y);
    if (!is_scratch<T>(n)) {
      Lane* const buffer = scratch.grad_y[0];
      // Past the row there are no windows.
      fill_row(buffer + padded(n) - kVector, kVector, Lane{0});
      load(grad_y, n, buffer);
      grad = buffer;
    }
    distribute(grad, at, n, Five<Lane>(scratch.sums, k, place + i));
  }

  NCSN_KERNEL void operator()(int64_t begin, int64_t end) const {
    Scratch scratch(tasks);
    for (int64_t task = begin; task < end; ++task) {
      const Block block = tasks.block(task);
      if (tasks.planes > 0) {
        to_image(x, tasks, task, scratch.image_x.data());
        to_image(grad_y, tasks, task, scratch.image_grad_y.data());
        run(scratch.image_grad_y.data(), scratch.image_x.data(), scratch.image_grad_x.data(), block,
            scratch);
        from_image(scratch.image_grad_x.data(), tasks, task, grad_x);
      } else {
        run(grad_y, x, grad_x, block, scratch);
      }
    }
  }
};

// --- the operators --------------------------------------------------------------------------------

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
void run(const Pass& pass) {
  torch::stable::parallel_for(0, pass.tasks.count(), pass.tasks.grain(),
                              [&](int64_t begin, int64_t end) {
                                run_simd(TaskRange<Pass>{pass, begin, end});
                              });
}

Tensor max_pool5(Tensor x, int64_t padding) {
  const bool zero_border = check_pool(x, padding);
  Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) return y;
  for_dtype(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    run(Forward<T>{static_cast<const T*>(x.data_ptr()), static_cast<T*>(y.data_ptr()),
                   zero_border, Tasks(x, Forward<T>::kRowElements)});
  });
  return y;
}

Tensor max_pool5_backward(Tensor grad_y, Tensor x, int64_t padding) {
  const bool zero_border = check_pool(x, padding);
  check_like(grad_y, x, "grad_y");
  STD_TORCH_CHECK(grad_y.scalar_type() == x.scalar_type(), "grad_y must have the dtype of x");
  Tensor grad_x = torch::stable::empty_like(x);
  if (x.numel() == 0) return grad_x;
  grad_y = in_layout_of(x, grad_y);
  for_dtype(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    run(Backward<T>{static_cast<const T*>(grad_y.data_ptr()), static_cast<const T*>(x.data_ptr()),
                    static_cast<T*>(grad_x.data_ptr()), zero_border,
                    Tasks(x, Backward<T>::kRowElements)});
  });
  return grad_x;
}

}  // namespace
}  // namespace ncsn

STABLE_TORCH_LIBRARY_IMPL(ncsn_fast, CPU, m) {
  m.impl("max_pool5", TORCH_BOX(&ncsn::max_pool5));
  m.impl("max_pool5_backward", TORCH_BOX(&ncsn::max_pool5_backward));
}
