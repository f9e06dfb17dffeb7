#include "cuda/guidance_step.cuh"

namespace lens {
namespace gpu {
namespace {

// Whether groups of four channels are whole and aligned in both types.
template <class T>
bool groups_fit(const GuidanceStepParams& p) {
  const auto fit = [](const void* pointer, size_t bytes) {
    return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
  };
  constexpr size_t kStorage = alignof(Pack<T, kGroup>), kPlace = alignof(Pack<Acc<T>, kGroup>);
  return p.C % kGroup == 0 && fit(p.x, kPlace) && fit(p.out, kPlace) && fit(p.cond, kStorage) &&
         fit(p.uncond, kStorage);
}

template <class T>
void forward(const GuidanceStepParams& p) {
  const dim3 grid = row_grid(p.R), block(kWarp, kRowsPerBlock);
  const bool once = p.C <= kWarp * kGroup, vector = groups_fit<T>(p);
  const auto kernel = first_fit({Rung{once && vector, guidance_step_kernel<T, true, true>},
                                 Rung{once, guidance_step_kernel<T, true, false>},
                                 Rung{true, guidance_step_kernel<T, false, false>}});
  LENS_LAUNCH(kernel, grid, block, p.stream, p);
}

}  // namespace
}  // namespace gpu

int guidance_step_cuda(const GuidanceStepParams& p) {
  if (p.R == 0) return int(cudaSuccess);
  return gpu::launch_for(p.dtype, p.R, p.C,
                         [&](auto* tag) { gpu::forward<std::remove_pointer_t<decltype(tag)>>(p); });
}

}  // namespace lens
