// The driver of the convolution engine: how a convolution is cut into work for the threads, and the memory it runs on.
//
// Tensors are channels_last float32. A dilation d makes d x d interleaved images, each an ordinary convolution. A strip
// is a part of a row of tiles of one of these; a chunk is some consecutive strips, few enough that what is computed of
// them stays in the second cache. For a chunk the inputs are transformed once, and then, for each panel of outputs, 36
// products and the outputs' transform follow. The weights stream by once a chunk.
//
// Every number is made by the same operations in the same order however strips, chunks and threads are cut: rows of a
// product do not depend on each other. So the number of threads changes no bit, and no sample has an effect on another.
//
// Why the threads do not race: an item of work writes the tiles (in a memory of its thread, or its own place in a shared
// one), the outputs or the panel of weights that are its own, and reads what earlier parallel loops have finished.

#pragma once

#include <torch/csrc/stable/ops.h>

#if defined(__linux__)
#include <unistd.h>
#endif

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "common/elu.h"
#include "cpu/conv3x3.h"
#include "cpu/multiversion.h"

namespace ncsn {

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// --- memory ---------------------------------------------------------------------------------------

enum class Use { kWeights, kSharedInputs, kInputs, kProducts, kRows, kTaps, kGradients,
                 kGradientRows, kWeightGradients, kUses };

// Memory of the calling thread for one use, kept for its next call: fresh memory of this size would have to be mapped
// anew by the system, which costs as much as a small convolution.
inline float* thread_memory(Use use, int64_t floats) {
  constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(float* p) const { ::operator delete[](p, kLine); }
  };
  struct Block {
    std::unique_ptr<float[], Free> memory;
    int64_t floats = 0;
  };
  thread_local Block blocks[static_cast<int>(Use::kUses)];
  Block& block = blocks[static_cast<int>(use)];
  if (block.floats < floats) {
    block.memory.reset();
    block.floats = 0;
    block.memory.reset(static_cast<float*>(
        ::operator new[](static_cast<size_t>(floats) * sizeof(float), kLine)));
    block.floats = floats;
  }
  return block.memory.get();
}

inline int64_t second_cache_bytes() {
  static const int64_t bytes = [] {
    int64_t found = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    found = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return std::clamp<int64_t>(found > 0 ? found : 1 << 20, 1 << 18, 1 << 22);
  }();
  return bytes;
}

// From one position of `rows` transformed tiles or channels to the next: not a power of two, which would put all
// positions of a row into the same few places of a cache.
inline int64_t position_stride(int64_t rows, int64_t width) { return rows * width + 16; }

// --- threads --------------------------------------------------------------------------------------

// f(i) for 0 .. n - 1, spread over the threads in runs of consecutive numbers.
template <typename F>
void parallel_each(int64_t n, const F& f) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

// f(begin, end) for the runs of 0 .. n - 1 that the parts of 0 .. parts - 1 have: for work of two kinds in one loop.
template <typename F>
void share_of(int64_t part, int64_t parts, int64_t n, const F& f) {
  const int64_t begin = n * part / parts, end = n * (part + 1) / parts;
  if (begin < end) f(begin, end);
}

// --- inputs ---------------------------------------------------------------------------------------

struct ConvShape {
  int64_t samples, channels, outputs, height, width, dilation;

  int64_t padded_channels() const { return round_up(channels, kChannelBlock); }
};

// What the convolution reads: x or (x - mean) * scale + shift, with arrays of (samples, channels); or the ELU of it.
struct ConvInput {
  const float* x;
  const float *mean, *scale, *shift;  // null without a norm
  bool elu;
};

template <bool kNorm, bool kElu>
struct InputPixels {
  const float* x;
  int64_t x_stride, pixels, channels;
  const float *mean, *scale, *shift;
  float* out;
  int64_t out_stride;
  int64_t ahead;  // elements to what is read some rows later

  // In the order of the memory, which is what processors fetch ahead.
  template <bool kFma>
  NCSN_KERNEL void run() const {
    for (int64_t p = 0; p < pixels; ++p) {
      const float* const from = x + p * x_stride;
      float* const to = out + p * out_stride;
      const auto soon = reinterpret_cast<uintptr_t>(from) + static_cast<uintptr_t>(ahead * 4);
      for (int64_t c = 0; c < channels; c += 16) {  // may lie outside of the tensor
        __builtin_prefetch(reinterpret_cast<const float*>(soon) + c, 0, 2);
      }
      NCSN_INDEPENDENT
      for (int64_t c = 0; c < channels; ++c) {
        float u = from[c];
        if constexpr (kNorm) u = multiply_add<kFma>(u - mean[c], scale[c], shift[c]);
        to[c] = kElu ? elu<kFma>(u) : u;
      }
    }
  }
};

// --- strips ---------------------------------------------------------------------------------------

struct Strip {
  int64_t sample, phase_row, phase_column;  // the interleaved image
  int64_t rows, columns;                    // its size
  int64_t tile_row, tile_column, tiles;
  int64_t first;  // number of the first tile, counted through all strips

  bool continues(const Strip& above) const {
    return sample == above.sample && phase_row == above.phase_row &&
           phase_column == above.phase_column && tile_column == above.tile_column &&
           tile_row == above.tile_row + 1;
  }
};

// Strips of at most `longest` tiles; those below each other follow each other.
inline std::vector<Strip> cut_strips(const ConvShape& s, int64_t longest) {
  std::vector<Strip> strips;
  int64_t first = 0;
  const int64_t d = s.dilation;
  for (int64_t n = 0; n < s.samples; ++n) {
    for (int64_t py = 0; py < std::min(d, s.height); ++py) {
      for (int64_t px = 0; px < std::min(d, s.width); ++px) {
        const int64_t rows = (s.height - py + d - 1) / d, columns = (s.width - px + d - 1) / d;
        const int64_t across = (columns + kTile - 1) / kTile;
        for (int64_t c = 0; c < across; c += longest) {
          const int64_t tiles = std::min(longest, across - c);
          for (int64_t r = 0; r * kTile < rows; ++r, first += tiles) {
            strips.push_back({n, py, px, rows, columns, r, c, tiles, first});
          }
        }
      }
    }
  }
  return strips;
}

// Consecutive strips, [begin, end), and their tiles.
struct Chunk {
  const Strip *begin, *end;

  int64_t first() const { return begin->first; }
  int64_t tiles() const { return end[-1].first + end[-1].tiles - begin->first; }
};

// Chunks of at most `most` tiles, or one strip; of equal size, as far as can be.
inline std::vector<Chunk> cut_chunks(const Strip* begin, const Strip* end, int64_t most) {
  std::vector<Chunk> chunks;
  if (begin == end) return chunks;
  const int64_t tiles = Chunk{begin, end}.tiles();
  const int64_t count = (tiles + most - 1) / most, fair = (tiles + count - 1) / count;
  for (const Strip* s = begin; s != end; ++s) {
    if (!chunks.empty() && s->first + s->tiles - chunks.back().first() <= fair) {
      chunks.back().end = s + 1;
    } else {
      chunks.push_back({s, s + 1});
    }
  }
  return chunks;
}

// The rows that a strip's tiles are made of, normalised, activated and padded with zeros: those of the tiles and `halo` more on
// each side. A strip below the one before it keeps what both have.
class RowRing {
 public:
  RowRing(const ConvShape& shape, const ConvInput& input, int64_t padded_channels, int64_t halo,
          int64_t longest, Use use)
      : shape_(shape),
        input_(input),
        padded_(padded_channels),
        halo_(halo),
        count_(kTile + 2 * halo),
        row_size_((longest * kTile + 2 * halo) * padded_channels),
        memory_(thread_memory(use, (count_ + 1) * row_size_)) {
    std::memset(zeros(), 0, static_cast<size_t>(row_size_) * sizeof(float));
  }

  void load(const Strip& strip, const float** rows) {
    const bool below = last_ != nullptr && strip.continues(*last_);
    for (int64_t i = 0; i < count_; ++i) {
      const int64_t row = strip.tile_row * kTile - halo_ + i;
      if (row < 0 || row >= strip.rows) {
        rows[i] = zeros();
        continue;
      }
      float* const slot = memory_ + row % count_ * row_size_;
      if (!below || i >= 2 * halo_) fill(strip, row, slot);
      rows[i] = slot;
    }
    last_ = &strip;
  }

 private:
  float* zeros() const { return memory_ + count_ * row_size_; }

  void fill(const Strip& strip, int64_t row, float* out) const {
    const int64_t d = shape_.dilation, channels = shape_.channels, padded = padded_;
    const int64_t left = strip.tile_column * kTile - halo_;
    const int64_t right = left + strip.tiles * kTile + 2 * halo_;
    const int64_t begin = std::max<int64_t>(left, 0), end = std::min(right, strip.columns);
    const auto clear = [&](int64_t from, int64_t to) {
      std::memset(out + (from - left) * padded, 0,
                  static_cast<size_t>((to - from) * padded) * sizeof(float));
    };
    clear(left, begin);
    clear(end, right);
    float* const inside = out + (begin - left) * padded;
    const int64_t y = strip.phase_row + row * d, x = strip.phase_column + begin * d;
    const float* const from =
        input_.x + ((strip.sample * shape_.height + y) * shape_.width + x) * channels;
    const int64_t at = strip.sample * channels, stride = d * channels;
    const int64_t ahead = kTile * d * shape_.width * channels;
    const auto load = [&](auto norm, auto elu) {
      const float *mean = nullptr, *scale = nullptr, *shift = nullptr;
      if constexpr (norm) {
        mean = input_.mean + at;
        scale = input_.scale + at;
        shift = input_.shift + at;
      }
      run_simd(InputPixels<norm, elu>{from, stride, end - begin, channels, mean, scale, shift,
                                      inside, padded, ahead});
    };
    constexpr std::true_type yes;
    constexpr std::false_type no;
    if (input_.mean != nullptr) {
      input_.elu ? load(yes, yes) : load(yes, no);
    } else if (input_.elu) {
      load(no, yes);
    } else {
      for (int64_t p = 0; p < end - begin; ++p) {
        std::memcpy(inside + p * padded, from + p * stride,
                    static_cast<size_t>(channels) * sizeof(float));
      }
    }
    if (channels == padded) return;
    for (int64_t p = 0; p < end - begin; ++p) {
      std::memset(inside + p * padded + channels, 0,
                  static_cast<size_t>(padded - channels) * sizeof(float));
    }
  }

  const ConvShape& shape_;
  const ConvInput& input_;
  int64_t padded_, halo_, count_, row_size_;
  float* memory_;
  const Strip* last_ = nullptr;
};

// --- weights --------------------------------------------------------------------------------------

// Weights g(output, channel, row, column), of any strides.
struct ConvWeights {
  const float* data;
  int64_t output, channel, row, column;  // strides

  bool contiguous_taps() const { return channel == 9 && row == 3 && column == 1; }

  // Those of the gradient: outputs and channels change places, rows and columns run backwards.
  ConvWeights transposed() const {
    return {data + 2 * row + 2 * column, channel, output, -row, -column};
  }
};

// The transformed weights of a convolution, by panels and parts of panels.
//
// They are transformed on every call: nothing can go stale. A cache of them would be four times as large as the weights,
// and where it is not in a processor's cache, reading it takes as long as this does.
class PackedWeights {
 public:
  PackedWeights(const ConvShape& shape, const ConvWeights& weights)
      : kernels_(conv_kernels()), shape_(shape), weights_(weights) {}

  int64_t panels() const { return (shape_.outputs + kernels_.panel - 1) / kernels_.panel; }
  int64_t parts_of_panel() const { return (shape_.channels + kPart - 1) / kPart; }
  int64_t position() const { return position_stride(shape_.channels, kernels_.panel); }
  int64_t panel_size() const { return kPositions * position(); }

  // Part `part` of panel p, to u, which begins with the panel.
  void pack(int64_t p, int64_t part, float* u) const {
    const int64_t width = kernels_.panel, first = part * kPart;
    const int64_t depth = std::min(kPart, shape_.channels - first);
    const int64_t outputs = std::min(width, shape_.outputs - p * width);
    float* const g = thread_memory(Use::kTaps, kPart * 9 * width);
    const float* const from = weights_.data + p * width * weights_.output + first * weights_.channel;
    if (weights_.contiguous_taps() && outputs == width) {
      kernels_.transpose_panel(from, weights_.output, depth * 9, g);
    } else {
      gather(from, depth, outputs, g);
    }
    kernels_.transform_weights(g, depth, u + first * width, position());
  }

 private:
  static constexpr int64_t kPart = 16;  // channels

  void gather(const float* from, int64_t depth, int64_t outputs, float* g) const {
    const ConvWeights& w = weights_;
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t tap = 0; tap < 9; ++tap, g += kernels_.panel) {
        const float* const of_tap = from + k * w.channel + tap / 3 * w.row + tap % 3 * w.column;
        for (int64_t o = 0; o < outputs; ++o) g[o] = of_tap[o * w.output];
        for (int64_t o = outputs; o < kernels_.panel; ++o) g[o] = 0;
      }
    }
  }

  const ConvKernels& kernels_;
  const ConvShape& shape_;
  ConvWeights weights_;
};

// --- the convolution ------------------------------------------------------------------------------

struct ConvOutput {
  float* y;
  const float* bias;      // null for zeros
  const float* residual;  // null for none
};

class Convolver {
 public:
  Convolver(const ConvShape& shape, const PackedWeights& weights, const ConvOutput& output)
      : kernels_(conv_kernels()),
        shape_(shape),
        weights_(weights),
        output_(output),
        bias_(static_cast<size_t>(weights.panels() * kernels_.panel)),
        u_(thread_memory(Use::kWeights, weights.panels() * weights.panel_size())),
        threads_(torch::stable::get_num_threads()),
        most_(most_tiles(shape)),
        strips_(cut_strips(shape, most_)),
        chunks_(cut_chunks(strips_.data(), strips_.data() + strips_.size(), most_)) {
    if (output.bias != nullptr) std::copy_n(output.bias, shape.outputs, bias_.begin());
  }

  // The weights are packed before `run`, in parts 0 .. parts() - 1 by any thread.
  int64_t parts() const { return weights_.panels() * weights_.parts_of_panel(); }

  void pack(int64_t part) const {
    const int64_t n = weights_.parts_of_panel(), p = part / n;
    weights_.pack(p, part % n, u_ + p * weights_.panel_size());
  }

  void run(const ConvInput& input) const {
    const int64_t n = static_cast<int64_t>(chunks_.size()), even = n - n % threads_;
    parallel_each(even, [&](int64_t i) { run_chunk(input, chunks_[static_cast<size_t>(i)]); });
    if (even < n) run_shared(input, chunks_[static_cast<size_t>(even)].begin);
  }

 private:
  static constexpr int64_t kLeastTiles = 16;

  // In a chunk: three eighths of the second cache for its inputs and the products of a panel. (Measured: with more, a
  // panel of weights and the outputs push them out; with less, strips share fewer rows, and weights are read more often.)
  static int64_t most_tiles(const ConvShape& shape) {
    const int64_t floats = kPositions * (shape.padded_channels() + conv_kernels().panel);
    return std::max<int64_t>(kLeastTiles, second_cache_bytes() * 3 / 32 / floats);
  }

  void run_chunk(const ConvInput& input, const Chunk& chunk) const {
    const int64_t channels = shape_.padded_channels();
    const int64_t stride = position_stride(chunk.tiles(), channels);
    float* const v = thread_memory(Use::kInputs, kPositions * stride);
    RowRing ring(shape_, input, channels, 1, most_, Use::kRows);
    for (const Strip* s = chunk.begin; s != chunk.end; ++s) {
      transform_inputs(ring, *s, v + (s->first - chunk.first()) * channels, stride);
    }
    const std::vector<int64_t> places = pixels(chunk);
    for (int64_t p = 0; p < weights_.panels(); ++p) run_panel(chunk, places, p, v, stride);
  }

  // Fewer chunks than threads: these share the inputs' transforms, and then the panels.
  void run_shared(const ConvInput& input, const Strip* begin) const {
    const Strip* const end = strips_.data() + strips_.size();
    const int64_t channels = shape_.padded_channels(), panels = weights_.panels();
    const int64_t first = begin->first, tiles = end[-1].first + end[-1].tiles - first;
    const int64_t stride = position_stride(tiles, channels);
    float* const v = thread_memory(Use::kSharedInputs, kPositions * stride);
    torch::stable::parallel_for(0, end - begin, 1, [&](int64_t from, int64_t to) {
      RowRing ring(shape_, input, channels, 1, most_, Use::kRows);
      for (const Strip* s = begin + from; s != begin + to; ++s) {
        transform_inputs(ring, *s, v + (s->first - first) * channels, stride);
      }
    });
    std::vector<Chunk> chunks = cut_chunks(begin, end, most_);
    if (static_cast<int64_t>(chunks.size()) * panels % threads_ != 0) {
      const int64_t small = std::max(kLeastTiles, tiles * panels / (4 * threads_));
      chunks = cut_chunks(begin, end, std::min(most_, small));
    }
    const int64_t n = static_cast<int64_t>(chunks.size());
    parallel_each(panels * n, [&](int64_t i) {
      const Chunk& chunk = chunks[static_cast<size_t>(i % n)];
      run_panel(chunk, pixels(chunk), i / n, v + (chunk.first() - first) * channels, stride);
    });
  }

  void transform_inputs(RowRing& ring, const Strip& strip, float* v, int64_t stride) const {
    const float* rows[kTileInputs];
    ring.load(strip, rows);
    kernels_.transform_inputs(rows, strip.tiles, shape_.padded_channels(), v,
                              shape_.padded_channels(), kChannelBlock, stride);
  }

  int64_t place(const Strip& s) const {
    const int64_t d = shape_.dilation, row = s.phase_row + s.tile_row * kTile * d;
    const int64_t column = s.phase_column + s.tile_column * kTile * d;
    return ((s.sample * shape_.height + row) * shape_.width + column) * shape_.outputs;
  }

  Outputs<float> outputs(const Strip& s) const {
    const int64_t d = shape_.dilation;
    return {output_.y + place(s), std::min(kTile, s.rows - s.tile_row * kTile),
            std::min(s.tiles * kTile, s.columns - s.tile_column * kTile),
            d * shape_.width * shape_.outputs, d * shape_.outputs};
  }

  // The pixels of a chunk.
  std::vector<int64_t> pixels(const Chunk& chunk) const {
    std::vector<int64_t> offsets;
    offsets.reserve(static_cast<size_t>(chunk.tiles() * kTile * kTile));
    for (const Strip* s = chunk.begin; s != chunk.end; ++s) {
      const Outputs<float> o = outputs(*s);
      for (int64_t i = 0; i < o.rows; ++i) {
        for (int64_t j = 0; j < o.columns; ++j) {
          offsets.push_back(place(*s) + i * o.row_stride + j * o.pixel_stride);
        }
      }
    }
    return offsets;
  }

  void run_panel(const Chunk& chunk, const std::vector<int64_t>& pixels, int64_t panel,
                 const float* v, int64_t v_position) const {
    const int64_t width = kernels_.panel, tiles = chunk.tiles(), first = panel * width;
    const int64_t m_position = position_stride(tiles, width);
    float* const m = thread_memory(Use::kProducts, kPositions * m_position);
    const float* const residual = output_.residual == nullptr ? nullptr : output_.residual + first;
    kernels_.multiply(v, shape_.padded_channels(), v_position,
                      u_ + panel * weights_.panel_size(), weights_.position(), shape_.channels, m,
                      m_position, tiles,
                      {output_.y + first, residual, pixels.data(),
                       static_cast<int64_t>(pixels.size())});
    for (const Strip* s = chunk.begin; s != chunk.end; ++s) {
      Outputs<float> o = outputs(*s);
      o.first += first;
      kernels_.transform_outputs(m + (s->first - chunk.first()) * width, m_position, s->tiles,
                                 bias_.data() + first,
                                 residual == nullptr ? nullptr : residual + place(*s),
                                 std::min(width, shape_.outputs - first), o);
    }
  }

  const ConvKernels& kernels_;
  const ConvShape& shape_;
  const PackedWeights& weights_;
  ConvOutput output_;
  std::vector<float> bias_;  // padded to full panels
  float* u_;                 // the packed weights
  int64_t threads_;
  int64_t most_;  // tiles in a chunk
  std::vector<Strip> strips_;
  std::vector<Chunk> chunks_;
};

}  // namespace ncsn
