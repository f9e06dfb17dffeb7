#include "cuda/gemm/linear.cuh"

namespace lens {

int linear_cuda(const LinearParams& p) {
  if (!gpu::whole_chunks(p.D, {p.y}) || !gpu::whole_pairs(p.bias, 0)) {
    return int(cudaErrorNotSupported);
  }
  return gpu::launch_gemm<gpu::LinearEpilogue, 128>(p, {p.x, p.weight, p.R}, {}, p.D);
}

}  // namespace lens
