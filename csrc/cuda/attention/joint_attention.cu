#include "cuda/attention/joint_attention.cuh"
#include "cuda/launch.cuh"
#include "cuda/tensor_map.cuh"

namespace lens {
namespace gpu {
namespace {

// 64 channels of one head by 128 rows, of an array [RS, N, 64]
int make_head_map(CUtensorMap* map, const void* base, const JointAttentionParams& p) {
  const int64_t width = p.N * kHeadWidth;
  return make_tensor_map(map, base, {width, p.RI + p.RT}, {width}, {kHeadWidth, kBlockKeys});
}

template <Softmax kSoftmax, int kPolynomial>
int launch(const JointAttentionParams& p, int multiprocessors) {
  CUtensorMap q, k, v;
  if (const int error = make_head_map(&q, p.q, p)) return error;
  if (const int error = make_head_map(&k, p.k, p)) return error;
  if (const int error = make_head_map(&v, p.v, p)) return error;
  constexpr auto kernel = joint_attention_kernel<kSoftmax, kPolynomial>;
  if (const int error = allow_shared<kernel>(kAttentionShared)) return error;
  const dim3 block(kAttentionThreads);
  for (int64_t first = 0; first < p.B; first += kScheduledSamples) {
    JointAttentionParams some = p;
    some.image_offsets += first;
    some.text_offsets += first;
    some.B = min(p.B - first, int64_t(kScheduledSamples));
    // at least the tiles there are: every sample's last may be a partial one
    const int64_t tiles = ((p.RI + p.RT) / kTileQueries + some.B) * p.N;
    const dim3 grid(unsigned(min(tiles, int64_t(multiprocessors))));
    LENS_LAUNCH_SHARED(kernel, grid, block, kAttentionShared, p.stream, q, k, v, some);
  }
  return int(cudaGetLastError());
}

}  // namespace
}  // namespace gpu

int joint_attention_cuda(const JointAttentionParams& p) {
  using namespace gpu;
  if ((p.text_out != nullptr ? p.RI + p.RT : p.RI) == 0) return int(cudaSuccess);
  if (p.dtype != DType::kBFloat16 || p.H != kHeadWidth) return int(cudaErrorNotSupported);
  if (!(p.scale > 0)) return int(cudaErrorInvalidValue);
  if (p.RI + p.RT + p.B * kTileQueries > 0x7fffffff / p.N) return int(cudaErrorNotSupported);
  const int multiprocessors = hopper_multiprocessors();
  if (multiprocessors == 0) return int(cudaErrorNotSupported);
  const bool fixed = p.score_bound * kLog2E <= kFixedRange, polynomial = p.polynomial != 0;
  const auto launch_instance = first_fit({Rung{fixed && polynomial, launch<Softmax::kFixed, 1>},
                                          Rung{fixed, launch<Softmax::kFixed, 0>},
                                          Rung{polynomial, launch<Softmax::kRunning, 1>},
                                          Rung{true, launch<Softmax::kRunning, 0>}});
  return launch_instance(p, multiprocessors);
}

}  // namespace lens
