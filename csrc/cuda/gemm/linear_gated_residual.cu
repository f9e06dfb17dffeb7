#include "cuda/gemm/linear_gated_residual.cuh"

namespace lens {

int linear_gated_residual_cuda(const LinearGatedResidualParams& p) {
  using gpu::whole_pairs;
  if (!gpu::whole_chunks(p.D, {p.image_x, p.text_x, p.image_out, p.text_out}) ||
      !whole_pairs(p.image_gate, p.image_gate_stride) ||
      !whole_pairs(p.text_gate, p.text_gate_stride) || !whole_pairs(p.image_bias, 0) ||
      !whole_pairs(p.text_bias, 0)) {
    return int(cudaErrorNotSupported);
  }
  return gpu::launch_gemm<gpu::LinearGatedResidualEpilogue>(
      p, {p.image_y, p.image_weight, p.RI}, {p.text_y, p.text_weight, p.RT}, p.D,
      gpu::Shape<128, 192>{}, gpu::Shape<128, 256>{}, gpu::Shape<192, 192>{});
}

}  // namespace lens
