// y = x weight^T + bias: the GEMM with nothing fused but the bias, and the first tile to be
// compared on a device.
#pragma once

#include "cuda/gemm/epilogue.cuh"

namespace lens::gpu {

struct LinearEpilogue {
  using Params = LinearParams;
  static constexpr int kParts = 1;

  template <int M, int N>
  static __device__ __forceinline__ void store(const Params& p, const float (&d)[N / 2],
                                               const Fragment& at) {
    const auto* bias = static_cast<const Bf16*>(p.bias);
    auto* y = static_cast<Bf16*>(p.y);
#pragma unroll
    for (int g = 0; g < N / 32; ++g) {
      if (at.column + 32 * g >= p.D) break;  // the whole warp
      const int column = at.column + 32 * g + 8 * at.quad;
      const Chunk add = bias ? load_constants(bias + column) : Chunk{};
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t row = at.row + 8 * h;
        Chunk c = accumulated(d, g, h);
#pragma unroll
        for (int i = 0; i < 8; ++i) c.e[i] += add.e[i];
        if (row < p.R) store_chunk(c, y + row * p.D + column);
      }
    }
  }
};

}  // namespace lens::gpu
