#include "cuda/rms_norm_modulate.cuh"

namespace lens {
namespace gpu {
namespace {

template <class T>
bool aligned(const RmsNormModulateParams& p) {
  return p.R == 0 || chunks_fit<T>(p.D, {{p.x, p.D},
                                         {p.y, p.D},
                                         {p.weight, p.D},
                                         {p.scale, p.scale_stride},
                                         {p.shift, p.shift_stride}});
}

template <class T>
void forward(const RmsNormModulateSets& sets) {
  const dim3 grid = row_grid(sets.p[0].R + sets.p[1].R), block(kWarp, kRowsPerBlock);
  void* stream = sets.p[0].stream;
  const bool vector = aligned<T>(sets.p[0]) && aligned<T>(sets.p[1]);
  const int cached = vector ? cached_chunks<T>(sets.p[0].D) : 0;
  const auto kernel =
      first_fit({Rung{cached == 3, rms_norm_modulate_kernel<T, kCached<T, 3>, true>},
                 Rung{cached == 6, rms_norm_modulate_kernel<T, kCached<T, 6>, true>},
                 Rung{cached == 12, rms_norm_modulate_kernel<T, kCached<T, 12>, true>},
                 Rung{vector, rms_norm_modulate_kernel<T, 0, true>},
                 Rung{true, rms_norm_modulate_kernel<T, 0, false>}});
  LENS_LAUNCH(kernel, grid, block, stream, sets);
}

template <class T>
void backward(const RmsNormModulateBackwardParams& p) {
  const dim3 grid(unsigned(split_slots(p.R, p.B))), block = backward_block(p.D, kChunk<T>);
  const bool vector = chunks_fit<T>(p.D, {{p.dy, p.D},
                                          {p.x, p.D},
                                          {p.dx, p.D},
                                          {p.weight, p.D},
                                          {p.workspace, p.D},
                                          {p.scale, p.scale_stride}});
  if (p.R > 0) {
    const auto kernel = first_fit({Rung{!backward_one_chunk(p.D, kChunk<T>),
                                        rms_norm_modulate_backward_kernel<T, kWideChunks, false>},
                                   Rung{vector, rms_norm_modulate_backward_kernel<T, 1, true>},
                                   Rung{true, rms_norm_modulate_backward_kernel<T, 1, false>}});
    LENS_LAUNCH(kernel, grid, block, p.stream, p);
  }  // else no slots to fill: the sums below are zero
  launch_sum_slots<T>(
      SlotSums{p.workspace, p.offsets, p.B, p.D, 2, {p.weight}, {p.dscale, p.dshift}, true},
      p.stream);
  launch_sum_weight<T>(p, 2);
}

}  // namespace
}  // namespace gpu

int rms_norm_modulate_sets_cuda(const RmsNormModulateSets& sets) {
  const RmsNormModulateParams& p = sets.p[0];
  const int64_t rows = p.R + sets.p[1].R;
  if (rows == 0) return int(cudaSuccess);
  return gpu::launch_for(p.dtype, rows, p.D, [&](auto* tag) {
    gpu::forward<std::remove_pointer_t<decltype(tag)>>(sets);
  });
}

int rms_norm_modulate_cuda(const RmsNormModulateParams& p) {
  return rms_norm_modulate_sets_cuda({{p, {}}});
}

int rms_norm_modulate_backward_cuda(const RmsNormModulateBackwardParams& p) {
  return gpu::launch_backward_for(
      p, [&](auto* tag) { gpu::backward<std::remove_pointer_t<decltype(tag)>>(p); });
}

}  // namespace lens
