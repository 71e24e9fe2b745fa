// The convolution engine's kernels as a table of functions, one table for each SIMD level, and the constants of
// Winograd's F(4x4, 3x3). What runs where and on which memory is decided in convolver.h; the kernels are written once,
// in level_forward.h, level_gradients.h and level_direct.h.
//
// A tile is 4x4 outputs, made of 6x6 inputs. Its transforms have 36 positions; at each the convolution is a matrix
// product over the channels (Winograd 1980; Lavin & Gray, "Fast algorithms for convolutional neural networks", 2015;
// interpolation at 0, 1/b, -1/b, b, -b and infinity, where b = sqrt(2)):
//
//     V = B^T d B     inputs       v[position][tile][channel]
//     U = G g G^T     weights      u[panel][position][channel][output of the panel]
//     M = V U         products     m[position][tile][output of the panel]
//     y = A^T M A     outputs
//
// The points decide the rounding error: the transforms' entries are powers of them. With +-1 and +-2, the usual choice,
// it is twice as large at the same number of operations.
//
// A panel is two vectors of outputs.

#pragma once

#include <cstdint>

#include "cpu/simd.h"

namespace ncsn {

constexpr int64_t kTile = 4, kTileInputs = 6, kPositions = 36;

// Channels of transformed inputs are padded with zeros to a multiple of this, of every level's vectors.
constexpr int64_t kChannelBlock = 16;

// The place of a tile row in an image: the first output, how many rows and columns of outputs lie inside, and the
// distances between rows and between pixels, in elements.
template <typename T>
struct Outputs {
  T* first;
  int64_t rows, columns, row_stride, pixel_stride;
};

// Where a panel's outputs will go: the pixels' distances from the first. The product asks for this memory while it
// computes, since the outputs' transform, which only moves data, would wait for it.
struct Touch {
  const float *y, *residual;
  const int64_t* offsets;
  int64_t pixels;
};

// A direct convolution of consecutive pixels of a row, for the outputs of a panel: a sum of products along runs, of a tap's
// channels or of those of taps side by side. A pixel's inputs are `v_pixel` elements after the pixel's before it; u is
// the place of the weights, [channel][output of the panel], within a panel.
struct DirectRun {
  const float* v;
  int64_t u, depth;
};

struct DirectBlock {
  const DirectRun* runs;
  int64_t count, v_pixel;
  const float* u;
  int64_t pixels, outputs;  // outputs: at most a panel
  const float* bias;        // a full panel
  const float* residual;    // null, or as y
  float* y;
  int64_t y_pixel;
};

struct ConvKernels {
  int panel;  // outputs in a panel

  // Transforms `tiles` tiles of a row. rows: the 6 rows of inputs, of `channels` (padded) a pixel, 4 pixels a tile.
  // v_tile, v_block, v_position: from one tile, kChannelBlock channels and position of v to the next.
  void (*transform_inputs)(const float* const* rows, int64_t tiles, int64_t channels, float* v,
                           int64_t v_tile, int64_t v_block, int64_t v_position);

  // M = V U for one panel. v: rows of v_row elements; m: rows of a panel.
  void (*multiply)(const float* v, int64_t v_row, int64_t v_position, const float* u,
                   int64_t u_position, int64_t depth, float* m, int64_t m_position, int64_t tiles,
                   const Touch& soon);

  // Writes `tiles` tiles of a row for `outputs` (at most a panel) channels; bias is a full panel; residual may be
  // null, and lies as y does.
  void (*transform_outputs)(const float* m, int64_t m_position, int64_t tiles, const float* bias,
                            const float* residual, int64_t outputs, const Outputs<float>& y);

  // to[column][output] = from[output][column], for the outputs of a panel; rows of `to_row` elements.
  void (*transpose_panel)(const float* from, int64_t from_row, int64_t columns, float* to,
                          int64_t to_row);

  // g[channel][tap][output of the panel] to u, for `depth` channels; `u_position` is from one position to the next.
  void (*transform_weights)(const float* g, int64_t depth, float* u, int64_t u_position);

  // The gradient of the weights: D = A dy A^T, dU = sum of V^T D over the tiles, dg = G^T dU G.
  // rows: the 4 rows of dy, as those of transform_inputs, `channels` a multiple of a panel; d[position][panel][tile].
  // After the positions, at d[kPositions], the sums of the tiles of dy: the gradient of the bias.
  void (*transform_gradients)(const float* const* rows, int64_t tiles, int64_t channels, float* d,
                              int64_t d_panel, int64_t d_position);

  // u[channel] += V^T D for one position, one panel and `channels` (at most kChannelBlock) channels, v[tile][channel]
  // in rows of kChannelBlock.
  void (*accumulate)(const float* v, int64_t channels, const float* d, int64_t tiles, float* u);

  // sum += the sum over the tiles of one panel of d[kPositions].
  void (*sum_tiles)(const float* d, int64_t tiles, float* sum);

  // To g[channel][tap][output of the panel], for `depth` channels.
  void (*transform_weight_gradients)(const float* u, int64_t u_position, int64_t depth, float* g);

  // Of at most `direct_pixels` pixels, or `direct_pixels_narrow` where the outputs fill no more than half a panel.
  int direct_pixels, direct_pixels_narrow;
  void (*direct)(const DirectBlock& block);
};

// Those of the CPU's level.
const ConvKernels& conv_kernels();

// Those for a direct convolution of so many outputs: with few, of a lower level with shorter vectors. It makes the same
// bits, since a lane is one output.
const ConvKernels& direct_kernels(int64_t outputs);

}  // namespace ncsn
