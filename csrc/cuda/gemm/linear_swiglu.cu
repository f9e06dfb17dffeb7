#include "cuda/gemm/linear_swiglu.cuh"

namespace lens {

int linear_swiglu_cuda(const LinearSwigluParams& p) {
  if (!gpu::whole_chunks(p.F, {p.image_y, p.text_y})) return int(cudaErrorNotSupported);
  return gpu::launch_gemm<gpu::LinearSwigluEpilogue>(
      p, {p.image_x, p.image_weight, p.RI}, {p.text_x, p.text_weight, p.RT}, 2 * p.F,
      gpu::Shape<128, 256>{}, gpu::Shape<192, 192>{});
}

}  // namespace lens
