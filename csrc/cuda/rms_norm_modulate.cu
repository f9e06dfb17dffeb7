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
  const int cached = vector && sizeof(T) < 8 ? cached_chunks(sets.p[0].D, kChunk<T>) : 0;
  if constexpr (sizeof(T) < 8) {
    if (cached == 3) LENS_LAUNCH((rms_norm_modulate_kernel<T, 3, true>), grid, block, stream, sets);
    if (cached == 6) LENS_LAUNCH((rms_norm_modulate_kernel<T, 6, true>), grid, block, stream, sets);
    if (cached == 12) {
      LENS_LAUNCH((rms_norm_modulate_kernel<T, 12, true>), grid, block, stream, sets);
    }
  }
  if (cached) return;
  if (vector) {
    LENS_LAUNCH((rms_norm_modulate_kernel<T, 0, true>), grid, block, stream, sets);
  } else {
    LENS_LAUNCH((rms_norm_modulate_kernel<T, 0, false>), grid, block, stream, sets);
  }
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
  if (p.R == 0) {
    // no slots to fill; the sums below are zero
  } else if (!backward_one_chunk(p.D, kChunk<T>)) {
    LENS_LAUNCH((rms_norm_modulate_backward_kernel<T, kWideChunks, false>), grid, block, p.stream,
                p);
  } else if (vector) {
    LENS_LAUNCH((rms_norm_modulate_backward_kernel<T, 1, true>), grid, block, p.stream, p);
  } else {
    LENS_LAUNCH((rms_norm_modulate_backward_kernel<T, 1, false>), grid, block, p.stream, p);
  }
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
  return gpu::launch_for(p.dtype, rows, p.D,
                         [&](auto* tag) { gpu::forward<LENS_TYPE_OF(tag)>(sets); });
}

int rms_norm_modulate_cuda(const RmsNormModulateParams& p) {
  return rms_norm_modulate_sets_cuda({{p, {}}});
}

int rms_norm_modulate_backward_cuda(const RmsNormModulateBackwardParams& p) {
  bool fits = true;
  const int state = gpu::launch_for(p.dtype, p.R, p.D, [&](auto* tag) {
    using T = LENS_TYPE_OF(tag);
    fits = gpu::backward_fits(p.D, gpu::kChunk<T>);
    if (fits) gpu::backward<T>(p);
  });
  return fits ? state : int(cudaErrorNotSupported);
}

}  // namespace lens
