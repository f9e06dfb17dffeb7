#include "cuda/pack_tokens.cuh"

namespace lens {
namespace gpu {
namespace {

template <class Unit, bool kGather>
void copy_rows(const void* from, const int64_t* rows, void* to, int64_t R, int64_t row_bytes,
               void* stream) {
  const int64_t units = row_bytes / int64_t(sizeof(Unit));
  int lanes = 1;
  while (lanes < 32 && lanes < units) lanes *= 2;
  const dim3 grid(unsigned(ceil_div(R, kCopyThreads / lanes)));
  LENS_LAUNCH((copy_rows_kernel<Unit, kGather>), grid, dim3(kCopyThreads), stream,
              static_cast<const Unit*>(from), rows, static_cast<Unit*>(to), R, units, lanes);
}

template <bool kGather>
int copy_rows(DType dtype, const void* from, const int64_t* rows, void* to, int64_t R, int64_t C,
              void* stream) {
  return launch_for(dtype, R, C, [&](auto* tag) {
    const int64_t bytes = C * int64_t(sizeof(*tag));
    const uint64_t all =
        uint64_t(bytes) | reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to);
    if (all % 16 == 0) {
      copy_rows<uint4, kGather>(from, rows, to, R, bytes, stream);
    } else if (all % 8 == 0) {
      copy_rows<uint2, kGather>(from, rows, to, R, bytes, stream);
    } else if (all % 4 == 0) {
      copy_rows<uint32_t, kGather>(from, rows, to, R, bytes, stream);
    } else {
      copy_rows<uint16_t, kGather>(from, rows, to, R, bytes, stream);
    }
  });
}

size_t size_of(DType dtype) {
  return dtype == DType::kBFloat16 ? 2 : dtype == DType::kFloat32 ? 4 : 8;
}

}  // namespace
}  // namespace gpu

int pack_tokens_cuda(const PackTokensParams& p) {
  if (p.R == 0) return int(cudaSuccess);
  return gpu::copy_rows<true>(p.dtype, p.x, p.rows, p.packed, p.R, p.C, p.stream);
}

int unpack_tokens_cuda(const UnpackTokensParams& p) {
  if (p.BL == 0) return int(cudaSuccess);
  const size_t bytes = size_t(p.BL * p.C) * gpu::size_of(p.dtype);
  const cudaError_t state = cudaMemsetAsync(p.x, 0, bytes, static_cast<cudaStream_t>(p.stream));
  if (state != cudaSuccess || p.R == 0) return int(state);
  return gpu::copy_rows<false>(p.dtype, p.packed, p.rows, p.x, p.R, p.C, p.stream);
}

}  // namespace lens
