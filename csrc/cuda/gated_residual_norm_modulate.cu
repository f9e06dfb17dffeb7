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
  const int cached = vector ? cached_chunks<T>(p.D) : 0;
  const auto kernel =
      first_fit({Rung{cached == 3, gated_residual_norm_modulate_kernel<T, kCached<T, 3>, true>},
                 Rung{cached == 6, gated_residual_norm_modulate_kernel<T, kCached<T, 6>, true>},
                 Rung{cached == 12, gated_residual_norm_modulate_kernel<T, kCached<T, 12>, true>},
                 Rung{vector, gated_residual_norm_modulate_kernel<T, 0, true>},
                 Rung{true, gated_residual_norm_modulate_kernel<T, 0, false>}});
  LENS_LAUNCH(kernel, grid, block, p.stream, p);
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
  if (p.R > 0) {
    const auto kernel =
        first_fit({Rung{!backward_one_chunk(p.D, kChunk<T>),
                        gated_residual_norm_modulate_backward_kernel<T, kWideChunks, false>},
                   Rung{vector, gated_residual_norm_modulate_backward_kernel<T, 1, true>},
                   Rung{true, gated_residual_norm_modulate_backward_kernel<T, 1, false>}});
    LENS_LAUNCH(kernel, grid, block, p.stream, p);
  }  // else no slots to fill: the sums below are zero
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
  return gpu::launch_for(p.dtype, p.R, p.D,
                         [&](auto* tag) { gpu::forward<std::remove_pointer_t<decltype(tag)>>(p); });
}

int gated_residual_norm_modulate_backward_cuda(const GatedResidualNormModulateBackwardParams& p) {
  return gpu::launch_backward_for(
      p, [&](auto* tag) { gpu::backward<std::remove_pointer_t<decltype(tag)>>(p); });
}

}  // namespace lens
