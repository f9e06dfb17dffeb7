// y = silu(x w1^T) * (x w3^T), weight [2, F, K] as it lies: a tile takes the same columns of w1 and
// of w3, so that a thread holds both halves of its outputs.
#pragma once

#include "cuda/gemm/epilogue.cuh"

namespace lens::gpu {

struct LinearSwigluEpilogue {
  using Params = LinearSwigluParams;
  static constexpr int kParts = 2;

  template <int M, int N>
  static __device__ __forceinline__ void store(const Params& p, const float (&d)[N / 2],
                                               const Fragment& at) {
    auto* y = static_cast<Bf16*>(at.stream == kImage ? p.image_y : p.text_y);
    const int64_t rows = at.stream == kImage ? p.RI : p.RT;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t row = at.row + 8 * h;
#pragma unroll
      for (int g = 0; g < N / 64; ++g) {
        const int column = at.column + 32 * g;
        if (column >= p.F) break;  // the whole warp
        Chunk a = accumulated(d, g, h);
        const Chunk u = accumulated(d, g + N / 64, h);
#pragma unroll
        for (int i = 0; i < 8; ++i) a.e[i] = a.e[i] * sigmoid(a.e[i]) * u.e[i];
        if (row < rows) store_chunk(a, y + row * p.F + column + 8 * at.quad);
      }
    }
  }
};

}  // namespace lens::gpu
