#include "cuda/pack_tokens.cuh"

namespace lens {
namespace gpu {
namespace {

template <class Unit, bool kGather>
void copy_units(const void* from, const int64_t* rows, void* to, int64_t R, int64_t row_bytes,
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
    const auto copy = first_fit({Rung{all % 16 == 0, copy_units<uint4, kGather>},
                                 Rung{all % 8 == 0, copy_units<uint2, kGather>},
                                 Rung{all % 4 == 0, copy_units<uint32_t, kGather>},
                                 Rung{true, copy_units<uint16_t, kGather>}});
    copy(from, rows, to, R, bytes, stream);
  });
}

}  // namespace
}  // namespace gpu

int pack_tokens_cuda(const PackTokensParams& p) {
  if (p.R == 0) return int(cudaSuccess);
  return gpu::copy_rows<true>(p.dtype, p.x, p.rows, p.packed, p.R, p.C, p.stream);
}

int unpack_tokens_cuda(const UnpackTokensParams& p) {
  if (p.BL == 0) return int(cudaSuccess);
  const auto bytes = size_t(p.BL * p.C * element_bytes(p.dtype));
  const cudaError_t state = cudaMemsetAsync(p.x, 0, bytes, static_cast<cudaStream_t>(p.stream));
  if (state != cudaSuccess || p.R == 0) return int(state);
  return gpu::copy_rows<false>(p.dtype, p.packed, p.rows, p.x, p.R, p.C, p.stream);
}

}  // namespace lens
