// One struct per op: what a kernel reads, what it writes, the sizes, the stream last.
//
//   B samples   R packed rows   D width   N heads   H head dim   F MLP hidden   C latent channels
//   L padded length RI, RT, RS packed image, text and joint rows, RS = RI + RT
//
// Every array is dense and row-major unless a stride (in elements) is given, and holds `dtype`
// unless its comment says otherwise. "acc" is the arithmetic type: float for float32 and bfloat16,
// double for float64. Offsets are int32 [B + 1]: sample b owns rows offsets[b] .. offsets[b + 1] -
// 1; offsets[0] = 0, offsets[B] = R. The joint layout holds [image rows | text rows] per sample:
// joint_offsets = image_offsets + text_offsets. All pointers live on the device that runs the
// kernel. Sizes may be zero; pointers to empty arrays may be null.
#pragma once

#include <cstdint>

#include "math/types.h"

namespace lens {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat64 = 2 };

// Column sums of a backward pass run in two stages without atomics. Stage one sums at most
// kSplitRows consecutive rows of one sample into one slot of the workspace; stage two adds a
// sample's slots in order. Chunk k of sample b holds rows offsets[b] + k * kSplitRows and
// following, and owns slot split_slot(offsets[b], b) + k. Slots of different samples never meet,
// because ceil(n / s) <= floor((o + n) / s) - floor(o / s) + 1; a slot without rows is neither
// written nor read. So neither the thread count nor the other samples change a sample's sums.
constexpr int64_t kSplitRows = 32;

LENS_HD constexpr int64_t split_slot(int64_t offset, int64_t b) { return offset / kSplitRows + b; }
LENS_HD constexpr int64_t split_slots(int64_t R, int64_t B) { return R / kSplitRows + B; }
LENS_HD constexpr int64_t split_chunks(int64_t rows) {
  return (rows + kSplitRows - 1) / kSplitRows;
}

// packed[r] = x[rows[r]]
struct PackTokensParams {
  const void* x;        // [B * L, C]
  const int64_t* rows;  // [R], distinct, each in [0, B * L)
  void* packed;         // [R, C]
  int64_t R, BL, C;
  DType dtype;
  void* stream;
};

// x[rows[r]] = packed[r], zero elsewhere; also the gradient of pack_tokens (and the other way
// round)
struct UnpackTokensParams {
  const void* packed;   // [R, C]
  const int64_t* rows;  // [R], distinct, each in [0, B * L)
  void* x;              // [B * L, C]
  int64_t R, BL, C;
  DType dtype;
  void* stream;
};

// y = x * rsqrt(mean(x^2) + eps) * weight * (1 + scale_b) + shift_b
struct RmsNormModulateParams {
  const void* x;           // [R, D]
  const void* weight;      // [D]
  const void* scale;       // [B, D], row stride scale_stride
  const void* shift;       // [B, D], row stride shift_stride
  const int32_t* offsets;  // [B + 1]
  void* y;                 // [R, D]
  int64_t R, B, D;
  int64_t scale_stride, shift_stride;
  double eps;
  DType dtype;
  void* stream;
};

// With n = x * rsqrt(mean(x^2) + eps), g = dy * weight * (1 + scale_b) and P_b = sum over rows of b
// of dy * n:
//   dx = r * (g - n * mean(g * n)), dscale_b = weight * P_b, dshift_b = sum of dy, dweight = sum_b
//   (1 + scale_b) * P_b
struct RmsNormModulateBackwardParams {
  const void* dy;          // [R, D]
  const void* x;           // [R, D]
  const void* weight;      // [D]
  const void* scale;       // [B, D], row stride scale_stride
  const int32_t* offsets;  // [B + 1]
  void* dx;                // [R, D]
  void* dweight;           // [D]
  void* dscale;            // [B, D]
  void* dshift;            // [B, D]
  void* workspace;         // acc [split_slots(R, B), 2, D]: sums of dy * n and of dy
  int64_t R, B, D;
  int64_t scale_stride;
  double eps;
  DType dtype;
  void* stream;
};

// q, k: head-wise RMSNorm with the stream's weight, then pairs (2i, 2i + 1) turned by angle i; v
// copied. Image row r of sample b goes to joint row r + text_offsets[b], text row t to t +
// image_offsets[b + 1].
struct QkNormRopeParams {
  const void* image_qkv;         // [RI, 3, N, H]
  const void* text_qkv;          // [RT, 3, N, H]
  const void* image_q_weight;    // [H]
  const void* image_k_weight;    // [H]
  const void* text_q_weight;     // [H]
  const void* text_k_weight;     // [H]
  const void* cos;               // acc [RS, H / 2], joint layout
  const void* sin;               // acc [RS, H / 2], joint layout
  const int32_t* image_offsets;  // [B + 1]
  const int32_t* text_offsets;   // [B + 1]
  void* qkv;                     // [3, RS, N, H], joint layout
  int64_t RI, RT, B, N, H;
  double eps;
  DType dtype;
  void* stream;
};

// Turns dq and dk back (angle -i), then the norm's gradient; dv copied. Column sums run over the
// rows of a stream, not of a sample: chunk k of the image stream holds rows k * kSplitRows and
// following and owns slot k; the text stream's slots follow the image stream's.
struct QkNormRopeBackwardParams {
  const void* dqkv;              // [3, RS, N, H], joint layout
  const void* image_qkv;         // [RI, 3, N, H]
  const void* text_qkv;          // [RT, 3, N, H]
  const void* image_q_weight;    // [H]
  const void* image_k_weight;    // [H]
  const void* text_q_weight;     // [H]
  const void* text_k_weight;     // [H]
  const void* cos;               // acc [RS, H / 2], joint layout
  const void* sin;               // acc [RS, H / 2], joint layout
  const int32_t* image_offsets;  // [B + 1]
  const int32_t* text_offsets;   // [B + 1]
  void* dimage_qkv;              // [RI, 3, N, H]
  void* dtext_qkv;               // [RT, 3, N, H]
  void* dimage_q_weight;         // [H]
  void* dimage_k_weight;         // [H]
  void* dtext_q_weight;          // [H]
  void* dtext_k_weight;          // [H]
  void* workspace;  // acc [split_chunks(RI) + split_chunks(RT), 2, H]: sums for q and for k
  int64_t RI, RT, B, N, H;
  double eps;
  DType dtype;
  void* stream;
};

// out = x + gate_b * y
struct GatedResidualParams {
  const void* x;           // [R, D]
  const void* y;           // [R, D]
  const void* gate;        // [B, D], row stride gate_stride
  const int32_t* offsets;  // [B + 1]
  void* out;               // [R, D]
  int64_t R, B, D;
  int64_t gate_stride;
  DType dtype;
  void* stream;
};

// dy = gate_b * dout, dgate_b = sum over rows of b of dout * y; dx is dout itself
struct GatedResidualBackwardParams {
  const void* dout;        // [R, D]
  const void* y;           // [R, D]
  const void* gate;        // [B, D], row stride gate_stride
  const int32_t* offsets;  // [B + 1]
  void* dy;                // [R, D]
  void* dgate;             // [B, D]
  void* workspace;         // acc [split_slots(R, B), D]: sums of dout * y
  int64_t R, B, D;
  int64_t gate_stride;
  DType dtype;
  void* stream;
};

// x_new = x + gate_b * y, rounded to dtype; normed = rms_norm_modulate(x_new)
struct GatedResidualNormModulateParams {
  const void* x;           // [R, D]
  const void* y;           // [R, D]
  const void* gate;        // [B, D], row stride gate_stride
  const void* weight;      // [D]
  const void* scale;       // [B, D], row stride scale_stride
  const void* shift;       // [B, D], row stride shift_stride
  const int32_t* offsets;  // [B + 1]
  void* x_new;             // [R, D]
  void* normed;            // [R, D]
  int64_t R, B, D;
  int64_t gate_stride, scale_stride, shift_stride;
  double eps;
  DType dtype;
  void* stream;
};

// dx = dx_new + (gradient of the norm at x_new), dy = gate_b * dx and dgate_b = sum of dx * y with
// dx not yet rounded; dweight, dscale, dshift as in rms_norm_modulate
struct GatedResidualNormModulateBackwardParams {
  const void* dx_new;      // [R, D]
  const void* dnormed;     // [R, D]
  const void* x_new;       // [R, D]
  const void* y;           // [R, D]
  const void* gate;        // [B, D], row stride gate_stride
  const void* weight;      // [D]
  const void* scale;       // [B, D], row stride scale_stride
  const int32_t* offsets;  // [B + 1]
  void* dx;                // [R, D]
  void* dy;                // [R, D]
  void* dgate;             // [B, D]
  void* dweight;           // [D]
  void* dscale;            // [B, D]
  void* dshift;            // [B, D]
  void* workspace;  // acc [split_slots(R, B), 3, D]: sums of dnormed * n, of dnormed and of dx * y
  int64_t R, B, D;
  int64_t gate_stride, scale_stride;
  double eps;
  DType dtype;
  void* stream;
};

// y = silu(h[:, :F]) * h[:, F:]
struct SwigluParams {
  const void* h;  // [R, 2, F]
  void* y;        // [R, F]
  int64_t R, F;
  DType dtype;
  void* stream;
};

// With a = h[:, :F], u = h[:, F:], s = sigmoid(a): da = dy * u * s * (1 + a * (1 - s)), du = dy * a
// * s
struct SwigluBackwardParams {
  const void* dy;  // [R, F]
  const void* h;   // [R, 2, F]
  void* dh;        // [R, 2, F]
  int64_t R, F;
  DType dtype;
  void* stream;
};

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

// out = softmax(q k^T * scale) v within each sample, over its image and text rows together, not
// causal; lse, the logarithm of each softmax denominator, is natural. What a sample's rows hold
// depends on nothing outside the sample.
struct JointAttentionParams {
  const void* q;                 // [RS, N, H], joint layout
  const void* k;                 // [RS, N, H], joint layout
  const void* v;                 // [RS, N, H], joint layout
  const int32_t* image_offsets;  // [B + 1]
  const int32_t* text_offsets;   // [B + 1]
  void* image_out;               // [RI, N, H]
  void* text_out;                // [RT, N, H], or null: text rows are keys and values alone
  void* lse;                     // float [N, RS], or null; rows that ask nothing stay unwritten
  int64_t RI, RT, B, N, H;
  int64_t polynomial;  // of every four exponentials, how many are polynomials: 0 or 1
  double scale;        // positive
  double score_bound;  // |q . k| * scale exceeds it nowhere; infinity where that is not known
  DType dtype;
  void* stream;
};

// out = x + gate_b * (a weight^T + bias) for samples of equal length: bench/cutlass, in the bench
// alone
struct CutlassLinearGatedResidualParams {
  const void* a;       // [B, S, K]
  const void* weight;  // [D, K]
  const void* bias;    // [D], may be null
  const void* gate;    // [B, D], row stride gate_stride
  const void* x;       // [B, S, D]
  void* out;           // [B, S, D]
  int64_t B, S, D, K;
  int64_t gate_stride;
  DType dtype;  // bfloat16
  void* stream;
};
int cutlass_linear_gated_residual_cuda(const CutlassLinearGatedResidualParams& p);

// ---- matrix products whose epilogue is one of the ops above; bfloat16, float accumulators, one
// rounding at the end. Rows of weight are output columns. Both streams run in one launch; a stream
// without rows may hold null pointers. A row's bits depend on that row alone. cluster: neighbouring
// blocks that share a tile of the weight, 1 or 2; 0 for what is predicted quicker.

// y = x weight^T + bias
struct LinearParams {
  const void* x;       // [R, K]
  const void* weight;  // [D, K]
  const void* bias;    // [D], may be null
  void* y;             // [R, D]
  int64_t R, K, D;
  int64_t cluster;
  DType dtype;  // bfloat16
  void* stream;
};

// qk_norm_rope of x weight^T + bias, whose columns are [3, N, H]
struct LinearQkvNormRopeParams {
  const void* image_x;           // [RI, K]
  const void* text_x;            // [RT, K]
  const void* image_weight;      // [3 * N * H, K]
  const void* text_weight;       // [3 * N * H, K]
  const void* image_bias;        // [3 * N * H], may be null
  const void* text_bias;         // [3 * N * H], may be null
  const void* image_q_weight;    // [H]
  const void* image_k_weight;    // [H]
  const void* text_q_weight;     // [H]
  const void* text_k_weight;     // [H]
  const void* cos;               // float [RS, H / 2], joint layout
  const void* sin;               // float [RS, H / 2], joint layout
  const int32_t* image_offsets;  // [B + 1]
  const int32_t* text_offsets;   // [B + 1]
  void* qkv;                     // [3, RS, N, H], joint layout
  int64_t RI, RT, B, K, N, H;
  double eps;
  int64_t cluster;
  DType dtype;  // bfloat16
  void* stream;
};

// y = swiglu(x weight^T)
struct LinearSwigluParams {
  const void* image_x;       // [RI, K]
  const void* text_x;        // [RT, K]
  const void* image_weight;  // [2, F, K]
  const void* text_weight;   // [2, F, K]
  void* image_y;             // [RI, F]
  void* text_y;              // [RT, F]
  int64_t RI, RT, K, F;
  int64_t cluster;
  DType dtype;  // bfloat16
  void* stream;
};

// out = x + gate_b * (y weight^T + bias); out may be x
struct LinearGatedResidualParams {
  const void* image_x;           // [RI, D]
  const void* text_x;            // [RT, D]
  const void* image_y;           // [RI, K]
  const void* text_y;            // [RT, K]
  const void* image_weight;      // [D, K]
  const void* text_weight;       // [D, K]
  const void* image_bias;        // [D], may be null
  const void* text_bias;         // [D], may be null
  const void* image_gate;        // [B, D], row stride image_gate_stride
  const void* text_gate;         // [B, D], row stride text_gate_stride
  const int32_t* image_offsets;  // [B + 1]
  const int32_t* text_offsets;   // [B + 1]
  void* image_out;               // [RI, D]
  void* text_out;                // [RT, D]
  int64_t RI, RT, B, K, D;
  int64_t image_gate_stride, text_gate_stride;
  int64_t cluster;
  DType dtype;  // bfloat16
  void* stream;
};

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

// Every kernel by stem. CPU kernels return nothing: their arguments were checked before. Launchers
// return a cudaError_t as int and leave the stream running.
#define LENS_FOR_EACH_KERNEL(OP)                                                     \
  OP(pack_tokens, PackTokensParams)                                                  \
  OP(unpack_tokens, UnpackTokensParams)                                              \
  OP(rms_norm_modulate, RmsNormModulateParams)                                       \
  OP(rms_norm_modulate_backward, RmsNormModulateBackwardParams)                      \
  OP(qk_norm_rope, QkNormRopeParams)                                                 \
  OP(qk_norm_rope_backward, QkNormRopeBackwardParams)                                \
  OP(gated_residual, GatedResidualParams)                                            \
  OP(gated_residual_backward, GatedResidualBackwardParams)                           \
  OP(gated_residual_norm_modulate, GatedResidualNormModulateParams)                  \
  OP(gated_residual_norm_modulate_backward, GatedResidualNormModulateBackwardParams) \
  OP(swiglu, SwigluParams)                                                           \
  OP(swiglu_backward, SwigluBackwardParams)                                          \
  OP(guidance_step, GuidanceStepParams)

// Kernels of sm_90a alone: other devices have no such op, and libraries serve them.
#define LENS_FOR_EACH_HOPPER_KERNEL(OP)                \
  OP(linear, LinearParams)                             \
  OP(linear_qkv_norm_rope, LinearQkvNormRopeParams)    \
  OP(linear_swiglu, LinearSwigluParams)                \
  OP(linear_gated_residual, LinearGatedResidualParams) \
  OP(joint_attention, JointAttentionParams)            \
  OP(denoise_step, DenoiseStepParams)

#define LENS_DECLARE_CPU(stem, Params) void stem(const Params& p);
namespace base {
LENS_FOR_EACH_KERNEL(LENS_DECLARE_CPU)
}
namespace avx2 {
LENS_FOR_EACH_KERNEL(LENS_DECLARE_CPU)
}
namespace avx512 {
LENS_FOR_EACH_KERNEL(LENS_DECLARE_CPU)
}
#undef LENS_DECLARE_CPU

#define LENS_DECLARE_CUDA(stem, Params) int stem##_cuda(const Params& p);
LENS_FOR_EACH_KERNEL(LENS_DECLARE_CUDA)
LENS_FOR_EACH_HOPPER_KERNEL(LENS_DECLARE_CUDA)
#undef LENS_DECLARE_CUDA

}  // namespace lens
