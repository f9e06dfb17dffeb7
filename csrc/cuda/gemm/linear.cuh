// y = x weight^T + bias: the product alone, and the first tile to be compared on a device.
#pragma once

#include "cuda/gemm/epilogue.cuh"

namespace lens::gpu {

struct LinearEpilogue {
  using Params = LinearParams;
  static constexpr bool kInterleaved = false;

  template <int N>
  static __device__ __forceinline__ void store(const Params& p, float (&d)[N / 2],
                                               const Fragment& at) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = at.row + 8 * h;
#pragma unroll
      for (int g = 0; g < N / 32; ++g) {
        const int column = at.column + 32 * g;
        if (column >= p.D) break;  // the whole warp
        uint32_t w[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* pair = d + 4 * (4 * g + i) + 2 * h;
          const Pair bias = load_pair(p.bias, column + 8 * i + 2 * at.quad);
          w[i] = bf16_pair(pair[0] + bias.e[0], pair[1] + bias.e[1]);
        }
        transpose_quad(w, at.quad);
        store_words(w, p.y, row, p.D, column, at.quad, row < p.R);
      }
    }
  }
};

}  // namespace lens::gpu
