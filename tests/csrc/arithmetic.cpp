// The arithmetic of the kernels that know no torch, as a program of its own for any processor: prints what differs.

#include <cmath>
#include <cstdio>
#include <vector>

#include "common/elu.h"
#include "common/philox.h"
#include "cpu/conv3x3/kernels.h"
#include "cpu/multiversion.h"

namespace {

using namespace ncsn;

int faults = 0;

void expect(const char* what, double error, double bound) {
  std::printf("%s %.3g of %.3g\n", what, error, bound);
  if (!(error <= bound)) ++faults;
}

std::vector<float> noise(int64_t n, uint32_t sample) {
  std::vector<float> values;
  for (uint32_t i = 0; static_cast<int64_t>(values.size()) < n; ++i) {
    const Quad q = normal4(philox4x32_10({i, sample, 0, 3}, philox_key(1)));
    for (const float v : {q.v0, q.v1, q.v2, q.v3}) values.push_back(v);
  }
  values.resize(static_cast<size_t>(n));
  return values;
}

// The known answer of Random123 for a counter and a key of all ones.
void words() {
  const PhiloxWords w = philox4x32_10({~0u, ~0u, ~0u, ~0u}, {~0u, ~0u});
  const bool right = w.w0 == 0x408f276du && w.w1 == 0x41c83b0eu && w.w2 == 0xa20bc7c6u &&
                     w.w3 == 0x6d5451fdu;
  expect("words", right ? 0 : 1, 0);
}

void normals() {
  double worst = 0;
  for (uint32_t i = 0; i < 20000; ++i) {
    const PhiloxWords w = philox4x32_10({i, 0, 0, 0}, philox_key(7));
    const double radius = std::sqrt(-2 * std::log(static_cast<double>(uniform(w.w0))));
    const double angle = 8 * std::atan(1.0) * static_cast<double>(uniform(w.w1));
    const Quad z = normal4(w);
    worst = std::fmax(worst, std::fabs(z.v0 - radius * std::cos(angle)));
    worst = std::fmax(worst, std::fabs(z.v1 - radius * std::sin(angle)));
  }
  expect("normals", worst, 1.2e-6);
}

void activation() {
  double worst = 0;
  for (int i = -30000; i <= 10000; ++i) {
    const float x = static_cast<float>(i) * 1e-3f;
    const double want = x > 0 ? static_cast<double>(x) : std::expm1(static_cast<double>(x));
    worst = std::fmax(worst, std::fabs(elu<kBaselineFma>(x) - want));
  }
  expect("elu", worst, 5e-7);
}

constexpr int64_t kChannels = 16, kTiles = 5, kWidth = kTiles * kTile, kRowPixels = kWidth + 2;

// The outputs of a row of tiles, in float64.
double wanted(const std::vector<float>& x, const std::vector<float>& g, int64_t panel, int64_t row,
              int64_t column, int64_t output) {
  double sum = 0;
  for (int64_t i = 0; i < 3; ++i) {
    for (int64_t j = 0; j < 3; ++j) {
      for (int64_t c = 0; c < kChannels; ++c) {
        sum += static_cast<double>(x[((row + i) * kRowPixels + column + j) * kChannels + c]) *
               static_cast<double>(g[(c * 9 + i * 3 + j) * panel + output]);
      }
    }
  }
  return sum;
}

void winograd() {
  const ConvKernels& k = conv_kernels();
  const int64_t panel = k.panel, position = kTiles * kChannels + 16;
  const std::vector<float> x = noise(kTileInputs * kRowPixels * kChannels, 0);
  const std::vector<float> g = noise(kChannels * 9 * panel, 1), bias = noise(panel, 2);
  const int64_t u_position = kChannels * panel + 16, m_position = kTiles * panel + 16;
  std::vector<float> v(kPositions * position), u(kPositions * u_position),
      m(kPositions * m_position), y(kTile * kWidth * panel);
  const float* rows[kTileInputs];
  for (int64_t i = 0; i < kTileInputs; ++i) rows[i] = x.data() + i * kRowPixels * kChannels;
  k.transform_weights(g.data(), kChannels, u.data(), u_position);
  k.transform_inputs(rows, kTiles, kChannels, v.data(), kChannels, kChannelBlock, position);
  k.multiply(v.data(), kChannels, position, u.data(), u_position, kChannels, m.data(), m_position,
             kTiles, {y.data(), nullptr, nullptr, 0});
  k.transform_outputs(m.data(), m_position, kTiles, bias.data(), nullptr, panel,
                      {y.data(), kTile, kWidth, kWidth * panel, panel});
  double error = 0, norm = 0;
  for (int64_t row = 0; row < kTile; ++row) {
    for (int64_t column = 0; column < kWidth; ++column) {
      for (int64_t o = 0; o < panel; ++o) {
        const double want = wanted(x, g, panel, row, column, o) + static_cast<double>(bias[o]);
        const double got = y[(row * kWidth + column) * panel + o];
        error += (got - want) * (got - want);
        norm += want * want;
      }
    }
  }
  expect("winograd", std::sqrt(error / norm), 2.5e-6);
}

void direct() {
  const ConvKernels& k = conv_kernels();
  const int64_t panel = k.panel, pixels = k.direct_pixels;
  const std::vector<float> x = noise(kTileInputs * kRowPixels * kChannels, 0);
  const std::vector<float> g = noise(kChannels * 9 * panel, 1), bias = noise(panel, 2);
  std::vector<float> u(9 * kChannels * panel), y(pixels * panel);
  std::vector<DirectRun> runs;
  for (int64_t tap = 0; tap < 9; ++tap) {
    for (int64_t c = 0; c < kChannels; ++c) {
      for (int64_t o = 0; o < panel; ++o) {
        u[(tap * kChannels + c) * panel + o] = g[(c * 9 + tap) * panel + o];
      }
    }
    runs.push_back({x.data() + (tap / 3 * kRowPixels + tap % 3) * kChannels,
                    tap * kChannels * panel, kChannels});
  }
  k.direct({runs.data(), 9, kChannels, u.data(), pixels, panel, bias.data(), nullptr, y.data(),
            panel});
  double error = 0, norm = 0;
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t o = 0; o < panel; ++o) {
      const double want = wanted(x, g, panel, 0, p, o) + static_cast<double>(bias[o]);
      const double off = static_cast<double>(y[p * panel + o]) - want;
      error += off * off;
      norm += want * want;
    }
  }
  expect("direct", std::sqrt(error / norm), 1e-6);
}

}  // namespace

int main() {
  words();
  normals();
  activation();
  winograd();
  direct();
  std::puts(faults == 0 ? "right" : "wrong");
  return faults;
}
