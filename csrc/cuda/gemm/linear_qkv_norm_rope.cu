#include "cuda/gemm/linear_qkv_norm_rope.cuh"

namespace lens {

int linear_qkv_norm_rope_cuda(const LinearQkvNormRopeParams& p) {
  if (p.H != gpu::kGemmHead ||
      !gpu::whole_chunks(p.H, {p.qkv, p.cos, p.sin, p.image_bias, p.text_bias, p.image_q_weight,
                               p.image_k_weight, p.text_q_weight, p.text_k_weight})) {
    return int(cudaErrorNotSupported);
  }
  return gpu::launch_gemm<gpu::LinearQkvNormRopeEpilogue>(
      p, {p.image_x, p.image_weight, p.RI}, {p.text_x, p.text_weight, p.RT}, 3 * p.N * p.H,
      gpu::Shape<128, 192>{}, gpu::Shape<192, 192>{});
}

}  // namespace lens
