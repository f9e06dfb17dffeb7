// y = silu(x w1^T) * (x w3^T), weight [2, F, K] as it lies: the copies put 8 rows of w1 and 8 of w3
// side by side, so that a thread holds both halves of its outputs.
#pragma once

#include "cuda/gemm/epilogue.cuh"

namespace lens::gpu {

struct LinearSwigluEpilogue {
  using Params = LinearSwigluParams;
  static constexpr bool kInterleaved = true;

  template <int N>
  static __device__ __forceinline__ void store(const Params& p, float (&d)[N / 2],
                                               const Fragment& at) {
    void* y = at.stream == kImage ? p.image_y : p.text_y;
    const int64_t rows = at.stream == kImage ? p.RI : p.RT;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = at.row + 8 * h;
#pragma unroll
      for (int g = 0; g < N / 64; ++g) {
        const int column = at.column / 2 + 32 * g;
        if (column >= p.F) break;  // the whole warp
        uint32_t w[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* a = d + 8 * (4 * g + i) + 2 * h;
          const float* u = a + 4;
          w[i] = bf16_pair(a[0] * sigmoid(a[0]) * u[0], a[1] * sigmoid(a[1]) * u[1]);
        }
        transpose_quad(w, at.quad);
        store_words(w, y, row, p.F, column, at.quad, row < rows);
      }
    }
  }
};

}  // namespace lens::gpu
