// Compiles level.h for every SIMD level, and chooses at run time.

#include "cpu/conv3x3/kernels.h"

#if NCSN_X86
#include <immintrin.h>
#endif

namespace ncsn {

namespace baseline {
namespace {
#define NCSN_LEVEL_TARGET
#define NCSN_LEVEL_WIDTH 4
#define NCSN_LEVEL_ROWS 6
#include "cpu/conv3x3/level.h"
}  // namespace
}  // namespace baseline

#if NCSN_X86
namespace avx2 {
namespace {
#define NCSN_LEVEL_TARGET NCSN_TARGET_AVX2
#define NCSN_LEVEL_WIDTH 8
#define NCSN_LEVEL_ROWS 6
#include "cpu/conv3x3/level.h"
}  // namespace
}  // namespace avx2

namespace avx512 {
namespace {
#define NCSN_LEVEL_TARGET NCSN_TARGET_AVX512
#define NCSN_LEVEL_WIDTH 16
#define NCSN_LEVEL_ROWS 14
#include "cpu/conv3x3/level.h"
}  // namespace
}  // namespace avx512
#endif

const ConvKernels& conv_kernels() {
#if NCSN_X86
  switch (simd_level()) {
    case Simd::kAvx512:
      return avx512::kKernels;
    case Simd::kAvx2:
      return avx2::kKernels;
    case Simd::kBaseline:
      break;
  }
#endif
  return baseline::kKernels;
}

const ConvKernels& direct_kernels(int64_t outputs) {
#if NCSN_X86
  if (simd_level() == Simd::kAvx512 && 2 * outputs <= avx2::kKernels.panel) return avx2::kKernels;
#endif
  static_cast<void>(outputs);
  return conv_kernels();
}

}  // namespace ncsn
