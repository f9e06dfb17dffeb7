#include "cuda/gemm/linear.cuh"

namespace lens {

int linear_cuda(const LinearParams& p) {
  if (!gpu::whole_chunks(p.D, {p.y, p.bias})) return int(cudaErrorNotSupported);
  return gpu::launch_gemm<gpu::LinearEpilogue>(p, {p.x, p.weight, p.R}, {}, p.D,
                                               gpu::Shape<128, 128>{});
}

}  // namespace lens
