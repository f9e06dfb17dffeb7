#include "cuda/group_norm_silu.cuh"

namespace lens {
namespace gpu {
namespace {

// Threads of a row: the power of two that covers its chunks, up to a block's.
inline dim3 apply_block(int64_t width, int chunk) {
  int threads = 1;
  while (threads < kApplyThreads && int64_t(threads) * chunk < width) threads *= 2;
  return dim3(unsigned(threads), unsigned(kApplyThreads / threads));
}

template <class T>
void forward(const GroupNormSiluParams& p) {
  const bool vector = chunks_fit<T>(p.D, {{p.x, p.D}, {p.y, p.D}, {p.bias, p.D}});
  const auto statistics = first_fit({Rung{vector, group_norm_silu_statistics_kernel<T, true>},
                                     Rung{true, group_norm_silu_statistics_kernel<T, false>}});
  const auto kernel = first_fit({Rung{vector && p.activate, group_norm_silu_kernel<T, true, true>},
                                 Rung{vector, group_norm_silu_kernel<T, true, false>},
                                 Rung{p.activate != 0, group_norm_silu_kernel<T, false, true>},
                                 Rung{true, group_norm_silu_kernel<T, false, false>}});
  const dim3 slots(unsigned(split_slots(p.R, p.B))), groups(unsigned(p.B * p.G));
  LENS_LAUNCH(statistics, slots, dim3(kStatisticsThreads), p.stream, p);
  LENS_LAUNCH(group_norm_silu_table_kernel<T>, groups, dim3(kTableThreads), p.stream, p);
  const dim3 block = apply_block(p.D, kChunk<T>);
  LENS_LAUNCH(kernel, dim3(unsigned(ceil_div(p.R, block.y))), block, p.stream, p);
}

}  // namespace
}  // namespace gpu

int group_norm_silu_cuda(const GroupNormSiluParams& p) {
  if (p.R == 0) return int(cudaSuccess);
  return gpu::launch_for(p.dtype, p.R, p.D,
                         [&](auto* tag) { gpu::forward<std::remove_pointer_t<decltype(tag)>>(p); });
}

}  // namespace lens
