#include "cpu/noise.h"

#include "cpu/multiversion.h"

namespace ncsn {
namespace {

// Lanes of one pass: a multiple of every level's vector width, small enough to stay in registers and the first cache.
constexpr int kLanes = 16;

NCSN_KERNEL Quad values(Noise kind, PhiloxWords w) {
  if (kind == Noise::kNormal) return normal4(w);
  if (kind == Noise::kUniform) return uniform4(w);
  return {detail::bits_float(w.w0), detail::bits_float(w.w1), detail::bits_float(w.w2),
          detail::bits_float(w.w3)};
}

template <Noise kind>
struct Fill {
  PhiloxKey key;
  PhiloxCounter counter;
  int64_t groups;
  float* out;

  template <bool kFma>
  NCSN_KERNEL void run() const {
    for (int64_t g = 0; g < groups; g += kLanes) {
      float v[4][kLanes];
      for (int i = 0; i < kLanes; ++i) {
        PhiloxCounter c = counter;
        c.group = counter.group + static_cast<uint32_t>(g) + static_cast<uint32_t>(i);
        const Quad q = values(kind, philox4x32_10(c, key));
        v[0][i] = q.v0;
        v[1][i] = q.v1;
        v[2][i] = q.v2;
        v[3][i] = q.v3;
      }
      const int n = groups - g < kLanes ? static_cast<int>(groups - g) : kLanes;
      for (int i = 0; i < n; ++i) {
        for (int k = 0; k < 4; ++k) out[4 * (g + i) + k] = v[k][i];
      }
    }
  }
};

}  // namespace

void fill_noise(Noise kind, PhiloxKey key, PhiloxCounter counter, int64_t groups, float* out) {
  switch (kind) {
    case Noise::kNormal:
      return run_simd(Fill<Noise::kNormal>{key, counter, groups, out});
    case Noise::kUniform:
      return run_simd(Fill<Noise::kUniform>{key, counter, groups, out});
    case Noise::kBits:
      return run_simd(Fill<Noise::kBits>{key, counter, groups, out});
  }
}

}  // namespace ncsn
