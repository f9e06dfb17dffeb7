// Products of MXFP4 weights by AMX, which multiplies tiles of 16 by 32 BF16 so fast that what feeds
// it decides: nothing is moved twice.
//
// Weights are the left operand: 64 packed bytes of an output, 128 weights in order, become by four
// shifts and lookups four rows of tiles, with no exchange between outputs. Step j of a chunk of 128
// inputs thus takes the inputs 4 w + j, w = 0 to 31, by pairs 8 p + j and 8 p + 4 + j. Rows of x
// are the right operand, packed in this order once for all weights, 16 rows a block; sums come out
// with the rows in a register, in the order that the next product wants them.
//
// Scaling sums would cost more than the products: the scales join the exponents of the decoded
// weights, where all of a tile's leave them well inside the range of BF16 (`ordinary`).
#pragma once

#if defined(__AMX_BF16__)
#include <algorithm>
#include <cstring>

#include "cpu/amx_tiles.h"
#include "cpu/transpose.h"
#include "params.h"

namespace lens::LENS_ISA::tiles {

static_assert(kRows == kBlockRows);
constexpr int kChunk = 128, kSteps = 4;       // inputs, in steps of 32
constexpr int kDecoded = kSteps * 2 * kTile;  // dwords of a chunk of weights, 8 KiB
constexpr int kPacked = kSteps * kTile;       // dwords of a chunk of a block of rows

inline int64_t chunks_of(int64_t inputs) { return (inputs + kChunk - 1) / kChunk; }
inline int64_t blocks_of(int64_t rows) { return (rows + kRows - 1) / kRows; }

// Where the pair of inputs i and i + 4 begins in a packed block, of i % 8 < 4.
inline int64_t place_of(int64_t i) {
  return i / kChunk * kPacked + i % 4 * kTile + i % kChunk / 8 * kRows;
}

// ---- rows of x
// Rows `of` (absent ones are zero), `inputs` each, as a block.
template <class Of>
void pack(Of of, int count, int64_t inputs, uint32_t* block) {
  const __m128i order = _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
  for (int64_t i = 0; i < chunks_of(inputs) * kChunk; i += 8) {
    __m512i x[4] = {};
    if (i < inputs) {
      transpose(
          [&](int r) LENS_LAMBDA {
            if (r >= count) return _mm_setzero_si128();
            return _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(of(r) + i)),
                                    order);
          },
          x);
    }
    for (int j = 0; j < kSteps; ++j) _mm512_storeu_si512(block + place_of(i + j), x[j]);
  }
}

// Inputs i (low) and i + 4 of a block's rows at their place.
LENS_INLINE void store_pairs(const Bf16* low, const Bf16* high, uint32_t* to) {
  const auto wide = [](const Bf16* half) LENS_LAMBDA {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(half)));
  };
  _mm512_storeu_si512(to, _mm512_or_si512(wide(low), _mm512_slli_epi32(wide(high), 16)));
}

// Zeros for the inputs that the last chunk lacks.
inline void clear_rest(int64_t inputs, uint32_t* block) {
  for (int64_t i = inputs; i < chunks_of(inputs) * kChunk; i += 8) {
    for (int j = 0; j < kSteps; ++j)
      _mm512_storeu_si512(block + place_of(i + j), _mm512_setzero_si512());
  }
}

// The inverse: `inputs` of row `r`, pair by pair of the inputs i and i + 4.
inline void unpack(const uint32_t* block, int r, int64_t inputs, uint32_t* pairs) {
  for (int64_t i = 0; i < inputs; i += 8) {
    for (int j = 0; j < kSteps; ++j) *pairs++ = block[place_of(i + j) + r];
  }
}

// ---- weights
// Whether 2^(scale - 127) times every E2M1 value, and what comes of it, stays a normal number.
inline bool ordinary(const uint8_t* scales, int64_t count) {
  uint8_t low = 255, high = 0;
  for (int64_t i = 0; i < count; ++i) {
    low = std::min(low, scales[i]);
    high = std::max(high, scales[i]);
  }
  return low >= 64 && high <= 190;
}

// Values are looked up times 2^kAbove, and what an exponent has too much is taken off. The
// subtraction ends at 0, which zero thus stays; -0 is looked up as 0.
constexpr int kAbove = 63;

struct Weights {
  const uint8_t* blocks;  // kOutputs outputs
  const uint8_t* scales;
  int64_t groups;       // of 32 inputs
  const uint8_t* next;  // what will be wanted then
};

// Eight outputs from `first` on in chunk c.
template <bool Whole>
LENS_INLINE void decode(const Weights& w, int64_t c, int first, __m512i values, uint32_t* decoded) {
  const __m512i group = _mm512_inserti64x4(
      _mm512_castsi256_si512(
          _mm256_setr_m128i(_mm_set1_epi16(int16_t(0xff00)), _mm_set1_epi16(int16_t(0xff01)))),
      _mm256_setr_m128i(_mm_set1_epi16(int16_t(0xff02)), _mm_set1_epi16(int16_t(0xff03))), 1);
  const int64_t left = w.groups - 4 * c;
#pragma GCC unroll 8
  for (int n = first; n < first + 8; ++n) {
    const uint8_t* from = w.blocks + (n * w.groups + 4 * c) * kMxGroupBytes;
    const uint8_t* scale = w.scales + n * w.groups + 4 * c;
    __m512i packed;
    uint32_t four = 0;
    if constexpr (Whole) {
      packed = _mm512_loadu_si512(from);
      std::memcpy(&four, scale, 4);
    } else {
      packed = _mm512_maskz_loadu_epi32(__mmask16((1u << 4 * left) - 1), from);
      for (int64_t g = 0; g < left; ++g) four |= uint32_t(scale[g]) << 8 * g;
    }
    _mm_prefetch(reinterpret_cast<const char*>(w.next) + (c * kOutputs + n) * 64, _MM_HINT_T1);
    const __m512i exponent = _mm512_shuffle_epi8(_mm512_set1_epi32(int32_t(four)), group);
    const __m512i excess =
        _mm512_slli_epi16(_mm512_sub_epi16(_mm512_set1_epi16(127 + kAbove), exponent), 7);
    uint32_t* to = decoded + n / 16 * kTile + n % 16 * 16;
#pragma GCC unroll 4
    for (int j = 0; j < kSteps; ++j) {  // an index has five bits, the fifth is not the value's
      const __m512i index = j == 0 ? packed : _mm512_srli_epi16(packed, 4 * j);
      const __m512i value = _mm512_permutexvar_epi16(index, values);
      _mm512_store_si512(to + j * 2 * kTile, _mm512_subs_epu16(value, excess));
    }
  }
}

// ---- products
// sums[output][row] of kOutputs outputs and M blocks of rows, kMostRows apart. Weights are decoded
// a chunk ahead of their products into `decoded`, two chunks by turns, or all of them where `kept`;
// `there`: a product before has left them all.
template <int M>
void product(const Weights& w, const uint32_t* rows, uint32_t* decoded, bool kept, bool there,
             __m512i values, float* sums) {
  const int64_t chunks = chunks_of(w.groups * kMxGroup), block = chunks * kPacked;
  const auto place = [&](int64_t c) { return decoded + (kept ? c : c % 2) * kDecoded; };
  clear_sums();
  for (int64_t c = there ? 1 : 0; c <= chunks; ++c) {
#pragma GCC unroll 4
    for (int j = 0; j < kSteps; ++j) {
      fence();
      if (c > 0)
        multiply<M>(place(c - 1) + j * 2 * kTile, rows + (c - 1) * kPacked + j * kTile, block);
      if (there || c == chunks) continue;
      if (4 * c + 4 <= w.groups) {
        decode<true>(w, c, 8 * j, values, place(c));
      } else {
        decode<false>(w, c, 8 * j, values, place(c));
      }
    }
  }
  store_sums<M>(sums);
}

}  // namespace lens::LENS_ISA::tiles
#endif
