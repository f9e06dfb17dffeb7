// One step of the sampler: the transformer's velocity (denoise_step, on sm_90a), then guidance, its
// rescale and Euler's update of the latents (guidance_step).
#pragma once

#include "params/common.h"
#include "params/linear.h"

namespace lens {

// Weights of one stream of one block, as torch.nn.Linear holds them.
struct StreamWeights {
  const void *norm1, *qkv, *qkv_bias, *q_norm, *k_norm, *out, *out_bias, *norm2, *w13, *w2;
};

// The whole transformer once: rows of latents in, their velocity out. `weights` and `score_bounds`
// lie on the host and are read during the call; all else is on the device. D = N * H.
struct DenoiseStepParams {
  const StreamWeights* weights;  // host [L, 2 (image, text)]
  const double* score_bounds;    // host [L], as in JointAttentionParams
  const void* image_in;          // [D, C]
  const void* image_in_bias;     // [D]
  const void* image_out;         // [C, D]
  const void* image_out_bias;    // [C]
  const void* image_rows;        // [RI, C]
  const void* text_rows;         // [RT, D]
  const void* modulation;        // [B, L, 2, 6 (shift1, scale1, gate1, shift2, scale2, gate2), D]
  const void* final_modulation;  // [B, 2 (scale, shift), D]
  const void* cos;               // float [RS, H / 2], joint layout
  const void* sin;               // float [RS, H / 2], joint layout
  const int32_t* image_offsets;  // [B + 1]
  const int32_t* text_offsets;   // [B + 1]
  void* workspace;               // [RS, 2 D + max(3 D, F)]
  void* velocity;                // [RI, C]
  int64_t RI, RT, B, L, N, H, F, C;
  int64_t polynomial;  // as in JointAttentionParams
  int64_t cluster;     // as in LinearParams
  double scale;        // of attention
  double eps;
  DType dtype;  // bfloat16
  void* stream;
};

template <class V>
void fields(DenoiseStepParams& p, V& v) {
  stream_sizes(p, v);
  v.size("L", p.L, 1);
  v.size("N", p.N, 1);
  v.size("H", p.H, 2);
  v.size("F", p.F, 1);
  v.size("C", p.C, 1);
  const int64_t D = p.N * p.H, joint = p.RI + p.RT;
  v.array("weights", p.weights, p.L * 2);
  v.array("score_bounds", p.score_bounds, p.L);
  v.array("image_in", p.image_in, D * p.C);
  v.array("image_in_bias", p.image_in_bias, D);
  v.array("image_out", p.image_out, p.C * D);
  v.array("image_out_bias", p.image_out_bias, p.C);
  v.array("image_rows", p.image_rows, p.RI * p.C);
  v.array("text_rows", p.text_rows, p.RT * D);
  v.array("modulation", p.modulation, p.B * p.L * 12 * D);
  v.array("final_modulation", p.final_modulation, p.B * 2 * D);
  v.array("cos", p.cos, joint * (p.H / 2));
  v.array("sin", p.sin, joint * (p.H / 2));
  stream_offsets(p, v);
  v.array("workspace", p.workspace, joint * (2 * D + (3 * D > p.F ? 3 * D : p.F)));
  v.array("velocity", p.velocity, p.RI * p.C);
  v.size("polynomial", p.polynomial, 0);
  cluster_size(p.cluster, v);
  v.number("scale", p.scale);
  v.number("eps", p.eps);
}

// comb = u + guidance * (c - u); comb *= |c| / |comb| per row (factor 1 where |comb| is 0); out = x
// + delta_b * comb. Without uncond comb = c. dtype is that of cond and uncond.
struct GuidanceStepParams {
  const void* x;           // acc [R, C]
  const void* cond;        // [R, C]
  const void* uncond;      // [R, C], or null
  const void* delta;       // acc [B]
  const int32_t* offsets;  // [B + 1]
  void* out;               // acc [R, C]
  int64_t R, B, C;
  double guidance;
  DType dtype;
  void* stream;
};

template <class V>
void fields(GuidanceStepParams& p, V& v) {
  v.size("R", p.R, 0);
  v.size("B", p.B, p.R > 0);
  v.size("C", p.C, 1);
  v.offsets("offsets", p.offsets, p.B, "R", p.R);
  v.array("x", p.x, p.R * p.C);
  v.array("cond", p.cond, p.R * p.C);
  v.array("uncond", p.uncond, 0);  // may be null
  v.array("delta", p.delta, p.B);
  v.array("out", p.out, p.R * p.C);
  v.number("guidance", p.guidance);
}

}  // namespace lens
