// y = act((x - mean_bg) * rstd_bg * weight + bias): mean and variance over the rows of sample b and
// the D / G channels of group g.
//
// x [R, D] -> y [R, D]. Moves 3 R D elements (bfloat16, a picture of 512 x 512, D = 128: 201 MB),
// bound by memory. Three launches, none of which another could begin without: the statistics of
// kSplitRows rows by channel, one block each; mean and rstd of a group from them; the rows. Sums go
// over fixed runs of rows in a fixed order, so a sample's bits are its own.
#pragma once

#include "cuda/column_sums.cuh"
#include "cuda/launch.cuh"
#include "cuda/row.cuh"
#include "math/formulas.h"

namespace lens::gpu {

constexpr int kStatisticsThreads = 128;  // widths up to 1024 bfloat16 in one turn
constexpr int kTableThreads = 256;
constexpr int kApplyThreads = 256;
// Blocks a multiprocessor holds at least. Without them ptxas aims at more and spills for sm_80.
constexpr int kStatisticsBlocks = 5, kTableBlocks = 4;

// Mean and sum of squared deviations of a slot's rows, channel by channel. Sums go over differences
// from the first row, which lies among the values: nothing cancels where the mean is large.
// registers <= 96: group_norm_silu_statistics_kernel
template <class T, bool kVector>
__global__ void __launch_bounds__(kStatisticsThreads, kStatisticsBlocks)
    group_norm_silu_statistics_kernel(const GroupNormSiluParams p) {
  using A = Acc<T>;
  // thread identity
  const int width = int(p.D), thread = int(threadIdx.x);
  const int64_t slot = blockIdx.x;
  const Slab slab = slab_of(p.offsets, p.B, thread % kWarp, slot);
  if (slab.begin >= slab.end) return;
  A* means = static_cast<A*>(p.workspace) + slot * 2 * p.D;
  const A part = A(1) / A(slab.end - slab.begin);

  for (int column = thread * kChunk<T>; column < width; column += kStatisticsThreads * kChunk<T>) {
    const T* x = static_cast<const T*>(p.x) + slab.begin * p.D;
    const Values<T> origin = load<kVector>(x, column, width);
    Values<T> sum, squares;
#pragma unroll
    for (int j = 0; j < kChunk<T>; ++j) sum.e[j] = squares.e[j] = A(0);
#pragma unroll 4
    for (int64_t row = slab.begin + 1; row < slab.end; ++row) {
      x += p.D;
      const Values<T> value = load<kVector>(x, column, width);
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) {
        const A difference = value.e[j] - origin.e[j];
        sum.e[j] += difference;
        squares.e[j] = mul_add(difference, difference, squares.e[j]);
      }
    }
#pragma unroll
    for (int j = 0; j < kChunk<T>; ++j) {
      if (column + j >= width) continue;
      const A shift = sum.e[j] * part, rest = squares.e[j] - sum.e[j] * shift;
      means[column + j] = origin.e[j] + shift;
      means[p.D + column + j] =
          rest > A(0) ? rest : A(0);  // rounding; a NaN is in the mean as well
    }
  }
}

// The sum over the block's threads, the same bits in each of them.
template <class A>
__device__ __forceinline__ A sum_block(A (&shared)[kTableThreads / kWarp], A value) {
  value = sum_lanes(value);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = value;
  __syncthreads();
  A sum = A(0);
#pragma unroll
  for (int i = 0; i < kTableThreads / kWarp; ++i) sum += shared[i];
  __syncthreads();  // the next sum reuses the exchange
  return sum;
}

// Mean and rstd * weight of one group of one sample from the slots' statistics.
// registers <= 64: group_norm_silu_table_kernel
template <class T>
__global__ void __launch_bounds__(kTableThreads, kTableBlocks)
    group_norm_silu_table_kernel(const GroupNormSiluParams p) {
  using A = Acc<T>;
  __shared__ A shared[kTableThreads / kWarp];
  // thread identity
  const int64_t b = blockIdx.x / p.G, g = blockIdx.x % p.G;
  const int channels = int(p.D / p.G), thread = int(threadIdx.x);
  const int64_t rows = p.offsets[b + 1] - p.offsets[b];
  if (rows == 0) return;
  const int64_t items = split_chunks(rows) * channels;
  const A* slots =
      static_cast<const A*>(p.workspace) + split_slot(p.offsets[b], b) * 2 * p.D + g * channels;
  const auto rows_of = [&](int64_t k) {
    const int64_t left = rows - k * kSplitRows;
    return A(left < kSplitRows ? left : kSplitRows);
  };
  const A share = A(1) / (A(rows) * A(channels));

  A sum = A(0);
  for (int64_t i = thread; i < items; i += kTableThreads) {
    const int64_t k = i / channels;
    sum += slots[k * 2 * p.D + i % channels] * rows_of(k);
  }
  const A mean = sum_block(shared, sum) * share;

  A deviations = A(0);
  for (int64_t i = thread; i < items; i += kTableThreads) {
    const int64_t k = i / channels;
    const A* slot = slots + k * 2 * p.D + i % channels;
    const A apart = slot[0] - mean;
    deviations += mul_add(apart * apart, rows_of(k), slot[p.D]);
  }
  const A rstd = inverse_sqrt(sum_block(shared, deviations) * share + A(p.eps));

  A* table = static_cast<A*>(p.table) + b * 2 * p.D + g * channels;
  for (int c = thread; c < channels; c += kTableThreads) {
    table[c] = mean;
    table[p.D + c] = rstd * widen(static_cast<const T*>(p.weight)[g * channels + c]);
  }
}

// registers <= 64: group_norm_silu_kernel
template <class T, bool kVector, bool kActivate>
__global__ void __launch_bounds__(kApplyThreads)
    group_norm_silu_kernel(const GroupNormSiluParams p) {
  using A = Acc<T>;
  // thread identity
  const int width = int(p.D);
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= p.R) return;
  const int64_t b = sample_of_row(p.offsets, p.B, row);
  const A* table = static_cast<const A*>(p.table) + b * 2 * p.D;

  // load, compute, store
  const int step = int(blockDim.x) * kChunk<T>;
  for (int column = int(threadIdx.x) * kChunk<T>; column < width; column += step) {
    Values<T> n = load<kVector>(static_cast<const T*>(p.x) + row * p.D, column, width);
    const Values<T> bias = load<kVector>(static_cast<const T*>(p.bias), column, width);
#pragma unroll
    for (int j = 0; j < kChunk<T>; ++j) {
      const int channel = column + j < width ? column + j : width - 1;
      n.e[j] = mul_add(n.e[j] - table[channel], table[p.D + channel], bias.e[j]);
      if constexpr (kActivate) n.e[j] *= sigmoid(n.e[j]);
    }
    store<kVector>(static_cast<T*>(p.y) + row * p.D, column, width, n);
  }
}

}  // namespace lens::gpu
