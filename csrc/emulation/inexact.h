// The device functions that are not correctly rounded, with errors as the toolkit documents them.
//
// Seed 0: the host's results. Any other: an error within the documented bound, drawn by the seed,
// the function and its argument, so that equal arguments give equal results, as on a device. Zero,
// infinity, NaN and 2^0 have no error.
#pragma once

#include <cstdint>
#include <cstring>

namespace lens::emulation {

enum class Inexact : uint64_t { kInverseSqrt = 1, kInverseSqrtDouble, kExp, kDivide, kExp2 };

// `exact` moved by at most `ulps` units in the last place of float or double, then rounded to it.
float with_error(double exact, double ulps, Inexact function, uint64_t argument);
double with_error_double(double exact, double ulps, Inexact function, uint64_t argument);

inline uint64_t argument_bits(float x, float y = 0.0f) {
  uint32_t bits[2];
  std::memcpy(&bits[0], &x, 4);
  std::memcpy(&bits[1], &y, 4);
  return uint64_t(bits[0]) << 32 | bits[1];
}
inline uint64_t argument_bits(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, 8);
  return bits;
}

}  // namespace lens::emulation
