// The choice of SIMD level, made once at run time. A kernel is one always-inlined function; an entry point for each level,
// marked with its NCSN_TARGET_*, compiles it with that level's instructions. Nothing here knows what a kernel computes.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#define NCSN_X86 1
#define NCSN_TARGET_AVX2 __attribute__((target("avx2,fma")))
#define NCSN_TARGET_AVX512 \
  __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma,prefer-vector-width=512")))
#else
#define NCSN_X86 0
#endif

namespace ncsn {

enum class Simd { kBaseline, kAvx2, kAvx512 };

inline const char* simd_name(Simd level) {
  switch (level) {
    case Simd::kAvx512:
      return "avx512";
    case Simd::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

// The levels this build has code for, lowest first.
inline std::vector<std::string> simd_levels() {
#if NCSN_X86
  return {"baseline", "avx2", "avx512"};
#else
  return {"baseline"};
#endif
}

// The level named by NCSN_FAST_SIMD (for tests and for comparisons), or `best` where it is unset or empty.
inline Simd wanted_level(Simd best) {
  const char* const value = std::getenv("NCSN_FAST_SIMD");
  const std::string wanted = value == nullptr ? "" : value;
  if (wanted.empty()) return best;
  std::string names;
  for (const Simd level : {Simd::kBaseline, Simd::kAvx2, Simd::kAvx512}) {
    if (level > best) break;
    if (wanted == simd_name(level)) return level;
    names += names.empty() ? simd_name(level) : std::string(", ") + simd_name(level);
  }
  throw std::invalid_argument("NCSN_FAST_SIMD must be one of this processor's levels, " + names +
                              "; got " + wanted);
}

// The highest level of this CPU, or a lower one named by NCSN_FAST_SIMD.
inline Simd simd_level() {
  static const Simd level = [] {
    Simd best = Simd::kBaseline;
#if NCSN_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      best = Simd::kAvx2;
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw")) {
        best = Simd::kAvx512;
      }
    }
#endif
    return wanted_level(best);
  }();
  return level;
}

}  // namespace ncsn
