// comb = u + guidance * (c - u); comb *= |c| / |comb| per row (factor 1 where |comb| is 0);
// out = x + delta_b * comb. Without uncond comb = c.
//
// x, out acc [R, C]; cond, uncond [R, C]; delta acc [B]; offsets int32 [B + 1]. out may be x. Moves
// (2 acc + 2 storage) R C bytes (bfloat16 velocities, R = 4096, C = 128: 6.3 MB): short enough that
// the launch itself is what it costs. One warp per row, four channels per lane: the 128 channels of
// the released model are one access each, kept in registers.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/row.cuh"
#include "math/formulas.h"

namespace lens::gpu {

constexpr int kGroup = 4;  // channels per lane and access

template <bool kVector, class T>
__device__ __forceinline__ void load_group(const T* row, int column, int width,
                                           Acc<T> (&out)[kGroup]) {
  if constexpr (kVector) {
    const Pack<T, kGroup> group = *reinterpret_cast<const Pack<T, kGroup>*>(row + column);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) out[j] = widen(group.e[j]);
  } else {
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      out[j] = column + j < width ? widen(row[column + j]) : Acc<T>(0);
    }
  }
}

// registers <= 64: guidance_step_kernel
template <class T, bool kOnce, bool kVector>
__global__ void __launch_bounds__(kWarp* kRowsPerBlock)
    guidance_step_kernel(const GuidanceStepParams p) {
  using A = Acc<T>;
  // thread identity
  const int lane = threadIdx.x, width = int(p.C);
  const int64_t row = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.y;
  if (row >= p.R) return;
  const A* x = static_cast<const A*>(p.x) + row * p.C;
  const T* cond = static_cast<const T*>(p.cond) + row * p.C;
  const T* uncond = static_cast<const T*>(p.uncond) + row * p.C;
  A* out = static_cast<A*>(p.out) + row * p.C;
  const A guidance = A(p.guidance);
  const bool guided = p.uncond != nullptr;

  // comb of one group of channels, before the rescale; adds to both squared norms
  A comb[kGroup], cond_square = A(0), comb_square = A(0);
  const auto combine = [&](int column) {
    A c[kGroup], u[kGroup];
    load_group<kVector>(cond, column, width, c);
    if (guided) load_group<kVector>(uncond, column, width, u);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      comb[j] = guided ? guide(c[j], u[j], guidance) : c[j];
      cond_square = mul_add(c[j], c[j], cond_square);
      comb_square = mul_add(comb[j], comb[j], comb_square);
    }
  };

  // first pass over the row: |c|^2 and |comb|^2
  const int first = lane * kGroup, stride = kWarp * kGroup;
  if constexpr (kOnce) {
    if (first < width) combine(first);
  } else if (guided) {
    for (int column = first; column < width; column += stride) combine(column);
  }

  // |c| / |comb|
  A factor = A(1);
  if (guided) {
    cond_square = sum_lanes(cond_square);
    comb_square = sum_lanes(comb_square);
    if (comb_square != A(0)) factor = sqrt(cond_square) / sqrt(comb_square);
  }
  const A delta = static_cast<const A*>(p.delta)[warp_sample_of_row(p.offsets, p.B, lane, row)];

  // step and store
  for (int column = first; column < width; column += stride) {
    if constexpr (!kOnce) combine(column);
    A place[kGroup];
    load_group<kVector>(x, column, width, place);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) place[j] = mul_add(delta, comb[j] * factor, place[j]);
    if constexpr (kVector) {
      constexpr int kStore = 16 / int(sizeof(A));
#pragma unroll
      for (int j = 0; j < kGroup; j += kStore) {
        Pack<A, kStore> part;
#pragma unroll
        for (int i = 0; i < kStore; ++i) part.e[i] = place[j + i];
        *reinterpret_cast<Pack<A, kStore>*>(out + column + j) = part;
      }
    } else {
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        if (column + j < width) out[column + j] = place[j];
      }
    }
    if constexpr (kOnce) break;
  }
}

}  // namespace lens::gpu
