#include "cpu/noise.h"

#include "cpu/simd.h"

namespace ncsn {
namespace {

// Lanes of one pass: a multiple of every level's vector width, small enough to stay in registers and the first cache.
constexpr int kLanes = 16;

inline __attribute__((always_inline)) Quad values(Noise kind, PhiloxWords w) {
  if (kind == Noise::kNormal) return normal4(w);
  if (kind == Noise::kUniform) return uniform4(w);
  return {detail::bits_float(w.w0), detail::bits_float(w.w1), detail::bits_float(w.w2),
          detail::bits_float(w.w3)};
}

template <Noise kind>
inline __attribute__((always_inline)) void fill(PhiloxKey key, PhiloxCounter counter,
                                                int64_t groups, float* out) {
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

inline __attribute__((always_inline)) void fill_any(Noise kind, PhiloxKey key,
                                                    PhiloxCounter counter, int64_t groups,
                                                    float* out) {
  switch (kind) {
    case Noise::kNormal:
      return fill<Noise::kNormal>(key, counter, groups, out);
    case Noise::kUniform:
      return fill<Noise::kUniform>(key, counter, groups, out);
    case Noise::kBits:
      return fill<Noise::kBits>(key, counter, groups, out);
  }
}

void fill_baseline(Noise kind, PhiloxKey key, PhiloxCounter c, int64_t groups, float* out) {
  fill_any(kind, key, c, groups, out);
}

#if NCSN_X86
NCSN_TARGET_AVX2 void fill_avx2(Noise kind, PhiloxKey key, PhiloxCounter c, int64_t groups,
                                float* out) {
  fill_any(kind, key, c, groups, out);
}

NCSN_TARGET_AVX512 void fill_avx512(Noise kind, PhiloxKey key, PhiloxCounter c, int64_t groups,
                                    float* out) {
  fill_any(kind, key, c, groups, out);
}
#endif

}  // namespace

void fill_noise(Noise kind, PhiloxKey key, PhiloxCounter counter, int64_t groups, float* out) {
#if NCSN_X86
  switch (simd_level()) {
    case Simd::kAvx512:
      return fill_avx512(kind, key, counter, groups, out);
    case Simd::kAvx2:
      return fill_avx2(kind, key, counter, groups, out);
    case Simd::kBaseline:
      break;
  }
#endif
  fill_baseline(kind, key, counter, groups, out);
}

}  // namespace ncsn
