// y = x * rsqrt(mean(x^2) + eps) * weight * (1 + scale_b) + shift_b
//
// x [R, D] -> y [R, D]; weight [D]; scale, shift [B, D] with any row stride; offsets int32 [B + 1].
// Moves 2 R D elements (bfloat16, R = 8192, D = 1536: 50 MB); weight, scale and shift come from L1.
// Bound by memory. One warp per row, the row in registers, no shared memory: 6 loads of 16 bytes in
// flight per lane at D = 1536. A second set of rows may follow the first in the same launch.
#pragma once

#include "cuda/column_sums.cuh"
#include "cuda/launch.cuh"
#include "cuda/norm_backward.cuh"
#include "cuda/norm_row.cuh"

namespace lens {

// Rows of equal width, eps and type; the second may have none.
struct RmsNormModulateSets {
  RmsNormModulateParams p[2];
};
int rms_norm_modulate_sets_cuda(const RmsNormModulateSets& sets);

namespace gpu {

// registers <= 96: rms_norm_modulate_kernel
template <class T, int K, bool kVector>
__global__ void __launch_bounds__(kWarp* kRowsPerBlock)
    rms_norm_modulate_kernel(const __grid_constant__ RmsNormModulateSets sets) {
  // thread identity
  const int lane = threadIdx.x;
  int64_t row = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.y;
  const int set = row >= sets.p[0].R;
  if (set) row -= sets.p[0].R;
  const RmsNormModulateParams& p = sets.p[set];
  if (row >= p.R) return;
  const int width = int(p.D);

  // load
  const T* x = static_cast<const T*>(p.x) + row * p.D;
  uint4 cached[K > 0 ? K : 1];
  if constexpr (K > 0) {
    for_chunks<T, K>(lane, width,
                     [&](int k, int column) { cached[k] = load_raw<kVector>(x, column, width); });
  }
  const int64_t b = warp_sample_of_row(p.offsets, p.B, lane, row);

  // compute and store
  const NormRow<T> constants{
      static_cast<const T*>(p.weight), static_cast<const T*>(p.scale) + b * p.scale_stride,
      static_cast<const T*>(p.shift) + b * p.shift_stride, width, Acc<T>(p.eps)};
  norm_modulate_row<K, kVector>(constants, static_cast<T*>(p.y) + row * p.D, lane,
                                [&](int k, int column) {
                                  if constexpr (K > 0) return cached[k];
                                  return load_raw<kVector>(x, column, width);
                                });
}

// With n = x * rstd, g = dy * weight * (1 + scale_b):
//   dx = rstd * (g - n * mean(g * n)), workspace: sums over at most 32 rows of dy * n and of dy
// Moves 3 R D elements and 1/32 of that much float32 twice.
// registers <= 80: rms_norm_modulate_backward_kernel
// registers <= 160: rms_norm_modulate_backward_kernel<Bf16, 2
// registers <= 128: rms_norm_modulate_backward_kernel<float, 2
// registers <= 128: rms_norm_modulate_backward_kernel<double, 2
template <class T, int K, bool kVector>
__global__ void __launch_bounds__(kBackwardThreads, K == 1 ? 2 : 1)
    rms_norm_modulate_backward_kernel(const RmsNormModulateBackwardParams p) {
  __shared__ NormBackwardShared<T> shared;
  const NormBackwardArrays<T> arrays{static_cast<const T*>(p.dy),
                                     static_cast<const T*>(p.x),
                                     static_cast<const T*>(p.weight),
                                     static_cast<const T*>(p.scale),
                                     nullptr,
                                     nullptr,
                                     nullptr,
                                     static_cast<T*>(p.dx),
                                     nullptr,
                                     static_cast<Acc<T>*>(p.workspace)};
  norm_backward<K, kVector, false>(arrays, p.offsets, p.B, int(p.D), p.scale_stride, 0,
                                   Acc<T>(p.eps), shared);
}

}  // namespace gpu
}  // namespace lens
