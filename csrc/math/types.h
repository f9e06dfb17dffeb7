// Number types shared by the CPU kernels, the CUDA kernels and their emulation: storage,
// arithmetic, conversion.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define LENS_HD __host__ __device__ __forceinline__
#else
#define LENS_HD inline __attribute__((always_inline))
#endif

namespace lens {

// The upper half of a float. A plain struct, so that every compiler and device agrees on it.
struct Bf16 {
  uint16_t bits;
};

template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
// arithmetic type of a storage type: float for float and Bf16, double for double
template <class T>
using Acc = typename AccOf<T>::type;

LENS_HD float bits_to_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
#endif
}

LENS_HD uint32_t float_to_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
#endif
}

LENS_HD float widen(Bf16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
LENS_HD float widen(float x) { return x; }
LENS_HD double widen(double x) { return x; }

template <class T>
struct Narrow {
  static LENS_HD T from(T x) { return x; }
};
template <>
struct Narrow<Bf16> {
  // round to nearest even; a NaN stays a NaN (quiet) whatever its payload
  static LENS_HD Bf16 from(float x) {
    const uint32_t bits = float_to_bits(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return Bf16{uint16_t(nan ? (bits >> 16) | 0x40u : rounded)};
  }
};
// arithmetic value -> storage, rounded once
template <class T>
LENS_HD T narrow(Acc<T> x) {
  return Narrow<T>::from(x);
}

// V storage elements moved as one access
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T e[V];
};

}  // namespace lens
