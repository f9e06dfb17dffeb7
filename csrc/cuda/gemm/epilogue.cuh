// What the epilogues share: a thread holds 8 neighbouring columns of each 32 (Fragment), a 16-byte
// chunk of whatever is added to them, multiplied with them or stored.
#pragma once

#include "cuda/gemm/gemm.cuh"
#include "cuda/row.cuh"

namespace lens::gpu {

using Chunk = Values<Bf16>;

// The accumulators of chunk g of row half h.
template <int kSize>
__device__ __forceinline__ Chunk accumulated(const float (&d)[kSize], int g, int h) {
  Chunk c;
#pragma unroll
  for (int i = 0; i < 8; ++i) c.e[i] = d[16 * g + 4 * (i / 2) + 2 * h + i % 2];
  return c;
}

__device__ __forceinline__ uint4 load_chunk(const Bf16* from) {
  return *reinterpret_cast<const uint4*>(from);
}
// Eight bf16 that no thread writes during the launch: these loads may rise above stores.
__device__ __forceinline__ Chunk load_constants(const Bf16* from) {
  return widened<Bf16>(__ldg(reinterpret_cast<const uint4*>(from)));
}
__device__ __forceinline__ void store_chunk(const Chunk& c, Bf16* to) {
  *reinterpret_cast<uint4*>(to) = pack(static_cast<Bf16*>(nullptr), c.e);
}

// Whether rows of `width` elements may be moved in 16-byte chunks; arrays may be null.
inline bool whole_chunks(int64_t width, std::initializer_list<const void*> arrays) {
  bool fit = width % 8 == 0;
  for (const void* array : arrays) fit &= reinterpret_cast<uintptr_t>(array) % 16 == 0;
  return fit;
}

}  // namespace lens::gpu
