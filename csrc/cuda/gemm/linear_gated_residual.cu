#include "cuda/gemm/linear_gated_residual.cuh"

namespace lens {

int linear_gated_residual_cuda(const LinearGatedResidualParams& p) {
  using gpu::whole_chunks;
  if (!whole_chunks(p.D,
                    {p.image_x, p.text_x, p.image_out, p.text_out, p.image_bias, p.text_bias}) ||
      !whole_chunks(p.image_gate_stride, {p.image_gate}) ||
      !whole_chunks(p.text_gate_stride, {p.text_gate})) {
    return int(cudaErrorNotSupported);
  }
  return gpu::launch_gemm<gpu::LinearGatedResidualEpilogue>(
      p, {p.image_y, p.image_weight, p.RI}, {p.text_y, p.text_weight, p.RT}, p.D,
      gpu::Shape<128, 192>{}, gpu::Shape<128, 224>{}, gpu::Shape<128, 256>{},
      gpu::Shape<192, 192>{});
}

}  // namespace lens
