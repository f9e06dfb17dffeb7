// Descriptors of bf16 matrices in shared memory, as wgmma reads them and TMA writes them: rows of
// 128 bytes, 16-byte chunk c of row r stored at chunk c ^ (r % 8), eight rows make an atom of 1024
// bytes, every matrix starts on an atom. Bits (PTX ISA, "matrix descriptor"): 0-13 start / 16,
// 16-29 leading offset / 16, 32-45 stride offset / 16, 62-63 swizzle (1: 128 bytes).
//
//   Major::kK   the inner dimension, K, lies along the rows: A [M, 64], B [N, 64] per tile of
//               TMA. The next 16 of K are 32 bytes further: matrix_k(tile) + kStepK per step.
//   Major::kMN  B [K, 64 columns] as it lies, V of attention: the next 16 of K are 16 rows further,
//               matrix_mn(tile) + kStepMN per step. Columns 64 .. follow `block` bytes after.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace lens::gpu {

enum class Major : int { kK = 0, kMN = 1 };

constexpr int kAtomBytes = 1024;
constexpr uint64_t kStepK = 32 >> 4, kStepMN = (16 * 128) >> 4;

__device__ __forceinline__ uint32_t shared_address(const void* p);

__device__ __forceinline__ uint64_t matrix_bits(const void* tile, uint32_t leading,
                                                uint32_t stride) {
  return uint64_t((shared_address(tile) & 0x3ffffu) >> 4) | uint64_t(leading >> 4) << 16 |
         uint64_t(stride >> 4) << 32 | uint64_t(1) << 62;
}
// leading: not used by the hardware for this layout, 1 by convention
__device__ __forceinline__ uint64_t matrix_k(const void* tile) {
  return matrix_bits(tile, 16, kAtomBytes);
}
__device__ __forceinline__ uint64_t matrix_mn(const void* tile, uint32_t block = 0) {
  return matrix_bits(tile, block, kAtomBytes);
}

}  // namespace lens::gpu
