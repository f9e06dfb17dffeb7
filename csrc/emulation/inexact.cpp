// Drawn errors of the device's approximate functions.
#include "emulation/inexact.h"

#include <cmath>

namespace lens::emulation {
namespace {

uint64_t g_errors = 0;  // seed; 0: no errors

// A number in [-1, 1], one time in four an end of it.
double draw(Inexact function, uint64_t argument) {
  uint64_t z =
      argument + g_errors * 0x9e3779b97f4a7c15ull + uint64_t(function) * 0xd1342543de82ef95ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  z ^= z >> 31;
  if ((z & 3) == 0) return z & 4 ? 1.0 : -1.0;
  return double(z >> 11) * 0x1p-52 - 1.0;
}

double moved(double exact, double ulps, int digits, Inexact function, uint64_t argument) {
  if (g_errors == 0 || exact == 0.0 || exact == 1.0 || !std::isfinite(exact)) return exact;
  const double ulp = std::ldexp(1.0, std::ilogb(exact) + 1 - digits);
  return exact + draw(function, argument) * ulps * ulp;
}

}  // namespace

float with_error(double exact, double ulps, Inexact function, uint64_t argument) {
  // rounding moves by up to half a unit more, which the bound holds as well
  return float(moved(exact, ulps > 0.5 ? ulps - 0.5 : 0.0, 24, function, argument));
}

double with_error_double(double exact, double ulps, Inexact function, uint64_t argument) {
  return moved(exact, ulps > 0.5 ? ulps - 0.5 : 0.0, 53, function, argument);
}

}  // namespace lens::emulation

extern "C" {
__attribute__((visibility("default"))) void lens_emulation_errors(uint64_t seed) {
  lens::emulation::g_errors = seed;
}
}
