// Every op of the extension: its params struct, by family in params/ (conventions in
// params/common.h), and the kernels that take it.
#pragma once

#include "params/attention.h"
#include "params/common.h"
#include "params/heads.h"
#include "params/image.h"
#include "params/linear.h"
#include "params/moe.h"
#include "params/row.h"
#include "params/step.h"
#include "params/tokens.h"

namespace lens {

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
  OP(group_norm_silu, GroupNormSiluParams)                                           \
  OP(guidance_step, GuidanceStepParams)

// Kernels that have CPU forms of their own for AVX-512's and AMX's products of BF16 pairs.
#define LENS_FOR_EACH_BF16_KERNEL(OP) OP(moe_mxfp4, MoeMxfp4Params)

// Kernels of sm_90a alone: other devices have no such op, and libraries serve them.
#define LENS_FOR_EACH_HOPPER_KERNEL(OP)                \
  OP(linear, LinearParams)                             \
  OP(linear_qkv_norm_rope, LinearQkvNormRopeParams)    \
  OP(linear_swiglu, LinearSwigluParams)                \
  OP(linear_gated_residual, LinearGatedResidualParams) \
  OP(joint_attention, JointAttentionParams)            \
  OP(denoise_step, DenoiseStepParams)

// Kernels of the CPU alone.
#define LENS_FOR_EACH_HOST_KERNEL(OP) OP(image_scores, ImageScoresParams)

// Kernels of the CPU alone that have a form of their own for AMX.
#define LENS_FOR_EACH_HOST_AMX_KERNEL(OP) OP(sink_attention, SinkAttentionParams)

// Kernels of CPUs with AMX alone: elsewhere libraries serve.
#define LENS_FOR_EACH_AMX_KERNEL(OP) OP(linear_rows, LinearRowsParams)

#define LENS_DECLARE_CPU(stem, Params) void stem(const Params& p);
namespace base {
LENS_FOR_EACH_KERNEL(LENS_DECLARE_CPU)
LENS_FOR_EACH_HOST_KERNEL(LENS_DECLARE_CPU)
LENS_FOR_EACH_HOST_AMX_KERNEL(LENS_DECLARE_CPU)
LENS_FOR_EACH_BF16_KERNEL(LENS_DECLARE_CPU)
}  // namespace base
namespace avx2 {
LENS_FOR_EACH_KERNEL(LENS_DECLARE_CPU)
LENS_FOR_EACH_HOST_KERNEL(LENS_DECLARE_CPU)
LENS_FOR_EACH_HOST_AMX_KERNEL(LENS_DECLARE_CPU)
LENS_FOR_EACH_BF16_KERNEL(LENS_DECLARE_CPU)
}  // namespace avx2
namespace avx512 {
LENS_FOR_EACH_KERNEL(LENS_DECLARE_CPU)
LENS_FOR_EACH_HOST_KERNEL(LENS_DECLARE_CPU)
LENS_FOR_EACH_HOST_AMX_KERNEL(LENS_DECLARE_CPU)
LENS_FOR_EACH_BF16_KERNEL(LENS_DECLARE_CPU)
}  // namespace avx512
namespace avx512bf16 {
LENS_FOR_EACH_BF16_KERNEL(LENS_DECLARE_CPU)
}
namespace amx {
LENS_FOR_EACH_HOST_AMX_KERNEL(LENS_DECLARE_CPU)
LENS_FOR_EACH_AMX_KERNEL(LENS_DECLARE_CPU)
LENS_FOR_EACH_BF16_KERNEL(LENS_DECLARE_CPU)
}  // namespace amx
#undef LENS_DECLARE_CPU

#define LENS_DECLARE_CUDA(stem, Params) int stem##_cuda(const Params& p);
LENS_FOR_EACH_KERNEL(LENS_DECLARE_CUDA)
LENS_FOR_EACH_BF16_KERNEL(LENS_DECLARE_CUDA)
LENS_FOR_EACH_HOPPER_KERNEL(LENS_DECLARE_CUDA)
#undef LENS_DECLARE_CUDA

}  // namespace lens
