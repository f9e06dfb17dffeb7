#include "cuda/swiglu.cuh"

namespace lens {
namespace gpu {
namespace {

template <class T>
dim3 segment_grid(int64_t rows, int64_t width) {
  return dim3(unsigned(ceil_div(rows, kRowsPerBlock)),
              unsigned(ceil_div(width, kSwigluSegment * kWarp * kChunk<T>)));
}

template <class T>
void forward(const SwigluParams& p) {
  const dim3 grid = segment_grid<T>(p.R, p.F), block(kWarp, kRowsPerBlock);
  const bool vector = chunks_fit<T>(p.F, {{p.h, p.F}, {p.y, p.F}});
  const auto kernel =
      first_fit({Rung{vector, swiglu_kernel<T, true>}, Rung{true, swiglu_kernel<T, false>}});
  LENS_LAUNCH(kernel, grid, block, p.stream, p);
}

template <class T>
void backward(const SwigluBackwardParams& p) {
  const dim3 grid = segment_grid<T>(p.R, p.F), block(kWarp, kRowsPerBlock);
  const bool vector = chunks_fit<T>(p.F, {{p.h, p.F}, {p.dy, p.F}, {p.dh, p.F}});
  const auto kernel = first_fit({Rung{vector, swiglu_backward_kernel<T, true>},
                                 Rung{true, swiglu_backward_kernel<T, false>}});
  LENS_LAUNCH(kernel, grid, block, p.stream, p);
}

}  // namespace
}  // namespace gpu

int swiglu_cuda(const SwigluParams& p) {
  if (p.R == 0) return int(cudaSuccess);
  return gpu::launch_for(p.dtype, p.R, p.F,
                         [&](auto* tag) { gpu::forward<std::remove_pointer_t<decltype(tag)>>(p); });
}

int swiglu_backward_cuda(const SwigluBackwardParams& p) {
  if (p.R == 0) return int(cudaSuccess);
  return gpu::launch_for(p.dtype, p.R, p.F, [&](auto* tag) {
    gpu::backward<std::remove_pointer_t<decltype(tag)>>(p);
  });
}

}  // namespace lens
