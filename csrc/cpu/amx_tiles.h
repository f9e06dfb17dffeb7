// What the AMX kernels share: a thread's tiles, and six of them that hold the sums of 32 outputs
// and up to 48 rows.
#pragma once

#if defined(__AMX_BF16__)
#include <immintrin.h>

#include <atomic>
#include <cstdint>

#include "cpu/simd.h"

namespace lens::LENS_ISA::tiles {

constexpr int kRows = 16;                       // of x in a block
constexpr int kOutputs = 32;                    // of a product: two tiles
constexpr int kMostBlocks = 3;                  // of a product: six of the eight tiles hold sums
constexpr int kMostRows = kRows * kMostBlocks;  // sums of an output lie so far apart
constexpr int kTile = 16 * 16;                  // dwords

// The tiles of a thread, all of 16 rows of 64 bytes, for as long as it lives.
struct Thread {
  Thread() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } const config;
    _tile_loadconfig(&config);
  }
  ~Thread() { _tile_release(); }
};

// The intrinsics name no memory that they read or write.
LENS_INLINE void fence() { std::atomic_signal_fence(std::memory_order_seq_cst); }

LENS_INLINE void clear_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
}

// One step of 32 inputs: two tiles of weights, one after the other, and M blocks of rows.
template <int M>
LENS_INLINE void multiply(const uint32_t* weights, const uint32_t* rows, int64_t block) {
  _tile_loadd(6, weights, 64);
  _tile_loadd(7, rows, 64);
  _tile_dpbf16ps(0, 6, 7);
  if constexpr (M > 1) {
    _tile_loadd(7, rows + block, 64);
    _tile_dpbf16ps(1, 6, 7);
  }
  if constexpr (M > 2) {
    _tile_loadd(7, rows + 2 * block, 64);
    _tile_dpbf16ps(2, 6, 7);
  }
  _tile_loadd(6, weights + kTile, 64);
  if constexpr (M > 2) {
    _tile_dpbf16ps(5, 6, 7);
    _tile_loadd(7, rows + block, 64);
  }
  if constexpr (M > 1) {
    _tile_dpbf16ps(4, 6, 7);
    _tile_loadd(7, rows, 64);
  }
  _tile_dpbf16ps(3, 6, 7);
}

// sums[output][row], kMostRows apart.
template <int M>
LENS_INLINE void store_sums(float* sums) {
  constexpr int64_t stride = kMostRows * int64_t(sizeof(float));
  _tile_stored(0, sums, stride);
  _tile_stored(3, sums + 16 * kMostRows, stride);
  if constexpr (M > 1) {
    _tile_stored(1, sums + 16, stride);
    _tile_stored(4, sums + 16 * kMostRows + 16, stride);
  }
  if constexpr (M > 2) {
    _tile_stored(2, sums + 32, stride);
    _tile_stored(5, sums + 16 * kMostRows + 32, stride);
  }
  fence();
}

}  // namespace lens::LENS_ISA::tiles
#endif
