// One SIMD register of the instruction set this file is compiled for, with the few operations the
// row kernels need.
//
// Everything lives in namespace LENS_ISA or is force-inlined: the file is compiled once per
// instruction set, and an out-of-line copy shared between the objects could hold instructions an
// older CPU lacks.
#pragma once

#include <immintrin.h>

#include <type_traits>

#include "math/formulas.h"
#include "math/types.h"

#define LENS_INLINE inline __attribute__((always_inline))
#define LENS_LAMBDA __attribute__((always_inline))

namespace lens::LENS_ISA {

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

template <class E>
struct Register;
template <>
struct Register<float> {
  typedef float type __attribute__((vector_size(kRegisterBytes)));
  typedef int32_t bits __attribute__((vector_size(kRegisterBytes)));
};
template <>
struct Register<double> {
  typedef double type __attribute__((vector_size(kRegisterBytes)));
  typedef int64_t bits __attribute__((vector_size(kRegisterBytes)));
};

template <class E>
struct Simd {
  static constexpr int kLanes = kRegisterBytes / int(sizeof(E));
  typename Register<E>::type v;

  LENS_INLINE Simd() = default;
  LENS_INLINE Simd(typename Register<E>::type native) : v(native) {}
  LENS_INLINE explicit Simd(E x) : v(x - typename Register<E>::type{}) {}
  LENS_INLINE explicit Simd(int x) : Simd(E(x)) {}

  friend LENS_INLINE Simd operator+(Simd a, Simd b) { return a.v + b.v; }
  friend LENS_INLINE Simd operator-(Simd a, Simd b) { return a.v - b.v; }
  friend LENS_INLINE Simd operator*(Simd a, Simd b) { return a.v * b.v; }
  friend LENS_INLINE Simd operator/(Simd a, Simd b) { return a.v / b.v; }
  friend LENS_INLINE Simd operator-(Simd a) { return -a.v; }
};

template <class E>
LENS_INLINE Simd<E> mul_add(Simd<E> a, Simd<E> b, Simd<E> c) {
#if defined(__AVX512F__)
  if constexpr (sizeof(E) == 4) {
    return Simd<E>(_mm512_fmadd_ps(a.v, b.v, c.v));
  } else {
    return Simd<E>(_mm512_fmadd_pd(a.v, b.v, c.v));
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(E) == 4) {
    return Simd<E>(_mm256_fmadd_ps(a.v, b.v, c.v));
  } else {
    return Simd<E>(_mm256_fmadd_pd(a.v, b.v, c.v));
  }
#else
  return a * b + c;
#endif
}

// Sum of the lanes, always in the same tree.
template <class E>
LENS_INLINE E sum_lanes(Simd<E> a) {
  E lane[Simd<E>::kLanes];
  std::memcpy(lane, &a.v, sizeof lane);
  for (int width = Simd<E>::kLanes / 2; width >= 1; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  }
  return lane[0];
}

// Exchanges neighbours: lanes 2i and 2i + 1.
template <class E>
LENS_INLINE Simd<E> swap_pairs(Simd<E> a) {
  typename Register<E>::bits order;
  for (int i = 0; i < Simd<E>::kLanes; ++i) order[i] = i ^ 1;
  return Simd<E>(__builtin_shuffle(a.v, order));
}

// ---- storage <-> register. All is a whole register, Some the first `count` lanes: the rest read
// as zero and are not written, so a row's last elements pass through the same arithmetic as the
// others.
struct All {};
struct Some {
  int count;
};

template <class E>
LENS_INLINE Simd<E> load(const E* p, All) {
  Simd<E> out;
  std::memcpy(&out.v, p, sizeof out.v);
  return out;
}

template <class E>
LENS_INLINE void store(E* p, Simd<E> a, All) {
  std::memcpy(p, &a.v, sizeof a.v);
}

LENS_INLINE Simd<float> load(const Bf16* p, All) {
  Simd<float> out;
#if defined(__AVX2__)
  typedef uint16_t Half __attribute__((vector_size(kRegisterBytes / 2)));
  Half half;
  std::memcpy(&half, p, sizeof half);
  const Register<float>::bits wide = __builtin_convertvector(half, Register<float>::bits) << 16;
  std::memcpy(&out.v, &wide, sizeof wide);
#else
  const __m128i half = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  out.v = _mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), half));
#endif
  return out;
}

// Rounds to nearest even like narrow<Bf16>; NaN stays a quiet NaN.
LENS_INLINE void store(Bf16* p, Simd<float> a, All) {
  using Bits = Register<float>::bits;
  Bits bits;
  std::memcpy(&bits, &a.v, sizeof bits);
  const Bits rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const Bits kept =
      ((a.v != a.v) ? (bits | 0x400000) : rounded) >> 16;  // arithmetic: fits a signed 16-bit pack
#if defined(__AVX512F__)
  typedef int16_t Half __attribute__((vector_size(kRegisterBytes / 2)));
  const Half half = __builtin_convertvector(kept, Half);
  std::memcpy(p, &half, sizeof half);
#elif defined(__AVX2__)
  const __m256i wide = reinterpret_cast<__m256i>(kept);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(wide, wide), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
#else
  const __m128i wide = reinterpret_cast<__m128i>(kept);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi32(wide, wide));
#endif
}

template <class T>
LENS_INLINE Simd<Acc<T>> load(const T* p, Some lanes) {
  T whole[Simd<Acc<T>>::kLanes] = {};
  for (int i = 0; i < lanes.count; ++i) whole[i] = p[i];
  return load(whole, All{});
}

template <class T>
LENS_INLINE void store(T* p, Simd<Acc<T>> a, Some lanes) {
  T whole[Simd<Acc<T>>::kLanes];
  store(whole, a, All{});
  for (int i = 0; i < lanes.count; ++i) p[i] = whole[i];
}

// ---- exponential
// float: x = n ln 2 + r with |r| <= ln(2) / 2, e^r by its Taylor polynomial to r^7 (remainder below
// 6e-9 relative), 2^n in two halves so that overflow gives inf and underflow passes through the
// subnormals to 0.
LENS_INLINE Simd<float> exponential(Simd<float> x) {
  const Simd<float> limit(126.0f);  // beyond it e^x is 0 or inf already; comparisons keep a NaN
#if defined(__AVX512F__)
  constexpr __mmask16 kAll = 0xffff;  // forms with a mask begin from no undefined register
  x.v = _mm512_maskz_min_ps(kAll, limit.v, x.v);  // of a NaN the second operand stays
  x.v = _mm512_maskz_max_ps(kAll, -limit.v, x.v);
#else
  x.v = x.v > limit.v ? limit.v : x.v;
  x.v = x.v < -limit.v ? -limit.v : x.v;
#endif
  const Simd<float> round(
      12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Simd<float> shifted = mul_add(x, Simd<float>(1.44269504f), round);
  const Simd<float> n = shifted - round;
  Simd<float> r = mul_add(n, Simd<float>(-0.693145752f),
                          x);  // ln 2 = 0.693145752 (15 bits: n times it is exact) + 1.42860682e-6
  r = mul_add(n, Simd<float>(-1.42860682e-6f), r);
  Simd<float> e(1.0f / 5040);
  e = mul_add(e, r, Simd<float>(1.0f / 720));
  e = mul_add(e, r, Simd<float>(1.0f / 120));
  e = mul_add(e, r, Simd<float>(1.0f / 24));
  e = mul_add(e, r, Simd<float>(1.0f / 6));
  e = mul_add(e, r, Simd<float>(0.5f));
  e = mul_add(e, r, Simd<float>(1.0f));
  e = mul_add(e, r, Simd<float>(1.0f));
#if defined(__AVX512F__)
  return Simd<float>(_mm512_maskz_scalef_ps(kAll, e.v, n.v));  // rounded once, as the product below
#else
  using Bits = Register<float>::bits;
  Bits power;
  std::memcpy(&power, &shifted.v, sizeof power);
  power -= 0x4b400000;  // bits of `round`
  const Bits half = power >> 1;
  const Bits first = (half + 127) << 23, second = (power - half + 127) << 23;
  Simd<float> scale_first, scale_second;
  std::memcpy(&scale_first.v, &first, sizeof first);
  std::memcpy(&scale_second.v, &second, sizeof second);
  return e * scale_first * scale_second;
#endif
}

// double serves the proofs, not speed: the C library, lane by lane.
LENS_INLINE Simd<double> exponential(Simd<double> x) {
  for (int i = 0; i < Simd<double>::kLanes; ++i) x.v[i] = std::exp(x.v[i]);
  return x;
}

template <class A>
LENS_INLINE A sigmoid(A a) {
  return A(1) / (A(1) + exponential(-a));
}

}  // namespace lens::LENS_ISA
