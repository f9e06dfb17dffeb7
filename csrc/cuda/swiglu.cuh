// y = silu(h[:, :F]) * h[:, F:]
//
// h [R, 2, F] -> y [R, F]. Moves 3 R F elements (bfloat16, R = 8192, F = 4096: 201 MB). Bound by
// memory: one exponential per 6 bytes. A warp takes kSwigluSegment chunks of one row, all loads
// before the first use. An odd F puts the second half off the 16-byte grid and takes elements one
// by one.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/row.cuh"
#include "math/formulas.h"

namespace lens::gpu {

constexpr int kSwigluSegment = 4;  // chunks per lane: four warps share a row of 4096 bfloat16

// registers <= 64: swiglu_kernel
template <class T, bool kVector>
__global__ void __launch_bounds__(kWarp* kRowsPerBlock) swiglu_kernel(const SwigluParams p) {
  // thread identity
  const int width = int(p.F);
  const int64_t row = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.y;
  if (row >= p.R) return;
  const int first = (int(blockIdx.y) * kSwigluSegment * kWarp + int(threadIdx.x)) * kChunk<T>;
  const T* a = static_cast<const T*>(p.h) + row * 2 * p.F;

  // load
  uint4 a_raw[kSwigluSegment], u_raw[kSwigluSegment];
#pragma unroll
  for (int k = 0; k < kSwigluSegment; ++k) {
    const int column = first + k * kWarp * kChunk<T>;
    a_raw[k] = u_raw[k] = make_uint4(0, 0, 0, 0);
    if (column < width) {
      a_raw[k] = load_raw<kVector>(a, column, width);
      u_raw[k] = load_raw<kVector>(a + width, column, width);
    }
  }

  // compute and store
#pragma unroll
  for (int k = 0; k < kSwigluSegment; ++k) {
    const int column = first + k * kWarp * kChunk<T>;
    if (column >= width) continue;
    Values<T> y = widened<T>(a_raw[k]);
    const Values<T> u = widened<T>(u_raw[k]);
#pragma unroll
    for (int j = 0; j < kChunk<T>; ++j) y.e[j] = y.e[j] * sigmoid(y.e[j]) * u.e[j];
    store<kVector>(static_cast<T*>(p.y) + row * p.F, column, width, y);
  }
}

// With s = sigmoid(a): da = dy * u * s * (1 + a * (1 - s)), du = dy * a * s. Moves 5 R F elements.
// registers <= 96: swiglu_backward_kernel
template <class T, bool kVector>
__global__ void __launch_bounds__(kWarp* kRowsPerBlock)
    swiglu_backward_kernel(const SwigluBackwardParams p) {
  // thread identity
  const int width = int(p.F);
  const int64_t row = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.y;
  if (row >= p.R) return;
  const int first = (int(blockIdx.y) * kSwigluSegment * kWarp + int(threadIdx.x)) * kChunk<T>;
  const T* dy = static_cast<const T*>(p.dy) + row * p.F;
  const T* a = static_cast<const T*>(p.h) + row * 2 * p.F;
  T* da = static_cast<T*>(p.dh) + row * 2 * p.F;

  // load, compute, store
#pragma unroll 2
  for (int k = 0; k < kSwigluSegment; ++k) {
    const int column = first + k * kWarp * kChunk<T>;
    if (column >= width) continue;
    const Values<T> d = load<kVector>(dy, column, width);
    Values<T> gate = load<kVector>(a, column, width);
    Values<T> u = load<kVector>(a + width, column, width);
#pragma unroll
    for (int j = 0; j < kChunk<T>; ++j) {
      const Acc<T> s = sigmoid(gate.e[j]), up = u.e[j];
      u.e[j] = swiglu_backward_u(d.e[j], gate.e[j], s);
      gate.e[j] = swiglu_backward_a(d.e[j], gate.e[j], up, s);
    }
    store<kVector>(da, column, width, gate);
    store<kVector>(da + width, column, width, u);
  }
}

}  // namespace lens::gpu
