#include "cuda/gated_residual.cuh"

namespace lens {
namespace gpu {
namespace {

template <class T>
void forward(const GatedResidualParams& p) {
  const int64_t segments = ceil_div(p.D, kGatedSegment * kWarp * kChunk<T>);
  const dim3 grid(unsigned(ceil_div(p.R, kRowsPerBlock)), unsigned(segments));
  const dim3 block(kWarp, kRowsPerBlock);
  const bool vector =
      chunks_fit<T>(p.D, {{p.x, p.D}, {p.y, p.D}, {p.out, p.D}, {p.gate, p.gate_stride}});
  const auto kernel = first_fit(
      {Rung{vector, gated_residual_kernel<T, true>}, Rung{true, gated_residual_kernel<T, false>}});
  LENS_LAUNCH(kernel, grid, block, p.stream, p);
}

template <class T>
void backward(const GatedResidualBackwardParams& p) {
  const dim3 grid(unsigned(split_slots(p.R, p.B))), block = backward_block(p.D, kChunk<T>);
  const bool vector = chunks_fit<T>(
      p.D, {{p.dout, p.D}, {p.y, p.D}, {p.dy, p.D}, {p.workspace, p.D}, {p.gate, p.gate_stride}});
  if (p.R > 0) {
    const auto kernel = first_fit({Rung{!backward_one_chunk(p.D, kChunk<T>),
                                        gated_residual_backward_kernel<T, kWideChunks, false>},
                                   Rung{vector, gated_residual_backward_kernel<T, 1, true>},
                                   Rung{true, gated_residual_backward_kernel<T, 1, false>}});
    LENS_LAUNCH(kernel, grid, block, p.stream, p);
  }  // else no slots to fill: the sums below are zero
  launch_sum_slots<T>(SlotSums{p.workspace, p.offsets, p.B, p.D, 1, {}, {p.dgate}, false},
                      p.stream);
}

}  // namespace
}  // namespace gpu

int gated_residual_cuda(const GatedResidualParams& p) {
  if (p.R == 0) return int(cudaSuccess);
  return gpu::launch_for(p.dtype, p.R, p.D,
                         [&](auto* tag) { gpu::forward<std::remove_pointer_t<decltype(tag)>>(p); });
}

int gated_residual_backward_cuda(const GatedResidualBackwardParams& p) {
  return gpu::launch_backward_for(
      p, [&](auto* tag) { gpu::backward<std::remove_pointer_t<decltype(tag)>>(p); });
}

}  // namespace lens
