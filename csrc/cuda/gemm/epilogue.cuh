// What the epilogues share: accumulators of a warp <-> 16-byte chunks of rows.
//
// A quad of lanes holds 32 columns of a row as four pairs of each lane, 8 columns apart; memory
// wants 8 neighbouring columns per lane. Transposing the quad's 4 x 4 words of two bf16 gives one
// from the other: 4 shuffles for 64 bytes of a row.
#pragma once

#include "cuda/gemm/gemm.cuh"
#include "cuda/row.cuh"

namespace lens::gpu {

// Word j of lane q and word q of lane j change places, within each quad. All 32 lanes call it.
__device__ __forceinline__ void transpose_quad(uint32_t (&w)[4], int quad) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool upper = quad & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const uint32_t got = __shfl_xor_sync(kFullWarp, upper ? w[i] : w[i | bit], bit);
      (upper ? w[i] : w[i | bit]) = got;
    }
  }
}

struct Pair {
  float e[2];
};
__device__ __forceinline__ Pair unpack_pair(uint32_t word) {
  return {{bits_to_float(word << 16), bits_to_float(word & 0xffff0000u)}};
}
// Two neighbouring bf16, `index` even; zero where there is no array.
__device__ __forceinline__ Pair load_pair(const void* array, int64_t index) {
  if (array == nullptr) return {{0.0f, 0.0f}};
  return unpack_pair(
      __ldg(reinterpret_cast<const unsigned int*>(static_cast<const Bf16*>(array) + index)));
}

// Chunk `quad` of the 32 columns that begin at `column`, zero below the last row.
__device__ __forceinline__ void load_words(uint32_t (&w)[4], const void* array, int64_t row,
                                           int64_t width, int column, int quad, bool inside) {
  uint4 raw = make_uint4(0, 0, 0, 0);
  if (inside) {
    raw = *reinterpret_cast<const uint4*>(static_cast<const Bf16*>(array) + row * width + column +
                                          8 * quad);
  }
  w[0] = raw.x, w[1] = raw.y, w[2] = raw.z, w[3] = raw.w;
}
__device__ __forceinline__ void store_words(const uint32_t (&w)[4], void* array, int64_t row,
                                            int64_t width, int column, int quad, bool inside) {
  if (!inside) return;
  *reinterpret_cast<uint4*>(static_cast<Bf16*>(array) + row * width + column + 8 * quad) =
      make_uint4(w[0], w[1], w[2], w[3]);
}

// Whether rows of `width` elements may be moved in 16-byte chunks; arrays may be null.
inline bool whole_chunks(int64_t width, std::initializer_list<const void*> arrays) {
  bool fit = width % 8 == 0;
  for (const void* array : arrays) fit &= reinterpret_cast<uintptr_t>(array) % 16 == 0;
  return fit;
}
// Whether a bf16 array with rows `stride` apart may be read in pairs.
inline bool whole_pairs(const void* array, int64_t stride) {
  return reinterpret_cast<uintptr_t>(array) % 4 == 0 && stride % 2 == 0;
}

}  // namespace lens::gpu
