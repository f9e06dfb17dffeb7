// The element formulas of the row ops, written once. A is float, double, or a SIMD vector of either
// that brings its own operators and mul_add.
#pragma once

#include "math/types.h"

namespace lens {

// a * b + c in one rounding where the target has the instruction. The choice is made here, not by
// the compiler's contraction, so that the same element gives the same bits in every loop it appears
// in.
LENS_HD float mul_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__)
  return fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
LENS_HD double mul_add(double a, double b, double c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__)
  return fma(a, b, c);
#else
  return a * b + c;
#endif
}

// n = x * rstd
template <class A>
LENS_HD A norm_modulate(A n, A weight, A scale, A shift) {
  return mul_add(n * weight, A(1) + scale, shift);
}

// Gradient that reaches n from dy.
template <class A>
LENS_HD A norm_modulate_backward(A dy, A weight, A scale) {
  return dy * weight * (A(1) + scale);
}

// Gradient that reaches x from g = dn: rstd * (g - n * mean(g * n)).
template <class A>
LENS_HD A rms_norm_backward(A g, A n, A mean_gn, A rstd) {
  return rstd * (g - n * mean_gn);
}

// dh of one SwiGLU element; s = sigmoid(a).
template <class A>
LENS_HD A swiglu_backward_a(A dy, A a, A u, A s) {
  return dy * u * s * mul_add(a, A(1) - s, A(1));
}
template <class A>
LENS_HD A swiglu_backward_u(A dy, A a, A s) {
  return dy * a * s;
}

// u + guidance * (c - u)
template <class A>
LENS_HD A guide(A cond, A uncond, A guidance) {
  return mul_add(guidance, cond - uncond, uncond);
}

}  // namespace lens
