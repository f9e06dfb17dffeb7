// out = x + gate_b * (y weight^T + bias), out may be x: a thread writes what it alone has read.
#pragma once

#include "cuda/gemm/epilogue.cuh"
#include "math/formulas.h"

namespace lens::gpu {

struct LinearGatedResidualEpilogue {
  using Params = LinearGatedResidualParams;
  static constexpr int kParts = 1;

  template <int M, int N>
  static __device__ __forceinline__ void store(const Params& p, const float (&d)[N / 2],
                                               const Fragment& at) {
    const bool image = at.stream == kImage;
    const int rows = int(image ? p.RI : p.RT);
    const int32_t* offsets = image ? p.image_offsets : p.text_offsets;
    const auto* x = static_cast<const Bf16*>(image ? p.image_x : p.text_x);
    auto* out = static_cast<Bf16*>(image ? p.image_out : p.text_out);
    const auto* bias = static_cast<const Bf16*>(image ? p.image_bias : p.text_bias);
    const auto* gates = static_cast<const Bf16*>(image ? p.image_gate : p.text_gate);
    const int64_t stride = image ? p.image_gate_stride : p.text_gate_stride;
    const int left = int(p.D) - at.column, own = at.column + 8 * at.quad;

    // the two rows of this thread: of which sample, where
    const Bf16* gate[2];
    int64_t first[2];
    bool inside[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      inside[h] = at.row + 8 * h < rows;
      const int row = inside[h] ? at.row + 8 * h : rows - 1;
      gate[h] = gates + sample_of_row(offsets, p.B, row) * stride + own;
      first[h] = row * p.D + own;
    }

    // No load may rise above a store to out, so chunks of x are read as far ahead as registers
    // last: all of them, or 6 where a thread has 160 registers.
    constexpr int kAhead = M == 192 ? 6 : N / 16;
    uint4 ahead[kAhead] = {};
    const auto fetch = [&](int i) {
      const int g = i / 2, h = i % 2;
      if (32 * g < left) ahead[i % kAhead] = load_chunk(x + first[h] + 32 * g);
    };
#pragma unroll
    for (int i = 0; i < kAhead; ++i) fetch(i);

    // chunk by chunk: x + gate * (d + bias)
#pragma unroll
    for (int i = 0; i < N / 16; ++i) {
      const int g = i / 2, h = i % 2;
      if (32 * g >= left) break;  // the whole warp
      const Chunk base = widened<Bf16>(ahead[i % kAhead]);
      if (i + kAhead < N / 16) fetch(i + kAhead);
      const Chunk add = bias ? load_constants(bias + own + 32 * g) : Chunk{};
      const Chunk factor = load_constants(gate[h] + 32 * g);
      Chunk c = accumulated(d, g, h);
#pragma unroll
      for (int j = 0; j < 8; ++j) c.e[j] = mul_add(factor.e[j], c.e[j] + add.e[j], base.e[j]);
      if (inside[h]) store_chunk(c, out + first[h] + 32 * g);
    }
  }
};

}  // namespace lens::gpu
