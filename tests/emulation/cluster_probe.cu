// What clusters of two blocks can do, and no more: each block copies half of a tile for both and a
// tile of its own, a warp of each writes both tiles to y, a stage is free when both warps are done.
//
// a [clusters, steps, 16, 64], x [clusters, 2, steps, 8, 64], y [clusters, 2, steps, 24, 64] of
// bfloat16: y is a's 16 rows, then x's 8.
#include "cuda/hopper.cuh"
#include "cuda/launch.cuh"
#include "cuda/tensor_map.cuh"

namespace lens::gpu {

constexpr int kStages = 3, kHalfBytes = 8 * 128, kStageBytes = 3 * kHalfBytes;
constexpr int kReleases = 2;  // of a stage, by a warp of each block

struct ProbeMaps {
  CUtensorMap a, x;
};

__global__ void __launch_bounds__(64, 1)
    cluster_probe_kernel(const __grid_constant__ ProbeMaps maps, const int steps, uint4* y) {
  LENS_DYNAMIC_SHARED(shared);
  auto* full = reinterpret_cast<uint64_t*>(shared + kStages * kStageBytes);
  uint64_t* empty = full + kStages;
  const int rank = int(cluster_rank()), lane = int(threadIdx.x) % 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      barrier_init(full + s, 1);
      barrier_init(empty + s, kReleases);
    }
    fence_barrier_init();
  }
  __syncthreads();
  cluster_arrive();
  cluster_wait();

  if (threadIdx.x < 32) {
    if (!elect_one()) return;
    for (int i = 0; i < steps; ++i) {
      const int s = i % kStages, half = (int(blockIdx.x) / 2 * steps + i) * 2 + rank;
      unsigned char* to = shared + s * kStageBytes;
      barrier_wait(empty + s, uint32_t(i / kStages & 1) ^ 1);
      barrier_arrive_expect_tx(full + s, kStageBytes);
      tma_multicast_2d(to + rank * kHalfBytes, &maps.a, full + s, 3, 0, half * 8);
      tma_load_2d(to + 2 * kHalfBytes, &maps.x, full + s, 0, (int(blockIdx.x) * steps + i) * 8);
    }
    for (int i = steps; i < steps + kStages; ++i) {  // until the other block sends nothing more
      barrier_wait(empty + i % kStages, uint32_t(i / kStages & 1) ^ 1);
    }
    return;
  }

  const uint32_t release = cluster_address(empty, unsigned(rank ^ (lane & 1)));
  for (int i = 0; i < steps; ++i) {
    const int s = i % kStages;
    barrier_wait(full + s, uint32_t(i / kStages & 1));
    const auto* from = reinterpret_cast<const uint4*>(shared + s * kStageBytes);
    uint4* to = y + (int64_t(blockIdx.x) * steps + i) * (kStageBytes / 16);
    for (int chunk = lane; chunk < kStageBytes / 16; chunk += 32) {
      to[chunk] = from[chunk];
      __syncwarp();
    }
    if (lane < kReleases) cluster_barrier_arrive(release + uint32_t(s) * 8);
  }
}

}  // namespace lens::gpu

extern "C" __attribute__((visibility("default"))) int lens_emulation_cluster_probe(
    const void* a, const void* x, void* y, int64_t blocks, int64_t cluster, int64_t steps,
    void* stream) {
  using namespace lens::gpu;
  constexpr int kBytes = kStages * (kStageBytes + 16);
  if (hopper_multiprocessors() == 0) return int(cudaErrorNotSupported);
  ProbeMaps maps;
  const auto make = [&](CUtensorMap* map, const void* array) {
    return make_tensor_map(map, array, {64, (blocks + 1) / 2 * 2 * steps * 8}, {64}, {64, 8},
                           CU_TENSOR_MAP_SWIZZLE_NONE);
  };
  if (const int error = make(&maps.a, a)) return error;
  if (const int error = make(&maps.x, x)) return error;
  if (const int error = allow_shared<&cluster_probe_kernel>(kBytes)) return error;
  const ClusterLaunch launch(int(blocks), int(cluster), 64, kBytes, stream);
  cudaLaunchKernelEx(&launch.config, cluster_probe_kernel, maps, int(steps),
                     static_cast<uint4*>(y));
  return int(cudaGetLastError());
}
