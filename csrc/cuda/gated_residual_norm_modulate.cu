#include "cuda/gated_residual_norm_modulate.cuh"

namespace lens {
namespace gpu {
namespace {

template <class T>
void forward(const GatedResidualNormModulateParams& p) {
  const dim3 grid = row_grid(p.R), block(kWarp, kRowsPerBlock);
  const bool vector = chunks_fit<T>(p.D, {{p.x, p.D},
                                          {p.y, p.D},
                                          {p.x_new, p.D},
                                          {p.normed, p.D},
                                          {p.weight, p.D},
                                          {p.gate, p.gate_stride},
                                          {p.scale, p.scale_stride},
                                          {p.shift, p.shift_stride}});
  const int cached = vector && sizeof(T) < 8 ? cached_chunks(p.D, kChunk<T>) : 0;
  if constexpr (sizeof(T) < 8) {
    if (cached == 3)
      LENS_LAUNCH((gated_residual_norm_modulate_kernel<T, 3, true>), grid, block, p.stream, p);
    if (cached == 6)
      LENS_LAUNCH((gated_residual_norm_modulate_kernel<T, 6, true>), grid, block, p.stream, p);
    if (cached == 12) {
      LENS_LAUNCH((gated_residual_norm_modulate_kernel<T, 12, true>), grid, block, p.stream, p);
    }
  }
  if (cached) return;
  if (vector) {
    LENS_LAUNCH((gated_residual_norm_modulate_kernel<T, 0, true>), grid, block, p.stream, p);
  } else {
    LENS_LAUNCH((gated_residual_norm_modulate_kernel<T, 0, false>), grid, block, p.stream, p);
  }
}

template <class T>
void backward(const GatedResidualNormModulateBackwardParams& p) {
  const dim3 grid(unsigned(split_slots(p.R, p.B))), block = backward_block(p.D, kChunk<T>);
  const bool vector = chunks_fit<T>(p.D, {{p.dx_new, p.D},
                                          {p.dnormed, p.D},
                                          {p.x_new, p.D},
                                          {p.y, p.D},
                                          {p.dx, p.D},
                                          {p.dy, p.D},
                                          {p.weight, p.D},
                                          {p.workspace, p.D},
                                          {p.gate, p.gate_stride},
                                          {p.scale, p.scale_stride}});
  if (p.R == 0) {
    // no slots to fill; the sums below are zero
  } else if (!backward_one_chunk(p.D, kChunk<T>)) {
    LENS_LAUNCH((gated_residual_norm_modulate_backward_kernel<T, kWideChunks, false>), grid, block,
                p.stream, p);
  } else if (vector) {
    LENS_LAUNCH((gated_residual_norm_modulate_backward_kernel<T, 1, true>), grid, block, p.stream,
                p);
  } else {
    LENS_LAUNCH((gated_residual_norm_modulate_backward_kernel<T, 1, false>), grid, block, p.stream,
                p);
  }
  launch_sum_slots<T>(
      SlotSums{
          p.workspace, p.offsets, p.B, p.D, 3, {p.weight}, {p.dscale, p.dshift, p.dgate}, true},
      p.stream);
  launch_sum_weight<T>(p, 3);
}

}  // namespace
}  // namespace gpu

int gated_residual_norm_modulate_cuda(const GatedResidualNormModulateParams& p) {
  if (p.R == 0) return int(cudaSuccess);
  return gpu::launch_for(p.dtype, p.R, p.D, [&](auto* tag) { gpu::forward<LENS_TYPE_OF(tag)>(p); });
}

int gated_residual_norm_modulate_backward_cuda(const GatedResidualNormModulateBackwardParams& p) {
  bool fits = true;
  const int state = gpu::launch_for(p.dtype, p.R, p.D, [&](auto* tag) {
    using T = LENS_TYPE_OF(tag);
    fits = gpu::backward_fits(p.D, gpu::kChunk<T>);
    if (fits) gpu::backward<T>(p);
  });
  return fits ? state : int(cudaErrorNotSupported);
}

}  // namespace lens
