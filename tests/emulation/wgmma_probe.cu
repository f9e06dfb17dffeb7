// One tile's wgmmas over given images of shared memory, and the descriptors they took: what
// test_cute.py holds against CuTe's numbers.
//
// K-major: d [64, N] = A [64, 64] B [N, 64]^T, both by descriptor. Else: A [64, 128] in registers,
// B [128, 64] as it lies. y [128, N / 2] float: a thread's accumulators.
#include "cuda/hopper.cuh"
#include "cuda/launch.cuh"
#include "cuda/tensor_map.cuh"

namespace lens::gpu {

constexpr int kTile = 64 * 128, kMostBytes = 256 * 128, kSteps = 8;

struct ProbeArrays {
  const uint4 *a, *b;      // images of 8 KB and N rows (K-major) or 128 rows of 128 bytes
  const uint32_t* values;  // [128, kSteps, 4]: A in registers
  float* y;
  uint64_t* descriptors;  // [2, kSteps], at address 0
};

template <int N, bool kInRegisters>
__global__ void __launch_bounds__(128, 1) wgmma_probe_kernel(const ProbeArrays p) {
  LENS_DYNAMIC_SHARED(shared);
  auto* chunks = reinterpret_cast<uint4*>(shared);
  const int thread = int(threadIdx.x);
  for (int i = thread; i < kTile / 16; i += 128) chunks[i] = p.a[i];
  const int rows = kInRegisters ? 128 : N;
  for (int i = thread; i < rows * 8; i += 128) chunks[kTile / 16 + i] = p.b[i];
  fence_async_shared();
  __syncthreads();

  float d[N / 2];
  uint32_t values[kSteps][4];
  for (int i = 0; i < kSteps * 4; ++i) values[i / 4][i % 4] = p.values[thread * kSteps * 4 + i];
  const uint64_t a = matrix_k(shared);
  const uint64_t b = kInRegisters ? matrix_mn(shared + kTile) : matrix_k(shared + kTile);
  constexpr uint64_t kStepB = kInRegisters ? kStepMN : kStepK;
  const int steps = kInRegisters ? kSteps : 4;
  wgmma_fence();
  for (int step = 0; step < steps; ++step) {
    if constexpr (kInRegisters) {
      wgmma_rs<N, Major::kMN>(d, values[step], b + step * kStepB, step > 0);
    } else {
      wgmma<N>(d, a + step * kStepK, b + step * kStepB, step > 0);
    }
  }
  wgmma_commit();
  wgmma_wait<0>(d);
  for (int i = 0; i < N / 2; ++i) p.y[thread * (N / 2) + i] = d[i];
  if (thread == 0) {
    for (int step = 0; step < steps; ++step) {
      p.descriptors[step] = a + step * kStepK - (shared_address(shared) >> 4);
      p.descriptors[kSteps + step] = b + step * kStepB - (shared_address(shared + kTile) >> 4);
    }
  }
}

template <int N, bool kInRegisters>
int launch_probe(const ProbeArrays& p, void* stream) {
  constexpr auto kernel = &wgmma_probe_kernel<N, kInRegisters>;
  if (const int error = allow_shared<kernel>(kTile + kMostBytes)) return error;
  LENS_LAUNCH_SHARED((wgmma_probe_kernel<N, kInRegisters>), 1, 128, kTile + kMostBytes, stream, p);
  return int(cudaGetLastError());
}

}  // namespace lens::gpu

extern "C" __attribute__((visibility("default"))) int lens_emulation_wgmma_probe(
    int n, int in_registers, const void* a, const void* b, const void* values, void* y,
    void* descriptors, void* stream) {
  using namespace lens::gpu;
  const ProbeArrays p{static_cast<const uint4*>(a), static_cast<const uint4*>(b),
                      static_cast<const uint32_t*>(values), static_cast<float*>(y),
                      static_cast<uint64_t*>(descriptors)};
  if (in_registers) return launch_probe<64, true>(p, stream);
  switch (n) {
    case 64:
      return launch_probe<64, false>(p, stream);
    case 128:
      return launch_probe<128, false>(p, stream);
    case 192:
      return launch_probe<192, false>(p, stream);
    case 224:
      return launch_probe<224, false>(p, stream);
    default:
      return launch_probe<256, false>(p, stream);
  }
}
