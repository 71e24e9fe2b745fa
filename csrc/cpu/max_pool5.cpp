// max_pool5 and max_pool5_backward for the CPU: rows of five, then columns of five, through rows that stay in the cache.
//
// A kernel works on an image of rows x pixels x lanes: one channel of a contiguous sample (one lane), or a block of the
// channels of a channels_last one. Either way a pixel's neighbour lies `lanes` elements on, so one code serves both.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "common/batch.h"
#include "cpu/simd.h"

#define NCSN_INLINE inline __attribute__((always_inline))

namespace ncsn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kWindow = 5, kReach = 2;
constexpr int64_t kVector = 16;  // rows of the scratch are padded to a multiple of it, so that loops have no remainder
constexpr int64_t kBlockChannels = 32;  // whole cache lines of channels_last memory
constexpr int64_t kBandRows = 64;       // of an image that one task takes; a band also reads its neighbours' nearest rows
constexpr int64_t kTaskElements = 16384;  // some tens of microseconds of work, far above what a thread costs to wake

// --- how the images lie in a tensor ---------------------------------------------------------------

int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

struct Image {
  int64_t offset, rows, pixels, lanes, row_stride, pixel_stride;

  int64_t width() const { return pixels * lanes; }
  int64_t padded_width() const { return divide_up(width(), kVector) * kVector; }
  int64_t reach() const { return kReach * lanes; }
};

// The tasks of a tensor: bands of rows of images, cut without regard to the number of threads.
struct Tasks {
  int64_t samples, channels, rows, pixels;
  bool channels_last;
  int64_t images, bands;  // of a sample, of an image

  explicit Tasks(const Tensor& x)
      : samples(x.size(0)), channels(x.size(1)), rows(x.size(2)), pixels(x.size(3)),
        // Asked first: images of one pixel are both, and are better taken as lanes.
        channels_last(is_channels_last(x)),
        images(channels_last ? divide_up(channels, kBlockChannels) : channels),
        bands(divide_up(rows, kBandRows)) {}

  int64_t count() const { return samples * images * bands; }
  int64_t grain() const {
    return std::max<int64_t>(1, kTaskElements * images * bands / (channels * rows * pixels));
  }
  int64_t first_row(int64_t task) const { return task % bands * rows / bands; }
  int64_t last_row(int64_t task) const { return (task % bands + 1) * rows / bands; }

  Image image(int64_t task) const {
    const int64_t sample = task / bands / images, i = task / bands % images;
    const int64_t offset = sample * channels * rows * pixels;
    if (!channels_last) return {offset + i * rows * pixels, rows, pixels, 1, pixels, 1};
    const int64_t first = i * channels / images, last = (i + 1) * channels / images;
    return {offset + first, rows, pixels, last - first, pixels * channels, channels};
  }

  // The widest, for which the scratch is made.
  Image widest() const {
    return {0, rows, pixels, channels_last ? divide_up(channels, images) : 1, 0, 0};
  }
};

// --- rows of the scratch --------------------------------------------------------------------------

// What is compared and added: half precision as float32, which is exact.
template <typename T>
using LaneOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

// As wide as a lane, so that a comparison of indices is a mask of lanes.
template <typename Lane>
using IndexOf = std::conditional_t<std::is_same_v<Lane, double>, int64_t, int32_t>;

// Zeroed rows, each on a cache line of its own.
template <typename Lane>
class Rows {
 public:
  Rows(int64_t count, int64_t width)
      : pitch_(divide_up(width, kVector) * kVector), memory_(count * pitch_ + kVector) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    first_ = memory_.data() + (64 - address % 64) % 64 / sizeof(Lane);
  }
  Rows(const Rows&) = delete;

  Lane* operator[](int64_t row) { return first_ + row * pitch_; }

 private:
  int64_t pitch_;
  std::vector<Lane> memory_;
  Lane* first_;
};

template <typename T, typename Lane>
NCSN_INLINE void load_row(const T* from, const Image& image, Lane* __restrict to) {
  if (image.pixel_stride == image.lanes) {
    for (int64_t i = 0; i < image.width(); ++i) to[i] = static_cast<Lane>(from[i]);
    return;
  }
  for (int64_t p = 0; p < image.pixels; ++p, from += image.pixel_stride, to += image.lanes) {
    for (int64_t i = 0; i < image.lanes; ++i) to[i] = static_cast<Lane>(from[i]);
  }
}

template <typename T, typename Lane>
NCSN_INLINE void store_row(const Lane* __restrict from, const Image& image, T* to) {
  if (image.pixel_stride == image.lanes) {
    for (int64_t i = 0; i < image.width(); ++i) to[i] = static_cast<T>(from[i]);
    return;
  }
  for (int64_t p = 0; p < image.pixels; ++p, from += image.lanes, to += image.pixel_stride) {
    for (int64_t i = 0; i < image.lanes; ++i) to[i] = static_cast<T>(from[i]);
  }
}

// A row with two pixels of border on either side: everything but the row's own elements.
template <typename Lane>
void set_border(Lane* row, const Image& image, Lane border) {
  std::fill_n(row, image.reach(), border);
  std::fill(row + image.reach() + image.width(), row + 2 * image.reach() + image.padded_width(),
            border);
}

// --- forward --------------------------------------------------------------------------------------

// PyTorch's rule for a value that comes later in the window than the best so far: of equal ones the first stays, a NaN
// wins over every number, and the last NaN over the others.
template <typename Lane>
NCSN_INLINE Lane better(Lane later, Lane best) {
  const Lane larger = later > best ? later : best;
  return later != later ? later : larger;
}

// `x` has a border; element i of it is two pixels to the left of element i of the maxima.
template <typename Lane>
NCSN_INLINE void row_maxima(const Lane* __restrict x, int64_t lanes, int64_t vectors,
                            Lane* __restrict maxima) {
  for (int64_t i = 0; i < vectors * kVector; ++i) {
    Lane best = x[i];
    for (int k = 1; k < kWindow; ++k) best = better(x[i + k * lanes], best);
    maxima[i] = best;
  }
}

template <typename Lane>
NCSN_INLINE void column_maxima(const Lane* const (&rows)[kWindow], int64_t vectors,
                               Lane* __restrict maxima) {
  const Lane *row0 = rows[0], *row1 = rows[1], *row2 = rows[2], *row3 = rows[3], *row4 = rows[4];
  for (int64_t i = 0; i < vectors * kVector; ++i) {
    maxima[i] =
        better(row4[i], better(row3[i], better(row2[i], better(row1[i], row0[i]))));
  }
}

template <typename T>
struct Forward {
  using Lane = LaneOf<T>;

  const T* x;
  T* y;
  bool zero_border;
  Tasks tasks;

  struct Scratch {
    Rows<Lane> x, maxima, border, y;

    explicit Scratch(const Image& widest)
        : x(1, widest.padded_width() + 2 * widest.reach()), maxima(kWindow, widest.padded_width()),
          border(1, widest.padded_width()), y(1, widest.padded_width()) {}
  };

  NCSN_INLINE void band(const Image& image, int64_t first, int64_t last, Scratch& scratch) const {
    const int64_t vectors = image.padded_width() / kVector;
    set_border(scratch.x[0], image,
               zero_border ? Lane{0} : -std::numeric_limits<Lane>::infinity());
    int64_t next = std::max<int64_t>(first - kReach, 0);  // row of x
    for (int64_t row = first; row < last; ++row) {
      for (; next < std::min(row + kReach + 1, image.rows); ++next) {
        load_row(x + image.offset + next * image.row_stride, image,
                 scratch.x[0] + image.reach());
        row_maxima(scratch.x[0], image.lanes, vectors, scratch.maxima[next % kWindow]);
      }
      const Lane* rows[kWindow];
      for (int k = 0; k < kWindow; ++k) {
        // A row twice changes no maximum, so the nearest one stands for a border of minus infinity.
        const int64_t r = row - kReach + k, inside = std::clamp<int64_t>(r, 0, image.rows - 1);
        rows[k] = zero_border && r != inside ? scratch.border[0] : scratch.maxima[inside % kWindow];
      }
      column_maxima(rows, vectors, scratch.y[0]);
      store_row(scratch.y[0], image, y + image.offset + row * image.row_stride);
    }
  }

  NCSN_INLINE void operator()(int64_t begin, int64_t end) const {
    Scratch scratch(tasks.widest());
    for (int64_t task = begin; task < end; ++task) {
      band(tasks.image(task), tasks.first_row(task), tasks.last_row(task), scratch);
    }
  }
};

// --- backward -------------------------------------------------------------------------------------

// The rule of `better` as a condition.
template <typename Lane>
NCSN_INLINE bool takes_over(Lane later, Lane best) {
  return (later > best) | (later != later);
}

// Maxima of the windows of a row, and where in its window (0 .. 4) each was found.
template <typename Lane>
NCSN_INLINE void row_maxima_at(const Lane* __restrict x, int64_t lanes, int64_t vectors,
                               Lane* __restrict maxima, IndexOf<Lane>* __restrict at) {
  for (int64_t i = 0; i < vectors * kVector; ++i) {
    Lane best = x[i];
    IndexOf<Lane> where = 0;
    for (int k = 1; k < kWindow; ++k) {
      const Lane later = x[i + k * lanes];
      const bool take = takes_over(later, best);
      best = take ? later : best;
      where = take ? k : where;
    }
    maxima[i] = best;
    at[i] = where;
  }
}

template <typename Lane>
struct RowMaxima {
  const Lane* maxima;
  const IndexOf<Lane>* at;
  IndexOf<Lane> first_index;  // of the row's first element in the window of 25
};

// Where in its window of 25, in row-major order, each maximum was found.
template <typename Lane>
NCSN_INLINE void window_maxima_at(const RowMaxima<Lane> (&rows)[kWindow], int64_t vectors,
                                  IndexOf<Lane>* __restrict at) {
  for (int64_t i = 0; i < vectors * kVector; ++i) {
    Lane best = rows[0].maxima[i];
    IndexOf<Lane> where = rows[0].at[i] + rows[0].first_index;
    for (int k = 1; k < kWindow; ++k) {
      const Lane later = rows[k].maxima[i];
      const bool take = takes_over(later, best);
      best = take ? later : best;
      where = take ? rows[k].at[i] + rows[k].first_index : where;
    }
    at[i] = where;
  }
}

// Adds a row of grad_y to the five rows of grad_x that its windows cover. Each element of grad_x looks for the windows
// whose maximum it is, from left to right: so its sum is in PyTorch's order, and its bits are PyTorch's.
template <typename Lane>
NCSN_INLINE void collect(const Lane* __restrict grad_y, const IndexOf<Lane>* __restrict at,
                         int64_t lanes, int64_t vectors, Lane* const (&rows)[kWindow]) {
  Lane *__restrict row0 = rows[0], *__restrict row1 = rows[1], *__restrict row2 = rows[2],
       *__restrict row3 = rows[3], *__restrict row4 = rows[4];
  for (int64_t i = 0; i < vectors * kVector; ++i) {
    Lane sum0 = row0[i], sum1 = row1[i], sum2 = row2[i], sum3 = row3[i], sum4 = row4[i];
    for (int k = 0; k < kWindow; ++k) {
      const Lane grad = grad_y[i + k * lanes];
      const IndexOf<Lane> index = at[i + k * lanes] - (kWindow - 1 - k);
      sum0 += index == 0 ? grad : Lane{0};
      sum1 += index == 5 ? grad : Lane{0};
      sum2 += index == 10 ? grad : Lane{0};
      sum3 += index == 15 ? grad : Lane{0};
      sum4 += index == 20 ? grad : Lane{0};
    }
    row0[i] = sum0;
    row1[i] = sum1;
    row2[i] = sum2;
    row3[i] = sum3;
    row4[i] = sum4;
  }
}

template <typename T>
struct Backward {
  using Lane = LaneOf<T>;
  using Index = IndexOf<Lane>;

  const T* grad_y;
  const T* x;
  T* grad_x;
  bool zero_border;
  Tasks tasks;

  struct Scratch {
    Rows<Lane> x, maxima, border, grad_y, grad_x;
    Rows<Index> at, border_at, window_at;

    explicit Scratch(const Image& widest)
        : x(1, widest.padded_width() + 2 * widest.reach()), maxima(kWindow, widest.padded_width()),
          border(1, widest.padded_width()), grad_y(1, widest.padded_width() + 2 * widest.reach()),
          grad_x(kWindow, widest.padded_width()), at(kWindow, widest.padded_width()),
          border_at(1, widest.padded_width()),
          window_at(1, widest.padded_width() + 2 * widest.reach()) {}
  };

  NCSN_INLINE void band(const Image& image, int64_t first, int64_t last, Scratch& scratch) const {
    const int64_t vectors = image.padded_width() / kVector;
    set_border(scratch.x[0], image,
               zero_border ? Lane{0} : -std::numeric_limits<Lane>::infinity());
    set_border(scratch.grad_y[0], image, Lane{0});  // so it does not matter what window_at holds there
    for (int k = 0; k < kWindow; ++k) std::fill_n(scratch.grad_x[k], image.padded_width(), Lane{0});

    const int64_t start = std::max<int64_t>(first - kReach, 0);
    int64_t next = std::max<int64_t>(start - kReach, 0);  // row of x
    for (int64_t row = start; row < last + kReach; ++row) {  // row of grad_y
      if (row < image.rows) {
        for (; next < std::min(row + kReach + 1, image.rows); ++next) find_row(image, next, scratch);
        RowMaxima<Lane> rows[kWindow];
        for (int k = 0; k < kWindow; ++k) {
          const int64_t r = row - kReach + k, inside = std::clamp<int64_t>(r, 0, image.rows - 1);
          rows[k] = zero_border && r != inside
                        ? RowMaxima<Lane>{scratch.border[0], scratch.border_at[0], Index(kWindow * k)}
                        : RowMaxima<Lane>{scratch.maxima[inside % kWindow],
                                          scratch.at[inside % kWindow],
                                          Index(kWindow * (k + inside - r))};
        }
        window_maxima_at(rows, vectors, scratch.window_at[0] + image.reach());
        load_row(grad_y + image.offset + row * image.row_stride, image,
                 scratch.grad_y[0] + image.reach());
        Lane* sums[kWindow];
        for (int k = 0; k < kWindow; ++k) sums[k] = sum_row(scratch, row - kReach + k);
        collect(scratch.grad_y[0], scratch.window_at[0], image.lanes, vectors, sums);
      }
      const int64_t done = row - kReach;
      Lane* const sums = sum_row(scratch, done);
      if (done >= first) store_row(sums, image, grad_x + image.offset + done * image.row_stride);
      std::fill_n(sums, image.padded_width(), Lane{0});
    }
  }

  // Rows outside the image have sums too, which nothing reads.
  static Lane* sum_row(Scratch& scratch, int64_t row) {
    return scratch.grad_x[(row + kWindow) % kWindow];
  }

  NCSN_INLINE void find_row(const Image& image, int64_t row, Scratch& scratch) const {
    load_row(x + image.offset + row * image.row_stride, image, scratch.x[0] + image.reach());
    Index* const at = scratch.at[row % kWindow];
    row_maxima_at(scratch.x[0], image.lanes, image.padded_width() / kVector,
                  scratch.maxima[row % kWindow], at);
    // A border of minus infinity is no part of the window, although nothing in a row of minus infinity is larger.
    for (int64_t p = 0; !zero_border && p < std::min<int64_t>(kReach, image.pixels); ++p) {
      for (int64_t i = p * image.lanes; i < (p + 1) * image.lanes; ++i) {
        at[i] = std::max<Index>(at[i], kReach - p);
      }
    }
  }

  NCSN_INLINE void operator()(int64_t begin, int64_t end) const {
    Scratch scratch(tasks.widest());
    for (int64_t task = begin; task < end; ++task) {
      band(tasks.image(task), tasks.first_row(task), tasks.last_row(task), scratch);
    }
  }
};

// --- the SIMD levels ------------------------------------------------------------------------------

template <typename Kernel>
void run_baseline(const Kernel& kernel, int64_t begin, int64_t end) {
  kernel(begin, end);
}

#if NCSN_X86
template <typename Kernel>
NCSN_TARGET_AVX2 void run_avx2(const Kernel& kernel, int64_t begin, int64_t end) {
  kernel(begin, end);
}

template <typename Kernel>
NCSN_TARGET_AVX512 void run_avx512(const Kernel& kernel, int64_t begin, int64_t end) {
  kernel(begin, end);
}
#endif

template <typename Kernel>
void run(const Kernel& kernel) {
  torch::stable::parallel_for(
      0, kernel.tasks.count(), kernel.tasks.grain(), [&](int64_t begin, int64_t end) {
#if NCSN_X86
        switch (simd_level()) {
          case Simd::kAvx512:
            return run_avx512(kernel, begin, end);
          case Simd::kAvx2:
            return run_avx2(kernel, begin, end);
          case Simd::kBaseline:
            break;
        }
#endif
        run_baseline(kernel, begin, end);
      });
}

// --- the operators --------------------------------------------------------------------------------

template <typename T>
struct Type {
  using type = T;
};

template <typename Call>
void for_dtype(ScalarType dtype, const Call& call) {
  switch (dtype) {
    case ScalarType::Float:
      return call(Type<float>{});
    case ScalarType::Double:
      return call(Type<double>{});
    case ScalarType::BFloat16:
      return call(Type<torch::headeronly::BFloat16>{});
    default:
      return call(Type<torch::headeronly::Half>{});
  }
}

void check(const Tensor& x, const std::string& padding) {
  check_like(x, x, "x");
  STD_TORCH_CHECK(x.dim() == 4, "x must have 4 axes, got ", x.dim());
  STD_TORCH_CHECK(is_contiguous(x) || is_channels_last(x), "x must be contiguous or channels_last");
  STD_TORCH_CHECK(padding == "zero" || padding == "neg_inf",
                  "padding must be neg_inf or zero, got ", padding);
}

Tensor max_pool5(Tensor x, std::string padding) {
  check(x, padding);
  Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) return y;
  for_dtype(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    run(Forward<T>{static_cast<const T*>(x.data_ptr()), static_cast<T*>(y.data_ptr()),
                   padding == "zero", Tasks(x)});
  });
  return y;
}

Tensor max_pool5_backward(Tensor grad_y, Tensor x, std::string padding) {
  check(x, padding);
  check_like(grad_y, x, "grad_y");
  STD_TORCH_CHECK(grad_y.scalar_type() == x.scalar_type(), "grad_y must have the dtype of x");
  Tensor grad_x = torch::stable::empty_like(x);
  if (x.numel() == 0) return grad_x;
  const bool same_layout = is_channels_last(x) ? is_channels_last(grad_y) : is_contiguous(grad_y);
  if (!same_layout) {
    Tensor copy = torch::stable::empty_like(x);
    grad_y = torch::stable::copy_(copy, grad_y);
  }
  for_dtype(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    run(Backward<T>{static_cast<const T*>(grad_y.data_ptr()), static_cast<const T*>(x.data_ptr()),
                    static_cast<T*>(grad_x.data_ptr()), padding == "zero", Tasks(x)});
  });
  return grad_x;
}

}  // namespace
}  // namespace ncsn

STABLE_TORCH_LIBRARY_IMPL(ncsn_fast, CPU, m) {
  m.impl("max_pool5", TORCH_BOX(&ncsn::max_pool5));
  m.impl("max_pool5_backward", TORCH_BOX(&ncsn::max_pool5_backward));
}
