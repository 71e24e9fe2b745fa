// max_pool5 and max_pool5_backward for the CPU: rows of five, then columns of five, through rows that stay in the cache.
//
// A kernel works on an image of rows x pixels x lanes: one channel of a contiguous sample (one lane), or a block of the
// channels of a channels_last one. Either way a pixel's neighbour lies `lanes` elements on, so one code serves both.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
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
constexpr int64_t kAhead = 3;
constexpr int64_t kTaskElements = 16384;  // some tens of microseconds of work, far above what a thread costs to wake

// --- how the images lie in a tensor ---------------------------------------------------------------

int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

struct Image {
  int64_t offset, rows, pixels, lanes, row_stride, pixel_stride;

  int64_t width() const { return pixels * lanes; }
  int64_t padded_width() const { return divide_up(width(), kVector) * kVector; }
  int64_t reach() const { return kReach * lanes; }
  int64_t bordered_width() const { return padded_width() + 2 * reach(); }
};

// The tasks of a tensor: bands of rows of images, cut without regard to the number of threads.
struct Tasks {
  // A band computes again what lies in its neighbours' nearest rows: few rows only where there are few images.
  static constexpr int64_t kFewImages = 8, kFewRows = 16, kManyRows = 64;
  // A block of channels is as long a run of memory as the caches can hold rows of.
  static constexpr int64_t kRowElements = 8192, kFewChannels = 64;

  int64_t samples, channels, rows, pixels;
  bool channels_last;
  int64_t images, bands;  // of a sample, of an image

  Tasks(int64_t samples, int64_t channels, int64_t rows, int64_t pixels, bool channels_last)
      : samples(samples), channels(channels), rows(rows), pixels(pixels),
        channels_last(channels_last) {
    const int64_t block = std::max(kRowElements / pixels, kFewChannels);
    images = channels_last ? divide_up(channels, block) : channels;
    bands = std::max({rows / kManyRows, std::min(kFewImages / (samples * images), rows / kFewRows),
                      int64_t{1}});
  }

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

// `count` zeroed rows, each on a cache line of its own.
template <typename Lane, int count>
class Rows {
 public:
  explicit Rows(int64_t width) {
    const int64_t pitch = divide_up(width, kVector) * kVector;
    memory_.resize(count * pitch + kVector);
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    Lane* const first = memory_.data() + (64 - address % 64) % 64 / sizeof(Lane);
    for (int i = 0; i < count; ++i) rows_[i] = first + i * pitch;
  }

  Lane* operator[](int64_t row) const { return rows_[row]; }

  // The window goes down one row: the first buffer becomes the last.
  void advance() { std::rotate(rows_, rows_ + 1, rows_ + count); }

 private:
  std::vector<Lane> memory_;
  Lane* rows_[count];
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

// Whether a row in memory serves as it is where a row of the scratch could.
template <typename T>
NCSN_INLINE bool is_scratch(const Image& image) {
  return std::is_same_v<T, LaneOf<T>> && image.pixel_stride == image.lanes &&
         image.width() % kVector == 0;
}

// Everything in a bordered row but the image's own elements.
template <typename Lane>
void set_border(Lane* row, const Image& image, Lane border) {
  std::fill_n(row, image.reach(), border);
  std::fill(row + image.reach() + image.width(), row + image.bordered_width(), border);
}

// --- forward --------------------------------------------------------------------------------------

// PyTorch's rule for a value that comes later in the window than the best so far: of equal ones the first stays, a NaN
// wins over every number, and the last NaN over the others.
template <typename Lane>
NCSN_INLINE Lane better(Lane later, Lane best) {
  const Lane larger = later > best ? later : best;
  return later != later ? later : larger;
}

// Five runs of elements, of which the same places are compared: the rows of a column of windows, or one bordered row and
// its shifts by a pixel.
template <typename Element>
struct Five {
  Element *p0, *p1, *p2, *p3, *p4;

  explicit Five(const Rows<std::remove_const_t<Element>, kWindow>& rows, int64_t offset = 0)
      : p0(rows[0] + offset), p1(rows[1] + offset), p2(rows[2] + offset), p3(rows[3] + offset),
        p4(rows[4] + offset) {}
  Five(Element* row, int64_t lanes)
      : p0(row), p1(row + lanes), p2(row + 2 * lanes), p3(row + 3 * lanes), p4(row + 4 * lanes) {}
};

template <typename Lane>
NCSN_INLINE void find_maxima(Five<const Lane> x, int64_t vectors, Lane* __restrict maxima) {
  for (int64_t i = 0; i < vectors * kVector; ++i) {
    maxima[i] = better(x.p4[i], better(x.p3[i], better(x.p2[i], better(x.p1[i], x.p0[i]))));
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
    Rows<Lane, kAhead + 1> x;
    Rows<Lane, kWindow> maxima;
    Rows<Lane, 1> y;

    explicit Scratch(const Image& widest)
        : x(widest.bordered_width()), maxima(widest.padded_width()), y(widest.padded_width()) {}
  };

  NCSN_INLINE void band(const Image& image, int64_t first, int64_t last, Scratch& scratch) const {
    const Lane border = zero_border ? Lane{0} : -std::numeric_limits<Lane>::infinity();
    for (int k = 0; k <= kAhead; ++k) set_border(scratch.x[k], image, border);
    int64_t loaded = std::max<int64_t>(first - kReach, 0);
    for (int64_t row = first - kReach; row < last + kReach; ++row) {
      for (; loaded <= std::min(row + kAhead, image.rows - 1); ++loaded) {
        load_row(x + image.offset + loaded * image.row_stride, image,
                 scratch.x[loaded % (kAhead + 1)] + image.reach());
      }
      scratch.maxima.advance();
      if (row < 0 || row >= image.rows) {
        std::fill_n(scratch.maxima[kWindow - 1], image.padded_width(), border);
      } else {
        find_maxima(Five<const Lane>(scratch.x[row % (kAhead + 1)], image.lanes),
                    image.padded_width() / kVector, scratch.maxima[kWindow - 1]);
      }
      const int64_t middle = row - kReach;
      if (middle < first) continue;
      T* const out = y + image.offset + middle * image.row_stride;
      Lane* const maxima = is_scratch<T>(image) ? reinterpret_cast<Lane*>(out) : scratch.y[0];
      find_maxima(Five<const Lane>(scratch.maxima), image.padded_width() / kVector, maxima);
      if (!is_scratch<T>(image)) store_row(maxima, image, out);
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

// The maxima and which of the five (or, if none is larger than minus infinity, `none`) each is: the rule of `better`.
template <typename Lane>
NCSN_INLINE void find_argmaxima(Five<const Lane> x, IndexOf<Lane> none, int64_t vectors,
                                Lane* __restrict maxima, IndexOf<Lane>* __restrict at) {
  for (int64_t i = 0; i < vectors * kVector; ++i) {
    const Lane later[kWindow] = {x.p0[i], x.p1[i], x.p2[i], x.p3[i], x.p4[i]};
    Lane best = later[0];
    IndexOf<Lane> where = none;
    for (int k = 1; k < kWindow; ++k) {
      const bool takes_over = (later[k] > best) | (later[k] != later[k]);
      best = takes_over ? later[k] : best;
      where = takes_over ? k : where;
    }
    maxima[i] = best;
    at[i] = where;
  }
}

// `value` where the indices are equal, else 0: in bits, since a compiler makes branches of a choice before an addition.
template <typename Lane>
NCSN_INLINE Lane where_equal(IndexOf<Lane> a, IndexOf<Lane> b, Lane value) {
  IndexOf<Lane> bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits &= -static_cast<IndexOf<Lane>>(a == b);
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}

// Hands a row of grad_y to those of the five rows around it in which the windows have their maxima. For the last of the
// five it is the first contribution.
template <typename Lane>
NCSN_INLINE void distribute(const Lane* __restrict grad_y, const IndexOf<Lane>* __restrict at,
                            int64_t vectors, Five<Lane> sums) {
  Lane *__restrict sum0 = sums.p0, *__restrict sum1 = sums.p1, *__restrict sum2 = sums.p2,
       *__restrict sum3 = sums.p3, *__restrict sum4 = sums.p4;
  for (int64_t i = 0; i < vectors * kVector; ++i) {
    sum0[i] += where_equal<Lane>(at[i], 0, grad_y[i]);
    sum1[i] += where_equal<Lane>(at[i], 1, grad_y[i]);
    sum2[i] += where_equal<Lane>(at[i], 2, grad_y[i]);
    sum3[i] += where_equal<Lane>(at[i], 3, grad_y[i]);
    sum4[i] = where_equal<Lane>(at[i], 4, grad_y[i]);
  }
}

// Each element of a row gathers from the windows of the row whose maximum it is. `sums` and `at` are bordered.
template <typename Lane>
NCSN_INLINE void gather(const Lane* __restrict sums, const IndexOf<Lane>* __restrict at,
                        int64_t lanes, int64_t vectors, Lane* __restrict grad_x) {
  for (int64_t i = 0; i < vectors * kVector; ++i) {
    Lane sum = 0;
    for (int k = 0; k < kWindow; ++k) {
      sum += where_equal<Lane>(at[i + k * lanes], kWindow - 1 - k, sums[i + k * lanes]);
    }
    grad_x[i] = sum;
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
    Rows<Lane, kAhead + 1> x;
    Rows<Lane, kWindow> maxima, sums;
    Rows<Index, kWindow> at;
    Rows<Lane, 1> grad_y, grad_x, y;
    Rows<Index,1> window_at;

    explicit Scratch(const Image& widest)
        : x(widest.bordered_width()), maxima(widest.padded_width()), sums(widest.bordered_width()),
          at(widest.bordered_width()), grad_y(widest.padded_width()),
          grad_x(widest.padded_width()), y(widest.padded_width()), window_at(widest.padded_width()) {}
  };

  NCSN_INLINE void band(const Image& image, int64_t first, int64_t last, Scratch& scratch) const {
    const int64_t vectors = image.padded_width() / kVector, reach = image.reach();
    const Lane border = zero_border ? Lane{0} : -std::numeric_limits<Lane>::infinity();
    for (int k = 0; k <= kAhead; ++k) set_border(scratch.x[k], image, border);
    for (int k = 0; k < kWindow; ++k) {
      std::fill_n(scratch.sums[k], image.bordered_width(), Lane{0});
    }
    std::fill_n(scratch.grad_y[0], image.padded_width(), Lane{0});
    int64_t loaded = std::max<int64_t>(first - 2 * kReach, 0);
    for (int64_t row = first - 2 * kReach; row < last + 2 * kReach; ++row) {
      for (; loaded <= std::min(row + kAhead, image.rows - 1); ++loaded) {
        load_row(x + image.offset + loaded * image.row_stride, image,
                 scratch.x[loaded % (kAhead + 1)] + reach);
      }
      scratch.maxima.advance();
      scratch.at.advance();
      if (row < 0 || row >= image.rows) {
        std::fill_n(scratch.maxima[kWindow - 1], image.padded_width(), border);
      } else {
        Index* const at = scratch.at[kWindow - 1] + reach;
        find_argmaxima<Lane>(Five<const Lane>(scratch.x[row % (kAhead + 1)], image.lanes), 0, vectors,
                       scratch.maxima[kWindow - 1], at);
        if (!zero_border) skip_left_border(image, at);
      }

      const int64_t middle = row - kReach;
      scratch.sums.advance();
      if (middle >= std::max<int64_t>(first - kReach, 0) && middle < image.rows) {
        const T* const in = grad_y + image.offset + middle * image.row_stride;
        if (!is_scratch<T>(image)) load_row(in, image, scratch.grad_y[0]);
        find_argmaxima(Five<const Lane>(scratch.maxima), Index(zero_border ? 0 : std::max<int64_t>(kReach - middle, 0)), vectors, scratch.y[0], scratch.window_at[0]);
        distribute(is_scratch<T>(image) ? reinterpret_cast<const Lane*>(in) : scratch.grad_y[0],
                   scratch.window_at[0], vectors, Five<Lane>(scratch.sums, reach));
      }

      const int64_t top = middle - kReach;
      if (top < first) continue;
      T* const out = grad_x + image.offset + top * image.row_stride;
      Lane* const to = is_scratch<T>(image) ? reinterpret_cast<Lane*>(out) : scratch.grad_x[0];
      gather(scratch.sums[0], scratch.at[0], image.lanes, vectors, to);
      if (!is_scratch<T>(image)) store_row(to, image, out);
    }
  }

  // A border of minus infinity is no part of a window, though in a row of minus infinity nothing is larger.
  NCSN_INLINE static void skip_left_border(const Image& image, Index* at) {
    for (int64_t p = 0; p < std::min<int64_t>(kReach, image.pixels); ++p) {
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
                   padding == "zero", Tasks(x.size(0), x.size(1), x.size(2), x.size(3), is_channels_last(x))});
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
                    static_cast<T*>(grad_x.data_ptr()), padding == "zero", Tasks(x.size(0), x.size(1), x.size(2), x.size(3), is_channels_last(x))});
  });
  return grad_x;
}

}  // namespace
}  // namespace ncsn

STABLE_TORCH_LIBRARY_IMPL(ncsn_fast, CPU, m) {
  m.impl("max_pool5", TORCH_BOX(&ncsn::max_pool5));
  m.impl("max_pool5_backward", TORCH_BOX(&ncsn::max_pool5_backward));
}
