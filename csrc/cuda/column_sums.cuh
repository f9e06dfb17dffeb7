// Column sums over the rows of a sample in two stages, without atomics (see params/common.h): a
// block of stage one owns one slot of the workspace; stage two adds a sample's slots in a fixed
// order.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/row.cuh"

namespace lens::gpu {

// Threads of a block of stage one: (threads of a row, rows side by side).
constexpr int kBackwardThreads = 384;
constexpr int kWideChunks = 2;  // chunks of a row per thread when one is not enough

inline int backward_threads_of_row(int64_t width, int chunk) {
  const int64_t threads = ceil_div(ceil_div(width, chunk), kWarp) * kWarp;
  return int(threads < kBackwardThreads ? threads : kBackwardThreads);
}
inline dim3 backward_block(int64_t width, int chunk) {
  const int threads = backward_threads_of_row(width, chunk);
  return dim3(unsigned(threads), unsigned(kBackwardThreads / threads));
}
inline bool backward_one_chunk(int64_t width, int chunk) {
  return width <= int64_t(kBackwardThreads) * chunk;
}
inline bool backward_fits(int64_t width, int chunk) {
  return width <= int64_t(kBackwardThreads) * kWideChunks * chunk;
}

// launch_for of a backward pass, whose blocks hold a row of limited width.
template <class Params, class F>
int launch_backward_for(const Params& p, F f) {
  bool fits = true;
  const int state = launch_for(p.dtype, p.R, p.D, [&](auto* tag) {
    fits = backward_fits(p.D, kChunk<std::remove_pointer_t<decltype(tag)>>);
    if (fits) f(tag);
  });
  return fits ? state : int(cudaErrorNotSupported);
}

// The rows of one slot.
struct Slab {
  int64_t b, begin, end;
};

// Rows of slot `slot`; none when begin >= end.
__device__ __forceinline__ Slab slab_of(const int32_t* offsets, int64_t B, int lane, int64_t slot) {
  Slab slab;
  slab.b =
      last_sample(B, lane, slot, [&](int64_t b) { return split_slot(int64_t(offsets[b]), b); });
  const int64_t first = offsets[slab.b], stop = offsets[slab.b + 1];
  slab.begin = first + (slot - split_slot(first, slab.b)) * kSplitRows;
  slab.end = slab.begin + kSplitRows < stop ? slab.begin + kSplitRows : stop;
  return slab;
}

// Where the rows side by side of a block meet: one value of every thread's chunk after another.
template <class T>
struct ColumnExchange {
  Acc<T> value[kChunk<T>][kBackwardThreads];
};

// Adds the sums of the block's groups (threadIdx.y) in order and stores them as one row of the
// workspace. All threads of the block call it.
template <bool kVector, class T>
__device__ __forceinline__ void store_columns(ColumnExchange<T>& shared, Values<T> sum, int column,
                                              int width, Acc<T>* row) {
  using A = Acc<T>;
  if (blockDim.y > 1) {
    const int thread = int(threadIdx.y * blockDim.x + threadIdx.x);
#pragma unroll
    for (int j = 0; j < kChunk<T>; ++j) shared.value[j][thread] = sum.e[j];
    __syncthreads();
    for (int group = 1; threadIdx.y == 0 && group < int(blockDim.y); ++group) {
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) {
        sum.e[j] += shared.value[j][group * int(blockDim.x) + int(threadIdx.x)];
      }
    }
    __syncthreads();  // the next plane reuses the exchange
  }
  if (threadIdx.y != 0 || column >= width) return;
  if constexpr (kVector) {
#pragma unroll
    for (int j = 0; j < kChunk<T>; j += kChunk<A>) {
      Pack<A, kChunk<A>> part;
#pragma unroll
      for (int i = 0; i < kChunk<A>; ++i) part.e[i] = sum.e[j + i];
      *reinterpret_cast<Pack<A, kChunk<A>>*>(row + column + j) = part;
    }
  } else {
#pragma unroll
    for (int j = 0; j < kChunk<T>; ++j) {
      if (column + j < width) row[column + j] = sum.e[j];
    }
  }
}

// ---- stage two
constexpr int kSumRows = 8;  // slots a block adds side by side

struct SlotSums {
  void* workspace;         // acc [slots, planes, D]
  const int32_t* offsets;  // [B + 1]
  int64_t B, D;
  int planes;
  const void* factor[3];  // [D] the plane's sum is multiplied with, or null
  void* out[3];           // [B, D] of the plane
  bool keep_first;        // leave the sum of plane 0 in the sample's first slot
};

// out[plane][b] = factor * sum of the sample's slots. 32 columns per block, coalesced.
// registers <= 48: sum_slots_kernel
template <class T>
__global__ void __launch_bounds__(kWarp* kSumRows) sum_slots_kernel(const SlotSums p) {
  using A = Acc<T>;
  __shared__ A partial[kSumRows][kWarp];
  const int64_t tiles = (p.D + kWarp - 1) / kWarp;
  const int64_t b = blockIdx.x / tiles;
  const int64_t column = blockIdx.x % tiles * kWarp + threadIdx.x;
  const int plane = int(blockIdx.y);
  const int64_t first = split_slot(p.offsets[b], b);
  const int64_t slots = split_chunks(int64_t(p.offsets[b + 1]) - p.offsets[b]);
  A* workspace = static_cast<A*>(p.workspace) + (first * p.planes + plane) * p.D;

  A sum = A(0);
  if (column < p.D) {
#pragma unroll 4
    for (int64_t slot = threadIdx.y; slot < slots; slot += kSumRows) {
      sum += workspace[slot * p.planes * p.D + column];
    }
  }
  partial[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= p.D) return;
#pragma unroll
  for (int i = 1; i < kSumRows; ++i) sum += partial[i][threadIdx.x];

  if (plane == 0 && p.keep_first) workspace[column] = sum;
  // constant indices: a parameter indexed at run time would be copied to local memory
  const void* factors = plane == 0 ? p.factor[0] : plane == 1 ? p.factor[1] : p.factor[2];
  void* out = plane == 0 ? p.out[0] : plane == 1 ? p.out[1] : p.out[2];
  const T* factor = static_cast<const T*>(factors);
  static_cast<T*>(out)[b * p.D + column] =
      narrow<T>(factor == nullptr ? sum : sum * widen(factor[column]));
}

template <class T>
void launch_sum_slots(const SlotSums& p, void* stream) {
  if (p.B == 0) return;
  const dim3 grid(unsigned(ceil_div(p.D, kWarp) * p.B), unsigned(p.planes));
  LENS_LAUNCH(sum_slots_kernel<T>, grid, dim3(kWarp, kSumRows), stream, p);
}

// dweight = sum_b (1 + scale_b) * P_b, with P_b in the first slot of sample b.
// registers <= 48: sum_weight_kernel
template <class T>
__global__ void __launch_bounds__(128)
    sum_weight_kernel(const Acc<T>* workspace, int planes, const int32_t* offsets, const T* scale,
                      int64_t scale_stride, int64_t B, int64_t D, T* dweight) {
  const int64_t column = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (column >= D) return;
  Acc<T> sum = Acc<T>(0);
  for (int64_t b = 0; b < B; ++b) {
    sum += (Acc<T>(1) + widen(scale[b * scale_stride + column])) *
           workspace[split_slot(offsets[b], b) * planes * D + column];
  }
  dweight[column] = narrow<T>(sum);
}

template <class T, class Params>
void launch_sum_weight(const Params& p, int planes) {
  LENS_LAUNCH(sum_weight_kernel<T>, dim3(unsigned(ceil_div(p.D, 128))), dim3(128), p.stream,
              static_cast<const Acc<T>*>(p.workspace), planes, p.offsets,
              static_cast<const T*>(p.scale), p.scale_stride, p.B, p.D, static_cast<T*>(p.dweight));
}

}  // namespace lens::gpu
