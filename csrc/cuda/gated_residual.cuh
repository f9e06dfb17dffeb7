// out = x + gate_b * y
//
// x, y [R, D] -> out [R, D]; gate [B, D] with any row stride; offsets int32 [B + 1]. out may be x.
// Moves 3 R D elements (bfloat16, R = 8192, D = 1536: 75 MB); gate comes from L1. Bound by memory.
// A warp takes kGatedSegment chunks of one row, all loads before the first use.
#pragma once

#include "cuda/column_sums.cuh"
#include "cuda/launch.cuh"
#include "math/formulas.h"

namespace lens::gpu {

constexpr int kGatedSegment = 3;  // chunks per lane: two warps share a row of 1536 bfloat16

// registers <= 64: gated_residual_kernel
template <class T, bool kVector>
__global__ void __launch_bounds__(kWarp* kRowsPerBlock)
    gated_residual_kernel(const GatedResidualParams p) {
  // thread identity
  const int lane = threadIdx.x, width = int(p.D);
  const int64_t row = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.y;
  if (row >= p.R) return;
  const int first = (int(blockIdx.y) * kGatedSegment * kWarp + lane) * kChunk<T>;
  const T* x = static_cast<const T*>(p.x) + row * p.D;
  const T* y = static_cast<const T*>(p.y) + row * p.D;

  // load
  uint4 x_raw[kGatedSegment], y_raw[kGatedSegment];
#pragma unroll
  for (int k = 0; k < kGatedSegment; ++k) {
    const int column = first + k * kWarp * kChunk<T>;
    x_raw[k] = y_raw[k] = make_uint4(0, 0, 0, 0);
    if (column < width) {
      x_raw[k] = load_raw<kVector>(x, column, width);
      y_raw[k] = load_raw<kVector>(y, column, width);
    }
  }
  const int64_t b = warp_sample_of_row(p.offsets, p.B, lane, row);
  const T* gate = static_cast<const T*>(p.gate) + b * p.gate_stride;

  // compute and store
#pragma unroll
  for (int k = 0; k < kGatedSegment; ++k) {
    const int column = first + k * kWarp * kChunk<T>;
    if (column >= width) continue;
    const Values<T> gates = load<kVector>(gate, column, width);
    Values<T> sum = widened<T>(x_raw[k]);
    const Values<T> addend = widened<T>(y_raw[k]);
#pragma unroll
    for (int j = 0; j < kChunk<T>; ++j) sum.e[j] = mul_add(gates.e[j], addend.e[j], sum.e[j]);
    store<kVector>(static_cast<T*>(p.out) + row * p.D, column, width, sum);
  }
}

// dy = gate_b * dout; workspace: sums over at most 32 rows of dout * y. Moves 3 R D elements.
// A block owns one slot of the workspace and blockDim.y rows side by side.
// registers <= 80: gated_residual_backward_kernel
template <class T, int K, bool kVector>
__global__ void __launch_bounds__(kBackwardThreads, 2)
    gated_residual_backward_kernel(const GatedResidualBackwardParams p) {
  constexpr int V = kChunk<T>;
  __shared__ ColumnExchange<T> shared;

  // thread identity
  const int thread = int(threadIdx.x), width = int(p.D);
  const Slab slab = slab_of(p.offsets, p.B, thread % kWarp, blockIdx.x);
  if (slab.begin >= slab.end) return;  // the whole block
  const int rows = int(slab.end - slab.begin);
  const T* dout = static_cast<const T*>(p.dout) + slab.begin * p.D;
  const T* y = static_cast<const T*>(p.y) + slab.begin * p.D;
  T* dy = static_cast<T*>(p.dy) + slab.begin * p.D;

  // load, compute, store
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int column = (k * int(blockDim.x) + thread) * V;
    Values<T> gate{}, sum{};
    if (column < width) {
      gate = load<kVector>(static_cast<const T*>(p.gate) + slab.b * p.gate_stride, column, width);
#pragma unroll 2
      for (int row = int(threadIdx.y); row < rows; row += int(blockDim.y)) {
        Values<T> d = load<kVector>(dout + row * width, column, width);
        const Values<T> factor = load<kVector>(y + row * width, column, width);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          sum.e[j] += d.e[j] * factor.e[j];
          d.e[j] *= gate.e[j];
        }
        store<kVector>(dy + row * width, column, width, d);
      }
    }
    store_columns<kVector>(shared, sum, column, width,
                           static_cast<Acc<T>*>(p.workspace) + int64_t(blockIdx.x) * p.D);
  }
}

}  // namespace lens::gpu
