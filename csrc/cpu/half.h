// The conversion of the element types in memory to and from their accumulators: integer arithmetic without branches, so
// that loops over it turn into SIMD code, which those of PyTorch's headers do not. The types themselves are in
// common/dtype.h.

#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/philox.h"  // NCSN_HD, float_bits

namespace ncsn {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

NCSN_HD float widen(float x) { return x; }
NCSN_HD double widen(double x) { return x; }

NCSN_HD float widen(BFloat16 x) {
  return detail::bits_float(static_cast<uint32_t>(x.x) << 16);
}

NCSN_HD float widen(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.x & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(x.x & 0x7FFFu) << 13;
  // The exponent's bias goes from 15 to 127, and that of infinity and NaN from 31 to 255.
  const uint32_t normal = rest + (rest >= 0x0F800000u ? 0x70000000u : 0x38000000u);
  // A subnormal's mantissa counts multiples of 2^-24: read as one of 2^-14 (1 + m), less 2^-14.
  const uint32_t small = detail::float_bits(detail::bits_float(rest + 0x38800000u) - 0x1p-14f);
  return detail::bits_float((rest < 0x00800000u ? small : normal) | sign);
}

// Rounds to nearest, ties to even; NaN stays NaN.
template <typename T>
NCSN_HD T narrow(Accumulator<T> x) {
  return x;
}

template <>
NCSN_HD BFloat16 narrow<BFloat16>(float x) {
  const uint32_t bits = detail::float_bits(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return BFloat16(static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded),
                  BFloat16::from_bits());
}

template <>
NCSN_HD Half narrow<Half>(float x) {
  const uint32_t bits = detail::float_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t size = bits & 0x7FFFFFFFu;
  const uint32_t normal = (size - 0x38000000u + 0xFFFu + ((size >> 13) & 1u)) >> 13;
  // The sum with 1/2 rounds to a multiple of 2^-24, a subnormal's unit.
  const uint32_t small = detail::float_bits(detail::bits_float(size) + 0.5f) - 0x3F000000u;
  const uint32_t finite = size < 0x38800000u ? small : normal;
  const uint32_t large = size > 0x7F800000u ? 0x7E00u : 0x7C00u;
  return Half(static_cast<uint16_t>((size >= 0x477FF000u ? large : finite) | sign),
              Half::from_bits());
}

}  // namespace ncsn
