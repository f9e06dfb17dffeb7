// Host side of every launcher: the launch itself, alignment, the choice of a kernel's instance.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "math/types.h"
#include "params.h"

// <<<>>> under nvcc; compiled for the host, the emulator runs the same kernel.
#if defined(__CUDACC__)
#define LENS_LAUNCH_SHARED(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#else
#define LENS_LAUNCH_SHARED(kernel, grid, block, shared_bytes, stream, ...) \
  lens::emulation::launch(#kernel, kernel, {grid, block, shared_bytes, stream}, __VA_ARGS__)
#endif
#define LENS_LAUNCH(kernel, grid, block, stream, ...) \
  LENS_LAUNCH_SHARED(kernel, grid, block, 0, stream, __VA_ARGS__)

namespace lens::gpu {

// Launch attributes of `cluster` neighbouring blocks that share memory; used in place, never
// copied.
struct ClusterLaunch {
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};

  ClusterLaunch(int blocks, int cluster, int threads, size_t shared_bytes, void* stream) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {unsigned(cluster), 1, 1};
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  ClusterLaunch(const ClusterLaunch&) = delete;
};

// A row of this kernel is one warp, a block four rows.
constexpr int kRowsPerBlock = 4;

constexpr int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

inline dim3 row_grid(int64_t rows) { return dim3(unsigned(ceil_div(rows, kRowsPerBlock))); }

struct View {
  const void* pointer;
  int64_t row_elements;  // distance of two rows
};

// Whether every row of every view starts on a 16-byte boundary and holds whole 16-byte chunks.
template <class T>
bool chunks_fit(int64_t width, std::initializer_list<View> views) {
  bool fit = width * int64_t(sizeof(T)) % 16 == 0;
  for (const View& view : views) {
    fit &= reinterpret_cast<uintptr_t>(view.pointer) % 16 == 0;
    fit &= view.row_elements * int64_t(sizeof(T)) % 16 == 0;
  }
  return fit;
}

// Lets `kernel` ask for `bytes` of dynamic shared memory, once per kernel and device.
template <auto kernel>
int allow_shared(int bytes) {
  static std::atomic<uint64_t> allowed{0};
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return int(error);
  const uint64_t bit = uint64_t(1) << (device & 63);
  if (device < 64 && allowed.load() & bit) return int(cudaSuccess);
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) allowed.fetch_or(bit);
  return int(error);
}

// ---- from run-time values to template arguments: the launch ladders
// An instance of a kernel, or of what launches it, and whether it serves the arguments at hand.
template <class F>
struct Rung {
  bool fits;
  F* instance;
};
template <class F>
Rung(bool, F*) -> Rung<F>;

// The first instance that fits; the last rung, for everything else, says true.
template <class F>
F* first_fit(std::initializer_list<Rung<F>> rungs) {
  const Rung<F>* rung = rungs.begin();
  while (!rung->fits) ++rung;
  return rung->instance;
}

// Calls f with a null T* for the storage type; more rows than a grid can hold, columns that int
// cannot count, or an unknown type are an error. Otherwise the state of the launches.
template <class F>
int launch_for(DType dtype, int64_t rows, int64_t width, F f) {
  if (rows > 0x7fffffff || width > 0x3fffffff) return int(cudaErrorNotSupported);
  if (!with_type(dtype, f)) return int(cudaErrorInvalidValue);
  return int(cudaGetLastError());
}

}  // namespace lens::gpu
