// pack_tokens: packed[r] = x[rows[r]]; unpack_tokens: x[rows[r]] = packed[r] and zero elsewhere
//
// x [B L, C], rows int64 [R] -> packed [R, C], and back. A copy of bytes: units of 16, 8, 4 or 2
// bytes, the widest that divides a row and both addresses. pack moves 2 R C elements, unpack
// (B L + 2 R) C. Bound by memory. `lanes` neighbouring threads, a power of two, copy one row.
#pragma once

#include "cuda/launch.cuh"

namespace lens::gpu {

constexpr int kCopyThreads = 128;

// registers <= 32: copy_rows_kernel
template <class Unit, bool kGather>
__global__ void __launch_bounds__(kCopyThreads)
    copy_rows_kernel(const Unit* from, const int64_t* rows, Unit* to, int64_t R, int64_t units,
                     int lanes) {
  const int64_t row = int64_t(blockIdx.x) * (kCopyThreads / lanes) + int(threadIdx.x) / lanes;
  if (row >= R) return;
  const int64_t other = rows[row];
  from += (kGather ? other : row) * units;
  to += (kGather ? row : other) * units;
  for (int64_t i = int(threadIdx.x) % lanes; i < units; i += lanes) to[i] = from[i];
}

}  // namespace lens::gpu
