// RMSNorm, weight, scale and shift of one row by one warp: the part rms_norm_modulate and
// gated_residual_norm_modulate share.
#pragma once

#include "cuda/row.cuh"
#include "math/formulas.h"

namespace lens::gpu {

// Chunks a lane keeps in registers (K), of which there are instances for 3, 6 and 12: production
// rows are 1536 wide, 6 chunks of bfloat16 or 12 of float32; 3 chunks serve Lens-Mini. Wider rows,
// and all of float64, are read twice (K = 0), the second time from L1.
template <class T, int K>
constexpr int kCached = sizeof(T) < 8 ? K : 0;

template <class T>
int cached_chunks(int64_t width) {
  const int64_t chunks = (width + kWarp * kChunk<T> - 1) / (kWarp * kChunk<T>);
  return sizeof(T) == 8 ? 0 : chunks <= 3 ? 3 : chunks <= 6 ? 6 : chunks <= 12 ? 12 : 0;
}

// Row constants of a norm with modulation.
template <class T>
struct NormRow {
  const T* weight;
  const T* scale;
  const T* shift;
  int width;
  Acc<T> eps;
};

// source(k, column) is the raw chunk, the same both times it is asked for.
template <int K, bool kVector, class T, class Source>
__device__ __forceinline__ void norm_modulate_row(const NormRow<T>& row, T* out, int lane,
                                                  Source source) {
  using A = Acc<T>;
  A square = A(0);
  for_chunks<T, K>(lane, row.width, [&](int k, int column) {
    Values<T> x = widened<T>(source(k, column));
#pragma unroll
    for (int j = 0; j < kChunk<T>; ++j) x.e[j] *= x.e[j];
    square += sum_chunk(x.e);
  });
  const A rstd = inverse_sqrt(sum_lanes(square) / A(row.width) + row.eps);
  for_chunks<T, K>(lane, row.width, [&](int k, int column) {
    Values<T> x = widened<T>(source(k, column));
    const Values<T> weight = load<kVector>(row.weight, column, row.width);
    const Values<T> scale = load<kVector>(row.scale, column, row.width);
    const Values<T> shift = load<kVector>(row.shift, column, row.width);
#pragma unroll
    for (int j = 0; j < kChunk<T>; ++j) {
      x.e[j] = norm_modulate(x.e[j] * rstd, weight.e[j], scale.e[j], shift.e[j]);
    }
    store<kVector>(out, column, row.width, x);
  });
}

}  // namespace lens::gpu
