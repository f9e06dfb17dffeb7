// out = x + gate_b * (y weight^T + bias), out may be x: a thread writes what it read, and nothing
// else reads it.
#pragma once

#include "cuda/gemm/epilogue.cuh"
#include "math/formulas.h"

namespace lens::gpu {

struct LinearGatedResidualEpilogue {
  using Params = LinearGatedResidualParams;
  static constexpr bool kInterleaved = false;

  template <int N>
  static __device__ __forceinline__ void store(const Params& p, float (&d)[N / 2],
                                               const Fragment& at) {
    const bool image = at.stream == kImage;
    const int64_t rows = image ? p.RI : p.RT;
    const int32_t* offsets = image ? p.image_offsets : p.text_offsets;
    const void* x = image ? p.image_x : p.text_x;
    void* out = image ? p.image_out : p.text_out;
    const void* bias = image ? p.image_bias : p.text_bias;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = at.row + 8 * h;
      const bool inside = row < rows;
      const int64_t b = sample_of_row(offsets, p.B, inside ? row : rows - 1);
      const Bf16* gate = image ? static_cast<const Bf16*>(p.image_gate) + b * p.image_gate_stride
                               : static_cast<const Bf16*>(p.text_gate) + b * p.text_gate_stride;
      uint32_t words[N / 32][4];  // all of x first: no load may rise above a store to out
#pragma unroll
      for (int g = 0; g < N / 32; ++g) {
        const int column = at.column + 32 * g;
        load_words(words[g], x, row, p.D, column, at.quad, inside && column < p.D);
      }
#pragma unroll
      for (int g = 0; g < N / 32; ++g) {
        const int column = at.column + 32 * g;
        if (column >= p.D) break;  // the whole warp
        uint32_t(&w)[4] = words[g];
        transpose_quad(w, at.quad);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* pair = d + 4 * (4 * g + i) + 2 * h;
          const int c = column + 8 * i + 2 * at.quad;
          const Pair add = load_pair(bias, c), factor = load_pair(gate, c);
          const Pair base = unpack_pair(w[i]);
          w[i] = bf16_pair(mul_add(factor.e[0], pair[0] + add.e[0], base.e[0]),
                           mul_add(factor.e[1], pair[1] + add.e[1], base.e[1]));
        }
        transpose_quad(w, at.quad);
        store_words(w, out, row, p.D, column, at.quad, inside);
      }
    }
  }
};

}  // namespace lens::gpu
