// qkv = qk_norm_rope of x weight^T + bias, straight into the joint layout: a tile holds three heads
// whole, a head's row lies in one quad of lanes, and the pairs RoPE turns lie in one thread.
#pragma once

#include "cuda/gemm/epilogue.cuh"
#include "math/formulas.h"
#include "math/offsets.h"

namespace lens::gpu {

constexpr int kGemmHead = 64;

struct LinearQkvNormRopeEpilogue {
  using Params = LinearQkvNormRopeParams;
  static constexpr bool kInterleaved = false;

  template <int N>
  static __device__ __forceinline__ void store(const Params& p, float (&d)[N / 2],
                                               const Fragment& at) {
    const bool image = at.stream == kImage;
    const int64_t rows = image ? p.RI : p.RT, joint_rows = p.RI + p.RT;
    const int heads = int(p.N), first_head = at.column / kGemmHead;
    const void* bias = image ? p.image_bias : p.text_bias;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const bool inside = at.row + 8 * h < rows;
      const int64_t row = inside ? at.row + 8 * h : rows - 1;  // every lane takes part in shuffles
      const int64_t b = sample_of_row(image ? p.image_offsets : p.text_offsets, p.B, row);
      const int64_t joint = image ? joint_row_of_image(p.text_offsets, b, row)
                                  : joint_row_of_text(p.image_offsets, b, row);
      const float* cos = static_cast<const float*>(p.cos) + joint * (kGemmHead / 2) + at.quad;
      const float* sin = static_cast<const float*>(p.sin) + joint * (kGemmHead / 2) + at.quad;
      float cosine[8], sine[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        cosine[j] = __ldg(cos + 4 * j);
        sine[j] = __ldg(sin + 4 * j);
      }
#pragma unroll
      for (int i = 0; i < N / kGemmHead; ++i) {
        const int part = (first_head + i) / heads, head = (first_head + i) % heads;
        float x[8][2];
        float square = 0.0f;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const Pair add = load_pair(bias, (first_head + i) * kGemmHead + 8 * j + 2 * at.quad);
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            x[j][e] = d[4 * (8 * i + j) + 2 * h + e] + add.e[e];
            square = mul_add(x[j][e], x[j][e], square);
          }
        }
        if (part < 2) {
          const float rstd = inverse_sqrt(sum_lanes(square, 4) / float(kGemmHead) + float(p.eps));
          const void* weight = image ? (part == 0 ? p.image_q_weight : p.image_k_weight)
                                     : (part == 0 ? p.text_q_weight : p.text_k_weight);
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const Pair w = load_pair(weight, 8 * j + 2 * at.quad);
            const float even = x[j][0] * rstd * w.e[0], odd = x[j][1] * rstd * w.e[1];
            x[j][0] = mul_add(even, cosine[j], -(odd * sine[j]));
            x[j][1] = mul_add(even, sine[j], odd * cosine[j]);
          }
        }
        const int64_t to = (part * joint_rows + joint) * heads + head;
#pragma unroll
        for (int g = 0; g < 2; ++g) {
          uint32_t w[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) w[j] = bf16_pair(x[4 * g + j][0], x[4 * g + j][1]);
          transpose_quad(w, at.quad);
          store_words(w, p.qkv, to, kGemmHead, 32 * g, at.quad, inside);
        }
      }
    }
  }
};

}  // namespace lens::gpu
