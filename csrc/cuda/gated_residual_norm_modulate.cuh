// x_new = x + gate_b * y, rounded; normed = x_new * rsqrt(mean(x_new^2) + eps) * weight *
// (1 + scale_b) + shift_b
//
// x, y [R, D] -> x_new, normed [R, D]; gate, scale, shift [B, D] with any row stride; weight [D];
// offsets int32 [B + 1]. x_new may be x. Moves 4 R D elements (bfloat16, R = 8192, D = 1536:
// 101 MB) where the two ops apart move 5. Bound by memory. One warp per row, x_new in registers.
#pragma once

#include "cuda/column_sums.cuh"
#include "cuda/launch.cuh"
#include "cuda/norm_backward.cuh"
#include "cuda/norm_row.cuh"

namespace lens::gpu {

// registers <= 128: gated_residual_norm_modulate_kernel
template <class T, int K, bool kVector>
__global__ void __launch_bounds__(kWarp* kRowsPerBlock)
    gated_residual_norm_modulate_kernel(const GatedResidualNormModulateParams p) {
  // thread identity
  const int lane = threadIdx.x, width = int(p.D);
  const int64_t row = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.y;
  if (row >= p.R) return;
  const T* x = static_cast<const T*>(p.x) + row * p.D;
  const T* y = static_cast<const T*>(p.y) + row * p.D;
  T* x_new = static_cast<T*>(p.x_new) + row * p.D;

  // load
  uint4 cached[K > 0 ? K : 1];
  if constexpr (K > 0) {
    for_chunks<T, K>(lane, width,
                     [&](int k, int column) { cached[k] = load_raw<kVector>(x, column, width); });
  }
  const int64_t b = warp_sample_of_row(p.offsets, p.B, lane, row);
  const T* gate = static_cast<const T*>(p.gate) + b * p.gate_stride;

  // the sum, stored, and kept as stored: the norm reads what a later reader of x_new reads
  for_chunks<T, K>(lane, width, [&](int k, int column) {
    Values<T> sum;
    if constexpr (K > 0) {
      sum = widened<T>(cached[k]);
    } else {
      sum = load<kVector>(x, column, width);
    }
    const Values<T> addend = load<kVector>(y, column, width);
    const Values<T> gates = load<kVector>(gate, column, width);
#pragma unroll
    for (int j = 0; j < kChunk<T>; ++j) sum.e[j] = mul_add(gates.e[j], addend.e[j], sum.e[j]);
    cached[k] = store<kVector>(x_new, column, width, sum);
  });

  // norm, modulation, store
  const NormRow<T> constants{
      static_cast<const T*>(p.weight), static_cast<const T*>(p.scale) + b * p.scale_stride,
      static_cast<const T*>(p.shift) + b * p.shift_stride, width, Acc<T>(p.eps)};
  norm_modulate_row<K, kVector>(constants, static_cast<T*>(p.normed) + row * p.D, lane,
                                [&](int k, int column) {
                                  if constexpr (K > 0) return cached[k];
                                  return load_raw<kVector>(x_new, column, width);
                                });
}

// dx = dx_new + (gradient of the norm at x_new), dy = gate_b * dx; workspace: sums over at most 32
// rows of dnormed * n, of dnormed and of dx * y. Moves 6 R D elements.
// registers <= 168: gated_residual_norm_modulate_backward_kernel
template <class T, int K, bool kVector>
__global__ void __launch_bounds__(kBackwardThreads)
    gated_residual_norm_modulate_backward_kernel(const GatedResidualNormModulateBackwardParams p) {
  __shared__ NormBackwardShared<T> shared;
  const NormBackwardArrays<T> arrays{static_cast<const T*>(p.dnormed),
                                     static_cast<const T*>(p.x_new),
                                     static_cast<const T*>(p.weight),
                                     static_cast<const T*>(p.scale),
                                     static_cast<const T*>(p.dx_new),
                                     static_cast<const T*>(p.y),
                                     static_cast<const T*>(p.gate),
                                     static_cast<T*>(p.dx),
                                     static_cast<T*>(p.dy),
                                     static_cast<Acc<T>*>(p.workspace)};
  norm_backward<K, kVector, true>(arrays, p.offsets, p.B, int(p.D), p.scale_stride, p.gate_stride,
                                  Acc<T>(p.eps), shared);
}

}  // namespace lens::gpu
