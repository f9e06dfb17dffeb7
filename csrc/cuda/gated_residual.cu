#include "cuda/gated_residual.cuh"

namespace lens {
namespace gpu {
namespace {

template <class T>
void forward(const GatedResidualParams& p) {
  const int64_t segments = ceil_div(p.D, kGatedSegment * kWarp * kChunk<T>);
  const dim3 grid(unsigned(ceil_div(p.R, kRowsPerBlock)), unsigned(segments));
  const dim3 block(kWarp, kRowsPerBlock);
  if (chunks_fit<T>(p.D, {{p.x, p.D}, {p.y, p.D}, {p.out, p.D}, {p.gate, p.gate_stride}})) {
    LENS_LAUNCH((gated_residual_kernel<T, true>), grid, block, p.stream, p);
  } else {
    LENS_LAUNCH((gated_residual_kernel<T, false>), grid, block, p.stream, p);
  }
}

template <class T>
void backward(const GatedResidualBackwardParams& p) {
  const dim3 grid(unsigned(split_slots(p.R, p.B))), block = backward_block(p.D, kChunk<T>);
  const bool vector = chunks_fit<T>(
      p.D, {{p.dout, p.D}, {p.y, p.D}, {p.dy, p.D}, {p.workspace, p.D}, {p.gate, p.gate_stride}});
  if (p.R == 0) {
    // no slots to fill; the sums below are zero
  } else if (!backward_one_chunk(p.D, kChunk<T>)) {
    LENS_LAUNCH((gated_residual_backward_kernel<T, kWideChunks, false>), grid, block, p.stream, p);
  } else if (vector) {
    LENS_LAUNCH((gated_residual_backward_kernel<T, 1, true>), grid, block, p.stream, p);
  } else {
    LENS_LAUNCH((gated_residual_backward_kernel<T, 1, false>), grid, block, p.stream, p);
  }
  launch_sum_slots<T>(SlotSums{p.workspace, p.offsets, p.B, p.D, 1, {}, {p.dgate}, false},
                      p.stream);
}

}  // namespace
}  // namespace gpu

int gated_residual_cuda(const GatedResidualParams& p) {
  if (p.R == 0) return int(cudaSuccess);
  return gpu::launch_for(p.dtype, p.R, p.D, [&](auto* tag) { gpu::forward<LENS_TYPE_OF(tag)>(p); });
}

int gated_residual_backward_cuda(const GatedResidualBackwardParams& p) {
  bool fits = true;
  const int state = gpu::launch_for(p.dtype, p.R, p.D, [&](auto* tag) {
    using T = LENS_TYPE_OF(tag);
    fits = gpu::backward_fits(p.D, gpu::kChunk<T>);
    if (fits) gpu::backward<T>(p);
  });
  return fits ? state : int(cudaErrorNotSupported);
}

}  // namespace lens
