// Host side of TMA: the map of a bf16 array in global memory, and what a launcher asks of a device.
// The driver's function is looked up through the runtime, so that nothing links libcuda.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <initializer_list>

namespace lens::gpu {

// Sizes and box count elements, innermost first; strides are those of dimensions 1, 2, .. in
// elements. The inner box is at most 64 elements, one swizzled row. Base and strides lie on 16-byte
// boundaries. The driver's text asks for strides that are multiples of the one before; common maps,
// of rows and then their 128-byte columns, break that and are taken.
inline int make_tensor_map(CUtensorMap* map, const void* base, std::initializer_list<int64_t> sizes,
                           std::initializer_list<int64_t> strides,
                           std::initializer_list<uint32_t> box,
                           CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_128B) {
  *map = CUtensorMap{};
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult state;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                               12000, cudaEnableDefault, &state);
    const bool served = error == cudaSuccess && state == cudaDriverEntryPointSuccess;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(served ? found : nullptr);
  }();
  if (encode == nullptr) return int(cudaErrorNotSupported);
  cuuint64_t dims[5], pitches[5];
  cuuint32_t boxes[5], steps[5];
  int rank = 0;
  for (int64_t size : sizes) {
    steps[rank] = 1;
    dims[rank++] = cuuint64_t(size);
  }
  int i = 0;
  for (int64_t stride : strides) pitches[i++] = cuuint64_t(stride) * 2;
  i = 0;
  for (uint32_t extent : box) boxes[i++] = extent;
  const CUresult result =
      encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, cuuint32_t(rank), const_cast<void*>(base), dims,
             pitches, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? int(cudaSuccess) : int(cudaErrorInvalidValue);
}

// Streaming multiprocessors of the current device, or 0 where it is no sm_90. Binds the device's
// context to the calling thread: a thread's first runtime call need not, and the driver's function
// for maps fails without one.
inline int hopper_multiprocessors() {
  int device = 0, major = 0, minor = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess || cudaSetDevice(device) != cudaSuccess) return 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (major != 9 || minor != 0) return 0;
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// Clusters of `kernel` that run at the same time; 0 where none can. The driver is asked once per
// kernel, device and number of multiprocessors, of which a process may be given a part.
template <auto kernel>
int active_clusters(const cudaLaunchConfig_t& config, int multiprocessors) {
  static std::atomic<uint64_t> known[64];  // multiprocessors above the answer
  int device = 0, clusters = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  const uint64_t kept = known[device & 63].load(), key = uint64_t(multiprocessors) << 32;
  if (device < 64 && kept >> 32 << 32 == key) return int(uint32_t(kept));
  if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    clusters = 0;
  }
  if (device < 64) known[device].store(key | uint32_t(clusters));
  return clusters;
}

}  // namespace lens::gpu
