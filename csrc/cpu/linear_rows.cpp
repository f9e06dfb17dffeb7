// y = x W^T + bias in BF16 by AMX, for rows that come by the hundred: a row's bits depend on that
// row alone, whatever lies beside it and however many threads there are.
//
// Weights are the left operand, 32 outputs a panel; rows of x are the right one, packed once for
// all panels, 16 rows a block, three blocks a product: six tiles of sums. A thread takes a few
// panels, lays them out as tiles, and multiplies them with all rows, so that a group of rows is
// read from beyond the second cache once for them all.
#if defined(__AMX_BF16__)
#include <omp.h>

#include <algorithm>

#include "cpu/amx_tiles.h"
#include "cpu/rows.h"
#include "cpu/transpose.h"

namespace lens::LENS_ISA {
namespace {

using tiles::kMostBlocks;
using tiles::kMostRows;
constexpr int kBlock = tiles::kRows, kPanel = tiles::kOutputs;
static_assert(kPanel == kLinearPanel);
constexpr int kStep = 32;  // inputs of a product of tiles
constexpr int64_t kTile = tiles::kTile;
constexpr int64_t kChunk = 8;  // steps whose weights are laid out at a time

// ---- layouts
// `count` rows of x, of K values: [steps][pair of inputs][row]; absent rows and inputs are zero.
void pack_rows(const Bf16* x, int count, int64_t K, int64_t steps, uint32_t* block) {
  for (int64_t k = 0; k < steps * kStep; k += 8) {
    const int64_t left = K - k;
    const __mmask8 there = left >= 8 ? 0xff : left <= 0 ? 0 : __mmask8((1u << left) - 1);
    __m512i columns[4];
    transpose(
        [&](int r) LENS_LAMBDA {
          return r < count ? _mm_maskz_loadu_epi16(there, x + r * K + k) : _mm_setzero_si128();
        },
        columns);
    uint32_t* to = block + k / kStep * kTile + k % kStep / 2 * kBlock;
    for (int i = 0; i < 4; ++i) _mm512_storeu_si512(to + i * kBlock, columns[i]);
  }
}

// Weights of `count` outputs: [steps][2 tiles][output][32 inputs].
void pack_panel(const Bf16* w, int64_t count, int64_t K, int64_t steps, Bf16* panel) {
  for (int64_t first = 0; first < steps; first += kChunk) {
    const int64_t stop = std::min(first + kChunk, steps);
    for (int64_t n = 0; n < kPanel; ++n) {
      Bf16* to = panel + n / 16 * 512 + n % 16 * kStep;
      for (int64_t s = first; s < stop; ++s) {
        const int64_t left = n < count ? K - s * kStep : 0;
        __m512i values = _mm512_setzero_si512();
        if (left >= kStep) {
          values = _mm512_loadu_si512(w + n * K + s * kStep);
        } else if (left > 0) {
          values = _mm512_maskz_loadu_epi16(__mmask32((1u << left) - 1), w + n * K + s * kStep);
        }
        _mm512_storeu_si512(to + s * 1024, values);
      }
    }
  }
}

// ---- products
// sums[output][row], kMostRows apart, of a panel and M blocks of rows, `block` dwords apart.
template <int M>
void product(const Bf16* panel, const uint32_t* rows, int64_t block, int64_t steps, float* sums) {
  tiles::clear_sums();
  tiles::fence();
  for (int64_t s = 0; s < steps; ++s) {
    const Bf16* weights = panel + s * 1024;
    tiles::multiply<M>(reinterpret_cast<const uint32_t*>(weights), rows + s * kTile, block);
  }
  tiles::store_sums<M>(sums);
}

// y[row][output] = sums + bias, of `rows` rows and `outputs` outputs.
void finish(const float* sums, int rows, const Bf16* bias, int64_t outputs, Bf16* y, int64_t N) {
  for (int64_t half = 0; half < outputs; half += 16) {
    const int64_t count = std::min<int64_t>(16, outputs - half);
    const __mmask16 there = __mmask16((1u << count) - 1);
    const __m512 added =
        bias == nullptr
            ? _mm512_setzero_ps()
            : _mm512_castsi512_ps(_mm512_slli_epi32(
                  _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, bias + half)), 16));
    for (int m = 0; m < rows; m += 4) {
      __m512i x[4];
      transpose(
          [&](int r) LENS_LAMBDA {
            return _mm_loadu_si128(
                reinterpret_cast<const __m128i*>(sums + (half + r) * kMostRows + m));
          },
          x);
      for (int r = 0; r < 4 && m + r < rows; ++r) {
        const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_castsi512_ps(x[r]) + added);
        __m256i bits;
        std::memcpy(&bits, &rounded, sizeof bits);
        _mm256_mask_storeu_epi16(y + (m + r) * N + half, there, bits);
      }
    }
  }
}

}  // namespace

void linear_rows(const LinearRowsParams& p) {
  if (p.R == 0) return;
  const Bf16* x = static_cast<const Bf16*>(p.x);
  const Bf16* weight = static_cast<const Bf16*>(p.weight);
  const Bf16* bias = static_cast<const Bf16*>(p.bias);
  Bf16* y = static_cast<Bf16*>(p.y);
  uint32_t* packed = static_cast<uint32_t*>(p.packed);
  const int64_t steps = (p.K + kStep - 1) / kStep, block = steps * kTile;
  const int64_t blocks = (p.R + kBlock - 1) / kBlock;
  const int64_t groups = (blocks + kMostBlocks - 1) / kMostBlocks;
  const int64_t outputs = p.P * kPanel, tasks = (p.N + outputs - 1) / outputs;
  const int threads = int(std::min<int64_t>(p.W, omp_get_max_threads()));

#pragma omp parallel num_threads(threads) if (p.R * p.N * p.K > 64 * kParallelElements)
  {
    alignas(64) float sums[kPanel * kMostRows];
    Bf16* panels = static_cast<Bf16*>(p.panels) + omp_get_thread_num() * outputs * steps * kStep;
    const tiles::Thread own_tiles;
    (void)own_tiles;
#pragma omp for
    for (int64_t b = 0; b < blocks; ++b) {
      pack_rows(x + b * kBlock * p.K, int(std::min<int64_t>(kBlock, p.R - b * kBlock)), p.K, steps,
                packed + b * block);
    }
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t first = task * outputs, stop = std::min(first + outputs, p.N);
      const int64_t own = (stop - first + kPanel - 1) / kPanel;
      for (int64_t i = 0; i < own; ++i) {
        const int64_t n = first + i * kPanel;
        pack_panel(weight + n * p.K, std::min<int64_t>(kPanel, stop - n), p.K, steps,
                   panels + i * kPanel * steps * kStep);
      }
      for (int64_t g = 0; g < groups; ++g) {  // as even as can be
        const int64_t begin = blocks * g / groups, end = blocks * (g + 1) / groups;
        const int rows = int(std::min(end * kBlock, p.R) - begin * kBlock);
        const auto multiply = end - begin == 3   ? product<3>
                              : end - begin == 2 ? product<2>
                                                 : product<1>;
        for (int64_t i = 0; i < own; ++i) {
          const int64_t n = first + i * kPanel;
          multiply(panels + i * kPanel * steps * kStep, packed + begin * block, block, steps, sums);
          finish(sums, rows, bias == nullptr ? nullptr : bias + n,
                 std::min<int64_t>(kPanel, stop - n), y + begin * kBlock * p.N + n, p.N);
        }
      }
    }
  }
}

}  // namespace lens::LENS_ISA
#endif
