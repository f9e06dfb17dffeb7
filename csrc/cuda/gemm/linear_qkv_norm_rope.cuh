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
  static constexpr int kParts = 1;

  template <int M, int N>
  static __device__ __forceinline__ void store(const Params& p, const float (&d)[N / 2],
                                               const Fragment& at) {
    const bool image = at.stream == kImage;
    const int rows = int(image ? p.RI : p.RT), joint_rows = int(p.RI + p.RT);
    const int width = int(p.N) * kGemmHead, channel = 8 * at.quad;
    const auto* bias = static_cast<const Bf16*>(image ? p.image_bias : p.text_bias) + at.column;

    // the two rows of this thread, in the joint layout
    int joint[2];
    bool inside[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      inside[h] = at.row + 8 * h < rows;
      const int row = inside[h] ? at.row + 8 * h : rows - 1;  // every lane takes part in shuffles
      const int64_t b = sample_of_row(image ? p.image_offsets : p.text_offsets, p.B, row);
      joint[h] = int(image ? joint_row_of_image(p.text_offsets, b, row)
                           : joint_row_of_text(p.image_offsets, b, row));
    }

    // head by head: part 0 is q, 1 is k, 2 is v
    int part = at.column / width, column = at.column % width;
#pragma unroll
    for (int i = 0; i < N / kGemmHead; ++i) {
      // Row halves at a time: both, which share what they read, or one where a thread has 160
      // registers. The bias is then no constant to the compiler, which would keep it for the other.
      constexpr int kHalves = M == 192 ? 1 : 2;
#pragma unroll
      for (int first = 0; first < 2; first += kHalves) {
        // d + bias; channels 0 .. 31, 32 .. 63
        Chunk x[kHalves][2];
#pragma unroll
        for (int g = 0; g < 2; ++g) {
          const Chunk add = widened<Bf16>(load_chunk(bias + kGemmHead * i + 32 * g + channel));
#pragma unroll
          for (int h = 0; h < kHalves; ++h) {
            x[h][g] = accumulated(d, 2 * i + g, first + h);
#pragma unroll
            for (int c = 0; c < 8; ++c) x[h][g].e[c] += add.e[c];
          }
        }

        // q and k: RMSNorm over the quad's lanes, then RoPE
        if (part < 2) {
          const void* norm = image ? (part == 0 ? p.image_q_weight : p.image_k_weight)
                                   : (part == 0 ? p.text_q_weight : p.text_k_weight);
          float rstd[kHalves];
#pragma unroll
          for (int h = 0; h < kHalves; ++h) {
            float square = 0.0f;
#pragma unroll
            for (int c = 0; c < 16; ++c) {
              const float value = x[h][c / 8].e[c % 8];
              square = mul_add(value, value, square);
            }
            rstd[h] = inverse_sqrt(sum_lanes(square, 4) / float(kGemmHead) + float(p.eps));
          }
#pragma unroll
          for (int g = 0; g < 2; ++g) {
            const Chunk weight = load_constants(static_cast<const Bf16*>(norm) + 32 * g + channel);
#pragma unroll
            for (int h = 0; h < kHalves; ++h) {
              const int angle = joint[first + h] * (kGemmHead / 2) + channel / 2;
              const Values<float> cosine = load_angles(p.cos, angle, 16 * g);
              const Values<float> sine = load_angles(p.sin, angle, 16 * g);
              float(&v)[8] = x[h][g].e;
#pragma unroll
              for (int j = 0; j < 4; ++j) {
                const float even = v[2 * j] * rstd[h] * weight.e[2 * j];
                const float odd = v[2 * j + 1] * rstd[h] * weight.e[2 * j + 1];
                v[2 * j] = mul_add(even, cosine.e[j], -(odd * sine.e[j]));
                v[2 * j + 1] = mul_add(even, sine.e[j], odd * cosine.e[j]);
              }
            }
          }
        }

        // store
#pragma unroll
        for (int h = 0; h < kHalves; ++h) {
          if (!inside[first + h]) continue;
          const int64_t row = part * joint_rows + joint[first + h];
          Bf16* to = static_cast<Bf16*>(p.qkv) + row * width + column + channel;
#pragma unroll
          for (int g = 0; g < 2; ++g) store_chunk(x[h][g], to + 32 * g);
        }
      }
      column += kGemmHead;
      if (column == width) column = 0, ++part;
    }
  }

 private:
  static __device__ __forceinline__ Values<float> load_angles(const void* array, int at, int next) {
    const float* from = static_cast<const float*>(array) + at;
    return widened<float>(__ldg(reinterpret_cast<const uint4*>(from + next)));
  }
};

}  // namespace lens::gpu
