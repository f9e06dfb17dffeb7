// The softmax of joint attention on the accumulators of Q K^T, in registers.
//
// A thread holds 32 scores of each of two rows: s[4 j + 2 h + e] is row h (8 rows apart), key
// 8 j + 2 (lane % 4) + e, so that four lanes share a row. Sums and maxima run over the four classes
// 2 h + e of a thread's elements, then over the lanes: an order that depends on nothing.
//
// Two modes. Running: the row's maximum so far is subtracted before the exponential, and what was
// summed under a smaller one is rescaled. Fixed: nothing is subtracted, which is right wherever
// |score| log2(e) <= kFixedRange: a probability then lies in [2^-60, 2^60], a normal number of
// bfloat16 and float; 2^20 of them add up to at most 2^80, and times values below 2^46 to less
// than 2^127; and dividing by the sum leaves the relative error of every term as it was.
#pragma once

#include <cuda_runtime.h>

#include "cuda/hopper.cuh"
#include "cuda/row.cuh"
#include "math/types.h"

namespace lens::gpu {

enum class Softmax : int { kFixed = 0, kRunning = 1 };

constexpr double kLog2E = 1.4426950408889634;
constexpr double kFixedRange = 60;  // powers of two

// 2^x for |x| <= 126 on the multiply-add units: x = n + f with |f| <= 1/2 by adding 1.5 * 2^23, 2^f
// as the cubic of least relative error there, 7.5e-5, n added to the exponent. A NaN, and x
// outside, gives no number that means anything; NaN and infinite x never give a small one.
__device__ __forceinline__ float exp2_polynomial(float x) {
  constexpr float kRound = 12582912.0f;
  const float rounded = x + kRound;
  const float f = x - (rounded - kRound);
  float y = fmaf(0.05517167f, f, 0.24261113f);
  y = fmaf(y, f, 0.69326097f);
  y = fmaf(y, f, 0.99992806f);
  return bits_to_float(float_to_bits(y) + (float_to_bits(rounded) << 23));
}

// The rows of a thread: what was subtracted from the scores, in powers of two, and the sums of
// exponentials by class.
struct RowSums {
  float shift[2];
  float sum[4];
};

// Masks keys >= valid: their scores become -infinity.
template <int kScores>
__device__ __forceinline__ void mask_keys(float (&s)[kScores], int valid, int lane) {
  const int first = 2 * (lane & 3);
#pragma unroll
  for (int i = 0; i < kScores; ++i) {
    if (8 * (i / 4) + first + (i & 1) >= valid) s[i] = -INFINITY;
  }
}

// s becomes 2^(s * scale - shift) and is added to the sums. kFirst: the rows' first scores.
// Running: `rescale` is what everything summed before has to be multiplied by. kPolynomial of four
// exponentials are polynomials.
template <Softmax kSoftmax, int kPolynomial, bool kFirst, int kScores>
__device__ __forceinline__ void exponentials(float (&s)[kScores], float scale, RowSums& rows,
                                             float (&rescale)[2]) {
  // the new row maximum, and what it does to earlier sums
  if constexpr (kSoftmax == Softmax::kRunning) {
    float top[4] = {s[0], s[1], s[2], s[3]};
#pragma unroll
    for (int i = 4; i < kScores; ++i) top[i & 3] = fmaxf(top[i & 3], s[i]);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float row_max = fmaxf(top[2 * h], top[2 * h + 1]);
      row_max = fmaxf(row_max, __shfl_xor_sync(kFullWarp, row_max, 1));
      row_max = fmaxf(row_max, __shfl_xor_sync(kFullWarp, row_max, 2)) * scale;
      const float shift = kFirst ? row_max : fmaxf(rows.shift[h], row_max);
      rescale[h] = kFirst ? 0.0f : exp2_approx(rows.shift[h] - shift);
      rows.shift[h] = shift;
    }
  }

  // the sums so far
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kFirst) {
      rows.sum[i] = 0.0f;
    } else if constexpr (kSoftmax == Softmax::kRunning) {
      rows.sum[i] *= rescale[i / 2];
    }
  }

  // exponentials
#pragma unroll
  for (int i = 0; i < kScores; ++i) {
    const bool polynomial = kPolynomial > 0 && (i & 3) == ((i >> 2) & 3);
    float x =
        kSoftmax == Softmax::kFixed ? s[i] * scale : fmaf(s[i], scale, -rows.shift[(i & 3) / 2]);
    if (polynomial && kSoftmax == Softmax::kRunning) x = max_or_nan(x, -126.0f);
    s[i] = polynomial ? exp2_polynomial(x) : exp2_approx(x);
    rows.sum[i & 3] += s[i];
  }
}

// The whole sum of row h: every one of its four lanes gets it.
__device__ __forceinline__ float sum_of_row(const RowSums& rows, int h) {
  float sum = rows.sum[2 * h] + rows.sum[2 * h + 1];
  sum += __shfl_xor_sync(kFullWarp, sum, 1);
  sum += __shfl_xor_sync(kFullWarp, sum, 2);
  return sum;
}

}  // namespace lens::gpu
