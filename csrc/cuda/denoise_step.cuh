// y = (x - mean(x)) * rsqrt(var(x) + eps) * (1 + scale_b) + shift_b, the norm before the last GEMM
//
// x [R, D] -> y [R, D]; scale, shift [B, D] with one row stride; offsets int32 [B + 1]. y may be x.
// Moves 2 R D elements (bfloat16, R = 8192, D = 1536: 50 MB), once per step. Bound by memory. One
// warp per row; the row is read three times, from L1 after the first, so that the variance is
// summed over differences from the mean.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/row.cuh"
#include "math/formulas.h"

namespace lens::gpu {

struct FinalNorm {
  const void* x;
  const void* scale;
  const void* shift;
  const int32_t* offsets;
  void* y;
  int64_t R, B, D, stride;
  float eps;
};

// registers <= 64: final_norm_kernel
template <class T>
__global__ void __launch_bounds__(kWarp* kRowsPerBlock) final_norm_kernel(const FinalNorm p) {
  // thread identity
  const int lane = threadIdx.x, width = int(p.D);
  const int64_t row = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.y;
  if (row >= p.R) return;
  const T* x = static_cast<const T*>(p.x) + row * p.D;
  T* y = static_cast<T*>(p.y) + row * p.D;
  const int64_t b = warp_sample_of_row(p.offsets, p.B, lane, row);
  const T* scale = static_cast<const T*>(p.scale) + b * p.stride;
  const T* shift = static_cast<const T*>(p.shift) + b * p.stride;

  // mean, then the variance around it
  float sum = 0;
  for_chunks<T, 0>(lane, width, [&](int, int column) {
    Values<T> v = load<true>(x, column, width);
    sum += sum_chunk(v.e);
  });
  const float mean = sum_lanes(sum) / float(width);
  float square = 0;
  for_chunks<T, 0>(lane, width, [&](int, int column) {
    Values<T> v = load<true>(x, column, width);
#pragma unroll
    for (int j = 0; j < kChunk<T>; ++j) v.e[j] = (v.e[j] - mean) * (v.e[j] - mean);
    square += sum_chunk(v.e);
  });
  const float rstd = inverse_sqrt(sum_lanes(square) / float(width) + p.eps);

  // norm, modulation, store
  for_chunks<T, 0>(lane, width, [&](int, int column) {
    Values<T> v = load<true>(x, column, width);
    const Values<T> by = load<true>(scale, column, width), to = load<true>(shift, column, width);
#pragma unroll
    for (int j = 0; j < kChunk<T>; ++j) {
      v.e[j] = norm_modulate((v.e[j] - mean) * rstd, 1.0f, by.e[j], to.e[j]);
    }
    store<true>(y, column, width, v);
  });
}

}  // namespace lens::gpu
