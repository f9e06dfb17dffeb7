// Stand-in for the toolkit's <cuda_runtime.h>, found first on the include path when a kernel is
// compiled for the host: the part of CUDA C++ that the row kernels use, with its real meaning.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulation/cuda.h"
#include "emulation/hopper.h"
#include "emulation/inexact.h"
#include "emulation/scheduler.h"

#define __global__ inline
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict
// One block runs at a time, so static storage is the block's; the section lets the scheduler poison
// it before every block.
#define __shared__ static __attribute__((section("lens_shared")))

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
constexpr cudaError_t cudaErrorInvalidValue = 1;
constexpr cudaError_t cudaErrorNotSupported = 801;

inline cudaError_t cudaGetLastError() { return lens::emulation::last_error(); }
inline cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t stream) {
  if (stream == nullptr) return cudaErrorInvalidValue;
  std::memset(pointer, value, bytes);
  return cudaSuccess;
}

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76
};
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return lens::emulation::bind_context(), cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  using namespace lens::emulation;
  *value = attribute == cudaDevAttrMultiProcessorCount      ? multiprocessors()
           : attribute == cudaDevAttrComputeCapabilityMajor ? compute_capability()
                                                            : 0;
  return cudaSuccess;
}
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
template <class Kernel>
inline cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  return lens::emulation::allow_shared(reinterpret_cast<const void*>(kernel), bytes);
}
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
union cudaLaunchAttributeValue {
  uint3 clusterDim;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
// Blocks; 0, which no launch takes, for a cluster that is not along x.
inline unsigned cluster_of(const cudaLaunchConfig_t& config) {
  const bool given = config.numAttrs && config.attrs->id == cudaLaunchAttributeClusterDimension;
  if (!given) return 1;
  const uint3 size = config.attrs->val.clusterDim;
  return size.y == 1 && size.z == 1 ? size.x : 0;
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  lens::emulation::launch("a kernel with launch attributes", kernel,
                          {config->gridDim, config->blockDim, config->dynamicSmemBytes,
                           config->stream, cluster_of(*config)},
                          std::forward<Arguments>(arguments)...);
  return cudaSuccess;  // what went wrong is the next cudaGetLastError()
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel* kernel,
                                           const cudaLaunchConfig_t* config) {
  const auto* address = reinterpret_cast<const void*>(kernel);
  if (!lens::emulation::shared_allowed(address, config->dynamicSmemBytes)) {
    return cudaErrorInvalidValue;
  }
  const unsigned blocks = cluster_of(*config);
  if (blocks == 0 || config->gridDim.x % blocks) return cudaErrorInvalidValue;
  *clusters = lens::emulation::multiprocessors() / int(blocks);
  return cudaSuccess;
}
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0 };
constexpr unsigned long long cudaEnableDefault = 0;
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned,
                                                    unsigned long long,
                                                    cudaDriverEntryPointQueryResult* state) {
  if (std::strcmp(name, "cuTensorMapEncodeTiled") != 0) return cudaErrorInvalidValue;
  *found = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  *state = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

template <class T>
inline T __ldg(const T* pointer) {
  return *pointer;
}
template <class T>
inline T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
inline T max(T a, T b) {
  return a < b ? b : a;
}

// Error bounds: CUDA C++ Programming Guide, "Mathematical Functions".
inline float __frsqrt_rn(float x) { return float(1.0 / std::sqrt(double(x))); }
inline float rsqrtf(float x) {
  using namespace lens::emulation;
  return with_error(1.0 / std::sqrt(double(x)), 2, Inexact::kInverseSqrt, argument_bits(x));
}
inline double rsqrt(double x) {
  using namespace lens::emulation;
  return with_error_double(1.0 / std::sqrt(x), 1, Inexact::kInverseSqrtDouble, argument_bits(x));
}
inline float __expf(float x) {
  using namespace lens::emulation;
  const double ulps = 2 + std::floor(std::fabs(1.173 * double(x)));
  return with_error(std::exp(double(x)), ulps, Inexact::kExp, argument_bits(x));
}
inline float __fdividef(float x, float y) {
  using namespace lens::emulation;
  const float size = std::fabs(y);
  if (size > 0x1p126f) return size <= FLT_MAX ? 0.0f * x : x / y;  // infinity times 0 is NaN there
  return with_error(double(x) / double(y), 2, Inexact::kDivide, argument_bits(x, y));
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline double __hiloint2double(int high, int low) {
  const uint64_t bits = uint64_t(uint32_t(high)) << 32 | uint32_t(low);
  double x;
  std::memcpy(&x, &bits, 8);
  return x;
}
inline int __double2hiint(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, 8);
  return int(bits >> 32);
}
inline int __double2loint(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, 8);
  return int(bits);
}

namespace lens::emulation {
template <class T>
T exchange(WarpOp op, uint32_t mask, T value, int argument, int width, int line) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = warp_operation(op, mask, bits, argument, width, line);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
}  // namespace lens::emulation

// The line of the call tells two places apart; macros, because it must be the caller's line.
#define LENS_WARP(op, mask, value, argument, width) \
  lens::emulation::exchange(lens::emulation::WarpOp::op, mask, value, argument, width, __LINE__)
#define LENS_FOURTH(a, b, c, d, ...) d
#define LENS_LANE_ARGUMENT(a, b, c, ...) c
#define LENS_VALUE(a, b, ...) b
#define LENS_MASK(a, ...) a
#define LENS_SHUFFLE(op, ...)                                        \
  LENS_WARP(op, LENS_MASK(__VA_ARGS__, ), LENS_VALUE(__VA_ARGS__, ), \
            LENS_LANE_ARGUMENT(__VA_ARGS__, ), LENS_FOURTH(__VA_ARGS__, 32, 32))
#define __shfl_sync(...) LENS_SHUFFLE(kShuffle, __VA_ARGS__)
#define __shfl_xor_sync(...) LENS_SHUFFLE(kShuffleXor, __VA_ARGS__)
#define __shfl_down_sync(...) LENS_SHUFFLE(kShuffleDown, __VA_ARGS__)
#define __shfl_up_sync(...) LENS_SHUFFLE(kShuffleUp, __VA_ARGS__)
#define __ballot_sync(mask, predicate) \
  uint32_t(LENS_WARP(kBallot, mask, uint64_t((predicate) ? 1 : 0), 0, 32))
#define LENS_SYNCWARP(mask, ...) LENS_WARP(kSync, mask, uint64_t(0), 0, 32)
#define __syncwarp(...) LENS_SYNCWARP(__VA_ARGS__ __VA_OPT__(, ) 0xffffffffu, )
#define __syncthreads() lens::emulation::block_barrier(__LINE__)
