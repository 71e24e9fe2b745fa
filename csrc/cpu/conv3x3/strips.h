// How a convolution is cut into work: strips of tiles, and chunks of strips. Which memory and which thread they get is
// decided in convolver.h and weight_gradient.cpp.

#pragma once

#include <algorithm>
#include <vector>

#include "cpu/conv3x3/kernels.h"

namespace ncsn {

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

struct ConvShape {
  int64_t samples, channels, outputs, height, width, dilation;

  int64_t padded_channels() const { return round_up(channels, kChannelBlock); }
};

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

}  // namespace ncsn
