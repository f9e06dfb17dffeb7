// Backward of RMSNorm with modulation over one slab of rows: the part rms_norm_modulate_backward
// and gated_residual_norm_modulate_backward share.
//
// A block owns one slot of the workspace, at most 32 rows of one sample. Its threads stand in
// groups, one group per row, blockDim.y rows side by side; a thread keeps its columns' weights and
// sums in registers over all rows of the slab, and loads its next row before it waits for the sums
// of this one.
#pragma once

#include "cuda/column_sums.cuh"
#include "math/formulas.h"

namespace lens::gpu {

template <class T>
struct NormBackwardArrays {
  const T* dy;        // [R, D] gradient of the norm's output
  const T* x;         // [R, D] input of the norm
  const T* weight;    // [D]
  const T* scale;     // [B, D]
  const T* dx_new;    // [R, D] gradient that reaches x past the norm; gated only
  const T* y;         // [R, D] what the gate multiplied; gated only
  const T* gate;      // [B, D] gated only
  T* dx;              // [R, D]
  T* dy_gated;        // [R, D] gate * dx; gated only
  Acc<T>* workspace;  // [slots, 2 or 3, D]
};

template <class T>
struct NormBackwardShared {
  // sums of x^2 and of g * x per warp; two generations, so that one barrier per row suffices
  Acc<T> square[2][kBackwardThreads / kWarp];
  Acc<T> dot[2][kBackwardThreads / kWarp];
  ColumnExchange<T> columns;
};

template <int K, bool kVector, bool kGated, class T>
__device__ __forceinline__ void norm_backward(const NormBackwardArrays<T>& p,
                                              const int32_t* offsets, int64_t B, int D,
                                              int64_t scale_stride, int64_t gate_stride, Acc<T> eps,
                                              NormBackwardShared<T>& shared) {
  using A = Acc<T>;
  constexpr int V = kChunk<T>, kPlanes = kGated ? 3 : 2;

  // thread identity
  const int thread = int(threadIdx.x), group = int(threadIdx.y), groups = int(blockDim.y);
  const int warps = int(blockDim.x) / kWarp, first_warp = group * warps;
  const Slab slab = slab_of(offsets, B, thread % kWarp, blockIdx.x);
  if (slab.begin >= slab.end) return;  // the whole block
  // rows count from the slab's first, so that an int holds an element's place
  const int rows = int(slab.end - slab.begin);
  const T* x_rows = p.x + slab.begin * D;
  const T* dy_rows = p.dy + slab.begin * D;
  const auto column_of = [&](int k) { return (k * int(blockDim.x) + thread) * V; };

  // what all rows of the slab share: weight * (1 + scale_b)
  A factor[K][V];
  Values<T> sums[kPlanes][K];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int column = column_of(k);
    const bool inside = column < D;
    Values<T> weight{}, scale{};
    if (inside) weight = load<kVector>(p.weight, column, D);
    if (inside) scale = load<kVector>(p.scale + slab.b * scale_stride, column, D);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      factor[k][j] = norm_modulate_backward(A(1), weight.e[j], scale.e[j]);
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane) sums[plane][k].e[j] = A(0);
    }
  }

  // the next row of this group, loaded ahead
  uint4 x_next[K], dy_next[K];
  const auto fetch = [&](int row) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      x_next[k] = dy_next[k] = make_uint4(0, 0, 0, 0);
      if (row < rows && column_of(k) < D) {
        x_next[k] = load_raw<kVector>(x_rows + row * D, column_of(k), D);
        dy_next[k] = load_raw<kVector>(dy_rows + row * D, column_of(k), D);
      }
    }
  };
  fetch(group);

  // row by row, `groups` side by side
  int generation = 0;
  for (int base = 0; base < rows; base += groups, generation ^= 1) {
    const int row = base + group;
    uint4 x_raw[K], dy_raw[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      x_raw[k] = x_next[k];
      dy_raw[k] = dy_next[k];
    }
    fetch(row + groups);

    // sums over the row: lanes, then the group's warps
    A square = A(0), dot = A(0);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const Values<T> x = widened<T>(x_raw[k]), dy = widened<T>(dy_raw[k]);
      A squares[V], dots[V];
#pragma unroll
      for (int j = 0; j < V; ++j) {
        squares[j] = x.e[j] * x.e[j];
        dots[j] = dy.e[j] * factor[k][j] * x.e[j];
      }
      square += sum_chunk(squares);
      dot += sum_chunk(dots);
    }
    square = sum_lanes(square);
    dot = sum_lanes(dot);
    if (thread % kWarp == 0) {
      shared.square[generation][first_warp + thread / kWarp] = square;
      shared.dot[generation][first_warp + thread / kWarp] = dot;
    }
    __syncthreads();
    square = dot = A(0);
#pragma unroll 1  // unrolled, its loads would cost the registers of a second block per SM
    for (int warp = first_warp; warp < first_warp + warps; ++warp) {
      square += shared.square[generation][warp];
      dot += shared.dot[generation][warp];
    }
    if (row >= rows) continue;  // still takes part in the next row's barrier

    // gradients of the row, and what it adds to the column sums
    const A rstd = inverse_sqrt(square / A(D) + eps);
    const A mean_gn = dot * rstd / A(D);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int column = column_of(k);
      if (column >= D) continue;
      const Values<T> x = widened<T>(x_raw[k]), dy = widened<T>(dy_raw[k]);
      Values<T> dx, y, passed, gate;
      if (kGated) {
        passed = load<kVector>(p.dx_new + slab.begin * D + row * D, column, D);
        y = load<kVector>(p.y + slab.begin * D + row * D, column, D);
        gate = load<kVector>(p.gate + slab.b * gate_stride, column, D);
      }
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const A n = x.e[j] * rstd;
        dx.e[j] = rms_norm_backward(dy.e[j] * factor[k][j], n, mean_gn, rstd);
        if (kGated) {
          dx.e[j] += passed.e[j];
          sums[kPlanes - 1][k].e[j] += dx.e[j] * y.e[j];
          y.e[j] = gate.e[j] * dx.e[j];
        }
        sums[0][k].e[j] += dy.e[j] * n;
        sums[1][k].e[j] += dy.e[j];
      }
      store<kVector>(p.dx + slab.begin * D + row * D, column, D, dx);
      if (kGated) store<kVector>(p.dy_gated + slab.begin * D + row * D, column, D, y);
    }
  }

  // the slab's column sums into its slot
#pragma unroll
  for (int plane = 0; plane < kPlanes; ++plane) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      store_columns<kVector>(shared.columns, sums[plane][k], column_of(k), D,
                             p.workspace + (int64_t(blockIdx.x) * kPlanes + plane) * D);
    }
  }
}

}  // namespace lens::gpu
