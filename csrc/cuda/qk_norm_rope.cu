#include "cuda/qk_norm_rope.cuh"
#include "cuda/qk_norm_rope_backward.cuh"

namespace lens {
namespace gpu {
namespace {

// Lanes of a head of 64, the released model's: known at compile time.
template <class T>
constexpr int kReleasedLanes = 64 / kChunk<T>;

template <class T, class Params>
bool heads_fit(const Params& p, std::initializer_list<View> arrays) {
  constexpr size_t kAngles = sizeof(Acc<T>) * kChunk<T> / 2;
  return chunks_fit<T>(p.H, arrays) && reinterpret_cast<uintptr_t>(p.cos) % kAngles == 0 &&
         reinterpret_cast<uintptr_t>(p.sin) % kAngles == 0 && p.H <= kWarp * kChunk<T>;
}

template <class T>
void forward(const QkNormRopeParams& p) {
  const dim3 grid(unsigned(ceil_div(3 * (p.RI + p.RT), kHeadWarps))), block(kWarp, kHeadWarps);
  const int lanes = lanes_of_head(p.H, kChunk<T>);
  const bool vector = heads_fit<T>(p, {{p.image_qkv, p.H},
                                       {p.text_qkv, p.H},
                                       {p.qkv, p.H},
                                       {p.image_q_weight, p.H},
                                       {p.image_k_weight, p.H},
                                       {p.text_q_weight, p.H},
                                       {p.text_k_weight, p.H}});
  const auto kernel =
      first_fit({Rung{p.H > kWarp * kChunk<T>, qk_norm_rope_kernel<T, 0, kWideHead<T>, false>},
                 Rung{vector && lanes == kReleasedLanes<T>,
                      qk_norm_rope_kernel<T, kReleasedLanes<T>, 1, true>},
                 Rung{vector, qk_norm_rope_kernel<T, 0, 1, true>},
                 Rung{true, qk_norm_rope_kernel<T, 0, 1, false>}});
  LENS_LAUNCH(kernel, grid, block, p.stream, p, lanes);
}

template <class T>
void backward(const QkNormRopeBackwardParams& p) {
  const dim3 grid(unsigned(split_chunks(p.RI) + split_chunks(p.RT))), block(kWarp, kSlabWarps);
  const int lanes = lanes_of_head(p.H, kChunk<T>);
  const bool vector = heads_fit<T>(p, {{p.dqkv, p.H},
                                       {p.image_qkv, p.H},
                                       {p.text_qkv, p.H},
                                       {p.dimage_qkv, p.H},
                                       {p.dtext_qkv, p.H},
                                       {p.image_q_weight, p.H},
                                       {p.image_k_weight, p.H},
                                       {p.text_q_weight, p.H},
                                       {p.text_k_weight, p.H}});
  if (p.RI + p.RT > 0) {
    const auto kernel = first_fit(
        {Rung{p.H > kWarp * kChunk<T>, qk_norm_rope_backward_kernel<T, 0, kWideHead<T>, false>},
         Rung{vector && lanes == kReleasedLanes<T>,
              qk_norm_rope_backward_kernel<T, kReleasedLanes<T>, 1, true>},
         Rung{true, qk_norm_rope_backward_kernel<T, 0, 1, false>}});
    LENS_LAUNCH(kernel, grid, block, p.stream, p, lanes);
  }  // else no slots to fill: the sums below are zero
  const dim3 tiles(unsigned(ceil_div(p.H, kWarp)), 4);
  LENS_LAUNCH(sum_head_weights_kernel<T>, tiles, block, p.stream, p);
}

}  // namespace
}  // namespace gpu

int qk_norm_rope_cuda(const QkNormRopeParams& p) {
  if (p.RI + p.RT == 0) return int(cudaSuccess);
  if (p.H > kMaxHead) return int(cudaErrorNotSupported);
  return gpu::launch_for(p.dtype, p.RI + p.RT, p.N * p.H,
                         [&](auto* tag) { gpu::forward<std::remove_pointer_t<decltype(tag)>>(p); });
}

int qk_norm_rope_backward_cuda(const QkNormRopeBackwardParams& p) {
  if (p.H > kMaxHead) return int(cudaErrorNotSupported);
  return gpu::launch_for(p.dtype, p.RI + p.RT, p.N * p.H, [&](auto* tag) {
    gpu::backward<std::remove_pointer_t<decltype(tag)>>(p);
  });
}

}  // namespace lens
