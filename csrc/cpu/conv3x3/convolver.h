// The driver of the convolution engine: what each thread computes of a convolution, in which order and on which memory.
//
// Tensors are channels_last float32. A dilation d makes d x d interleaved images, each an ordinary convolution. A strip
// is a part of a row of tiles of one of these; a chunk is some consecutive strips, few enough that what is computed of
// them stays in the second cache. For a chunk the inputs are transformed once, and then, for each panel of outputs, 36
// products and the outputs' transform follow. The weights stream by once a chunk.
// Where there are fewer chunks than threads, or one, the threads share the inputs' transforms and then divide the panels,
// and who multiplies by a panel packs it: its weights then never leave the core's own cache. (Measured with as many
// chunks as threads: slower, as each thread then reads all inputs for each panel.)
//
// Every number is made by the same operations in the same order however strips, chunks and threads are cut: rows of a
// product do not depend on each other. So the number of threads changes no bit, and no sample has an effect on another.
//
// Why the threads do not race: an item of work writes the tiles (in a memory of its thread, or its own place in a
// shared one), the outputs or the panel of weights that are its own, and reads what earlier parallel loops have
// finished.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "cpu/conv3x3/inputs.h"
#include "cpu/conv3x3/weights.h"

namespace ncsn {

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
        threads_(torch::stable::get_num_threads()),
        most_(most_tiles(shape)),
        strips_(cut_strips(shape, most_)),
        chunks_(cut_chunks(strips_.data(), strips_.data() + strips_.size(), most_)),
        late_(weights.kept() == nullptr && is_late(chunks_.size(), weights.panels(), threads_)),
        packed_(weights.kept() != nullptr || late_
                    ? nullptr
                    : thread_memory(Use::kWeights, weights.panels() * weights.panel_size())),
        u_(weights.kept() != nullptr ? weights.kept() : packed_) {
    if (output.bias != nullptr) std::copy_n(output.bias, shape.outputs, bias_.begin());
  }

  // Whether each panel of weights would be packed by who multiplies by it, as it is where that costs less than reading
  // weights packed before.
  static bool packs_late(const ConvShape& shape) {
    const int64_t most = most_tiles(shape), panels = PackedWeights(shape, {}).panels();
    const std::vector<Strip> strips = cut_strips(shape, most);
    const size_t chunks = cut_chunks(strips.data(), strips.data() + strips.size(), most).size();
    return is_late(chunks, panels, torch::stable::get_num_threads());
  }

  // The weights are packed before `run`, in parts 0 .. parts() - 1 by any thread.
  int64_t parts() const { return late_ ? 0 : weights_.parts(); }

  void pack(int64_t part) const { weights_.pack(part, packed_); }

  void run(const ConvInput& input) const {
    const int64_t n = static_cast<int64_t>(chunks_.size()), even = late_ ? 0 : n - n % threads_;
    parallel_each(even, [&](int64_t i) { run_chunk(input, chunks_[static_cast<size_t>(i)]); });
    if (even < n) run_shared(input, chunks_[static_cast<size_t>(even)].begin);
  }

 private:
  static constexpr int64_t kLeastTiles = 16;
  static constexpr int64_t kManyPanels = 4;  // for each thread: then it matters little if they do not divide evenly

  static bool is_late(size_t chunks, int64_t panels, int64_t threads) {
    const bool few = chunks == 1 || static_cast<int64_t>(chunks) < threads;
    return few && (panels % threads == 0 || panels > kManyPanels * threads);
  }

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
    for (int64_t p = 0; p < weights_.panels(); ++p) {
      run_panel(chunk, places, p, u_ + p * weights_.panel_size(), v, stride);
    }
  }

  // Fewer chunks than threads: these share the inputs' transforms, and then the panels.
  void run_shared(const ConvInput& input, const Strip* begin) const {
    const Strip* const end = strips_.data() + strips_.size();
    const int64_t channels = shape_.padded_channels(), panels = weights_.panels();
    const int64_t first = begin->first, tiles = end[-1].first + end[-1].tiles - first;
    const int64_t stride = position_stride(tiles, channels);
    float* const v = thread_memory(Use::kSharedInputs, kPositions * stride);
    parallel_for(end - begin, 1, [&](int64_t from, int64_t to) {
      RowRing ring(shape_, input, channels, 1, most_, Use::kRows);
      for (const Strip* s = begin + from; s != begin + to; ++s) {
        transform_inputs(ring, *s, v + (s->first - first) * channels, stride);
      }
    });
    std::vector<Chunk> chunks = cut_chunks(begin, end, most_);
    if (late_) {
      return parallel_each(panels, [&](int64_t p) {
        float* const u = thread_memory(Use::kWeights, weights_.panel_size());
        weights_.pack_panel(p, u);
        for (const Chunk& chunk : chunks) {
          run_panel(chunk, pixels(chunk), p, u, v + (chunk.first() - first) * channels, stride);
        }
      });
    }
    if (static_cast<int64_t>(chunks.size()) * panels % threads_ != 0) {
      const int64_t small = std::max(kLeastTiles, tiles * panels / (4 * threads_));
      chunks = cut_chunks(begin, end, std::min(most_, small));
    }
    const int64_t n = static_cast<int64_t>(chunks.size());
    parallel_each(panels * n, [&](int64_t i) {
      const Chunk& chunk = chunks[static_cast<size_t>(i % n)];
      const int64_t p = i / n;
      run_panel(chunk, pixels(chunk), p, u_ + p * weights_.panel_size(),
                v + (chunk.first() - first) * channels, stride);
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
                 const float* u, const float* v, int64_t v_position) const {
    const int64_t width = kernels_.panel, tiles = chunk.tiles(), first = panel * width;
    const int64_t m_position = position_stride(tiles, width);
    float* const m = thread_memory(Use::kProducts, kPositions * m_position);
    const float* const residual = output_.residual == nullptr ? nullptr : output_.residual + first;
    kernels_.multiply(v, shape_.padded_channels(), v_position,
                      u, weights_.position(), shape_.channels, m,
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
  int64_t threads_;
  int64_t most_;  // tiles in a chunk
  std::vector<Strip> strips_;
  std::vector<Chunk> chunks_;
  bool late_;       // each panel of weights is packed by who multiplies by it
  float* packed_;   // where the weights are packed, or null
  const float* u_;  // the packed weights, or null
};

}  // namespace ncsn
