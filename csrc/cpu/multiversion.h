// Runs a kernel by the code of the best SIMD level. A kernel is a struct with `template <bool kFma> void run() const`,
// always inlined (NCSN_KERNEL): here it is compiled once for each level. Nothing here knows what a kernel computes.

#pragma once

#include "cpu/simd.h"

#if defined(__GNUC__)
#define NCSN_KERNEL inline __attribute__((always_inline))
#else
#define NCSN_KERNEL inline
#endif

// Before a loop whose turns write nothing that another one reads: no run-time check of that for every row.
#if defined(__clang__)
#define NCSN_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define NCSN_INDEPENDENT _Pragma("GCC ivdep")
#else
#define NCSN_INDEPENDENT
#endif

namespace ncsn {

#if defined(__FP_FAST_FMAF) && defined(__FP_FAST_FMA)
constexpr bool kBaselineFma = true;  // AArch64
#else
constexpr bool kBaselineFma = false;
#endif

template <typename Kernel>
void run_baseline(const Kernel& kernel) {
  kernel.template run<kBaselineFma>();
}

#if NCSN_X86
template <typename Kernel>
NCSN_TARGET_AVX2 void run_avx2(const Kernel& kernel) {
  kernel.template run<true>();
}

template <typename Kernel>
NCSN_TARGET_AVX512 void run_avx512(const Kernel& kernel) {
  kernel.template run<true>();
}
#endif

template <typename Kernel>
void run_simd(const Kernel& kernel) {
#if NCSN_X86
  switch (simd_level()) {
    case Simd::kAvx512:
      return run_avx512(kernel);
    case Simd::kAvx2:
      return run_avx2(kernel);
    case Simd::kBaseline:
      break;
  }
#endif
  run_baseline(kernel);
}

}  // namespace ncsn
