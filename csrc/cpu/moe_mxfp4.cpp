// y = sum over a row's experts of share_k (clamped_swiglu(x W1^T + b1) W2^T + b2), the weights
// packed in MXFP4.
//
// Rows are sorted by expert, so that a weight is decoded once for all rows that want it: a tile of
// kColumns outputs by one group of 32 inputs at a time, transposed, in the first cache, where
// blocks of kRows rows multiply it from registers. A group's sum is taken over the bare E2M1 values
// and joins the total times its scale, which is exact at any scale and costs one addition in 32.
// For few rows memory bounds it, 17 bytes for 32 weights; for many the products do.
//
// AMX multiplies blocks of 16 by 16 so fast that scaling their sums would cost more than the
// products: there the scales join the exponents of the decoded weights, in tiles whose scales leave
// all of them well inside the range of BF16, and tiles with others take the other way.
//
// An output adds its inputs in order, group by group, whichever rows and threads share the work, so
// its bits depend on its own row alone.
#include <algorithm>
#include <atomic>
#include <limits>
#include <numeric>
#include <vector>

#include "cpu/rows.h"

// gcc 12 says so of its own header, which begins some intrinsics from an undefined register
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace lens::LENS_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectors = 4, kRows = 6;  // 24 sums, 4 weights and an input in 32 registers
#else
constexpr int kVectors = 2, kRows = 6;  // 12, 2 and 1 in 16
#endif
#if defined(__AVX512BF16__)
constexpr bool kPairs = true;
#else
constexpr bool kPairs = false;
#endif
constexpr int64_t kRowBlock = 96;     // rows whose sums lie in the first cache beside a tile
constexpr int64_t kScaleGroups = 16;  // groups whose scales are widened at a time

template <class A>
constexpr int kColumns = kVectors * Simd<A>::kLanes;

// What products are made of: arithmetic values, or pairs of BF16 of which an instruction adds both
// products to a float.
template <class A>
struct Values {
  using Sum = A;
  using Input = A;                         // of a row
  using Weight = A;                        // of a tile
  static constexpr int kSteps = kMxGroup;  // products of a group
};
struct Pairs {
  using Sum = float;
  using Input = Bf16;
  using Weight = uint32_t;
  static constexpr int kSteps = kMxGroup / 2;
};

// ---- decoding
constexpr float kE2m1[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                             -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

LENS_INLINE float power(uint8_t scale) {
  if (scale == 255) return std::numeric_limits<float>::quiet_NaN();
  return bits_to_float(scale == 0 ? 0x00400000u : uint32_t(scale) << 23);
}

#if defined(__AVX512F__)
// 16 rows of 16 bytes, `stride` apart, of which those from `count` on repeat the last one:
// x[t] has in dword r the bytes 4 t to 4 t + 3 of row r.
LENS_INLINE void transpose(const uint8_t* rows, int64_t stride, int count, __m512i x[4]) {
  const auto row = [&](int r) LENS_LAMBDA {
    return _mm_loadu_si128(
        reinterpret_cast<const __m128i*>(rows + (r < count ? r : count - 1) * stride));
  };
  __m512i quarter[4];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    __m512i q = _mm512_castsi128_si512(row(r));
    q = _mm512_inserti32x4(q, row(4 + r), 1);
    q = _mm512_inserti32x4(q, row(8 + r), 2);
    quarter[r] = _mm512_inserti32x4(q, row(12 + r), 3);
  }
  const __m512i low01 = _mm512_unpacklo_epi32(quarter[0], quarter[1]);
  const __m512i high01 = _mm512_unpackhi_epi32(quarter[0], quarter[1]);
  const __m512i low23 = _mm512_unpacklo_epi32(quarter[2], quarter[3]);
  const __m512i high23 = _mm512_unpackhi_epi32(quarter[2], quarter[3]);
  x[0] = _mm512_unpacklo_epi64(low01, low23);
  x[1] = _mm512_unpackhi_epi64(low01, low23);
  x[2] = _mm512_unpacklo_epi64(high01, high23);
  x[3] = _mm512_unpackhi_epi64(high01, high23);
}
#endif

// One group of `count` rows, 16 bytes each `stride` apart: tile[step][column].
template <class A>
LENS_INLINE void decode(const uint8_t* rows, int64_t stride, int count, A* tile, Values<A>) {
  constexpr int C = kColumns<A>;
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) {
    const __m512 values = _mm512_loadu_ps(kE2m1);
    for (int v = 0; v < C && v < count; v += 16) {
      __m512i x[4];
      transpose(rows + v * stride, stride, count - v, x);
#pragma GCC unroll 32
      for (int k = 0; k < kMxGroup; ++k) {  // an index has four bits
        const __m512i index = _mm512_srli_epi32(x[k / 8], 4 * (k % 8));
        _mm512_store_ps(tile + k * C + v, _mm512_permutexvar_ps(index, values));
      }
    }
    return;
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4) {
    const __m256 values = _mm256_loadu_ps(kE2m1);
    for (int v = 0; v < C && v < count; v += 8) {
      int32_t start[8];
      for (int r = 0; r < 8; ++r) start[r] = int32_t((v + r < count ? v + r : count - 1) * stride);
      const __m256i starts = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(start));
      for (int t = 0; t < 4; ++t) {
        __m256i eight =
            _mm256_i32gather_epi32(reinterpret_cast<const int*>(rows + 4 * t), starts, 1);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
          const __m256i sign =
              _mm256_and_si256(_mm256_slli_epi32(eight, 28), _mm256_set1_epi32(INT32_MIN));
          const __m256 value = _mm256_permutevar8x32_ps(values, eight);
          _mm256_store_ps(tile + (8 * t + i) * C + v,
                          _mm256_xor_ps(value, _mm256_castsi256_ps(sign)));
          eight = _mm256_srli_epi32(eight, 4);
        }
      }
    }
    return;
  }
#endif
  for (int n = 0; n < count; ++n) {
    for (int j = 0; j < kMxGroupBytes; ++j) {
      const uint8_t byte = rows[n * stride + j];
      tile[2 * j * C + n] = kE2m1[byte & 15];
      tile[(2 * j + 1) * C + n] = kE2m1[byte >> 4];
    }
  }
}

#if defined(__AVX512BF16__)
// The E2M1 values in BF16, twice: an index has five bits, the fifth of which is not the value's.
LENS_INLINE __m512i bf16_values() {
  const __m256i once =
      _mm256_setr_epi16(0, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0, int16_t(0x8000),
                        int16_t(0xbf00), int16_t(0xbf80), int16_t(0xbfc0), int16_t(0xc000),
                        int16_t(0xc040), int16_t(0xc080), int16_t(0xc0c0));
  return _mm512_broadcast_i64x4(once);
}

// Pairs are of the inputs i and i + 4 of eight: eight values fill a dword, so that shifting it
// brings both into their places. Inputs are put into this order (reordered).
LENS_INLINE void decode(const uint8_t* rows, int64_t stride, int count, uint32_t* tile, Pairs) {
  constexpr int C = kColumns<float>;
  const __m512i values = bf16_values();
  for (int v = 0; v < C && v < count; v += 16) {
    __m512i x[4];
    transpose(rows + v * stride, stride, count - v, x);
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) {
      const __m512i index = _mm512_srli_epi16(x[j / 4], 4 * (j % 4));
      _mm512_store_si512(tile + j * C + v, _mm512_permutexvar_epi16(index, values));
    }
  }
}

// Eight inputs in the order of pairs: 0 4 1 5 2 6 3 7.
LENS_INLINE void reordered(const Bf16* from, Bf16* to) {
  const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm_unpacklo_epi16(eight, _mm_unpackhi_epi64(eight, eight)));
}
#endif

// The scales of up to kScaleGroups groups: scale[group][column].
template <class A>
LENS_INLINE void widen_scales(const uint8_t* rows, int64_t stride, int count, int64_t groups,
                              A* scale) {
  constexpr int C = kColumns<A>;
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) {
    if (groups >= kScaleGroups) {  // else a row's 16 bytes reach beyond its end
      for (int v = 0; v < C && v < count; v += 16) {
        __m512i x[4];
        transpose(rows + v * stride, stride, count - v, x);
#pragma GCC unroll 16
        for (int j = 0; j < 16; ++j) {
          const __m512i byte =
              _mm512_and_si512(_mm512_srli_epi32(x[j / 4], 8 * (j % 4)), _mm512_set1_epi32(255));
          __m512i bits = _mm512_slli_epi32(byte, 23);
          bits = _mm512_mask_mov_epi32(bits, _mm512_testn_epi32_mask(byte, byte),
                                       _mm512_set1_epi32(0x00400000));
          bits = _mm512_mask_mov_epi32(bits, _mm512_cmpeq_epi32_mask(byte, _mm512_set1_epi32(255)),
                                       _mm512_set1_epi32(0x7fc00000));
          _mm512_store_si512(scale + j * C + v, bits);
        }
      }
      return;
    }
  }
#endif
  for (int n = 0; n < count; ++n) {
    for (int64_t g = 0; g < groups && g < kScaleGroups; ++g)
      scale[g * C + n] = power(rows[n * stride + g]);
  }
}

// ---- products
template <class A>
LENS_INLINE Simd<A> step(Simd<A> sum, Simd<A> weight, Simd<A> input) {
  return mul_add(input, weight, sum);
}
template <class A>
LENS_INLINE Simd<A> input_at(const A* row, int step) {
  return Simd<A>(row[step]);
}
template <class A>
LENS_INLINE Simd<A> weight_at(const A* tile) {
  return load(tile, All{});
}

#if defined(__AVX512BF16__)
struct PairVector {
  __m512i v;
};
LENS_INLINE Simd<float> step(Simd<float> sum, PairVector weight, PairVector input) {
  return Simd<float>(_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(input.v),
                                      reinterpret_cast<__m512bh>(weight.v)));
}
LENS_INLINE PairVector input_at(const Bf16* row, int step) {
  int32_t pair;
  std::memcpy(&pair, row + 2 * step, sizeof pair);
  return {_mm512_set1_epi32(pair)};
}
LENS_INLINE PairVector weight_at(const uint32_t* tile) { return {_mm512_load_si512(tile)}; }
#endif

// sums[m][column] += scale[column] * sum over the group of input[m][first + i] * tile[i][column]
template <class Form, int M>
LENS_INLINE void multiply(const typename Form::Input* const* inputs, int64_t first,
                          const typename Form::Weight* tile, const typename Form::Sum* scale,
                          typename Form::Sum* sums) {
  using A = typename Form::Sum;
  constexpr int C = kColumns<A>, L = Simd<A>::kLanes;
  Simd<A> sum[M][kVectors];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[m][v] = Simd<A>(0);
  }
#pragma GCC unroll 4
  for (int i = 0; i < Form::kSteps; ++i) {
    decltype(weight_at(tile)) weight[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) weight[v] = weight_at(tile + i * C + v * L);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const auto input = input_at(inputs[m] + first, i);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[m][v] = step(sum[m][v], weight[v], input);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      A* total = sums + m * C + v * L;
      store(total, mul_add(sum[m][v], load(scale + v * L, All{}), load(total, All{})), All{});
    }
  }
}

template <class Form>
void multiply_rows(int rows, const typename Form::Input* const* inputs, int64_t first,
                   const typename Form::Weight* tile, const typename Form::Sum* scale,
                   typename Form::Sum* sums) {
  switch (rows) {
    case 1:
      return multiply<Form, 1>(inputs, first, tile, scale, sums);
    case 2:
      return multiply<Form, 2>(inputs, first, tile, scale, sums);
    case 3:
      return multiply<Form, 3>(inputs, first, tile, scale, sums);
    case 4:
      return multiply<Form, 4>(inputs, first, tile, scale, sums);
    case 5:
      return multiply<Form, 5>(inputs, first, tile, scale, sums);
    default:
      return multiply<Form, kRows>(inputs, first, tile, scale, sums);
  }
}

#if defined(__AMX_BF16__)
// ---- products by AMX: 3 tiles of 16 rows by 2 of 16 outputs
constexpr int kAmxRows = 48, kAmxColumns = 32;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Whether 2^(scale - 127) times every E2M1 value, and what comes of it, stays a normal number.
LENS_INLINE bool ordinary(const uint8_t* scales, int64_t count) {
  uint8_t low = 255, high = 0;
  for (int64_t i = 0; i < count; ++i) {
    low = std::min(low, scales[i]);
    high = std::max(high, scales[i]);
  }
  return low >= 64 && high <= 190;
}

// Values are looked up times 2^kAbove, and what an exponent has too much is taken off, of both
// halves of a pair: less[group][column], of up to kScaleGroups groups. The subtraction ends at 0,
// which zero thus stays; -0 is looked up as 0.
constexpr int kAbove = 63;

LENS_INLINE void widen_exponents(const uint8_t* rows, int64_t stride, int count, int64_t groups,
                                 uint32_t* less) {
  if (groups >= kScaleGroups) {
    for (int v = 0; v < kAmxColumns && v < count; v += 16) {
      __m512i x[4];
      transpose(rows + v * stride, stride, count - v, x);
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j) {
        const __m512i byte =
            _mm512_and_si512(_mm512_srli_epi32(x[j / 4], 8 * (j % 4)), _mm512_set1_epi32(255));
        const __m512i half =
            _mm512_slli_epi32(_mm512_sub_epi32(_mm512_set1_epi32(127 + kAbove), byte), 7);
        _mm512_store_si512(less + j * kAmxColumns + v,
                           _mm512_or_si512(half, _mm512_slli_epi32(half, 16)));
      }
    }
    return;
  }
  for (int n = 0; n < count; ++n) {
    for (int64_t g = 0; g < groups; ++g) {
      const uint32_t half = uint32_t(127 + kAbove - int(rows[n * stride + g])) << 7;
      less[g * kAmxColumns + n] = half << 16 | half;
    }
  }
}

LENS_INLINE void decode_scaled(const uint8_t* rows, int64_t stride, int count, const uint32_t* less,
                               uint32_t* tile) {
  const __m512i plain = bf16_values();
  const __m512i values =
      _mm512_maskz_add_epi16(_mm512_test_epi16_mask(plain, _mm512_set1_epi16(0x7fff)), plain,
                             _mm512_set1_epi16(kAbove << 7));
  for (int v = 0; v < kAmxColumns && v < count; v += 16) {
    __m512i x[4];
    transpose(rows + v * stride, stride, count - v, x);
    const __m512i excess = _mm512_load_si512(less + v);
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) {
      const __m512i index = _mm512_srli_epi16(x[j / 4], 4 * (j % 4));
      _mm512_store_si512(tile + j * kAmxColumns + v,
                         _mm512_subs_epu16(_mm512_permutexvar_epi16(index, values), excess));
    }
  }
}

template <int M>
LENS_INLINE void amx_group(const Bf16* rows, int64_t bytes, const uint32_t* tile) {
  const char* a = reinterpret_cast<const char*>(rows);
  constexpr int kTileBytes = 4 * kAmxColumns;
  _tile_loadd(6, tile, kTileBytes);
  _tile_loadd(7, a, bytes);
  _tile_dpbf16ps(0, 7, 6);
  if constexpr (M > 1) {
    _tile_loadd(7, a + 16 * bytes, bytes);
    _tile_dpbf16ps(1, 7, 6);
  }
  if constexpr (M > 2) {
    _tile_loadd(7, a + 32 * bytes, bytes);
    _tile_dpbf16ps(2, 7, 6);
  }
  _tile_loadd(6, tile + 16, kTileBytes);
  if constexpr (M > 2) {
    _tile_dpbf16ps(5, 7, 6);
    _tile_loadd(7, a + 16 * bytes, bytes);
  }
  if constexpr (M > 1) {
    _tile_dpbf16ps(4, 7, 6);
    _tile_loadd(7, a, bytes);
  }
  _tile_dpbf16ps(3, 7, 6);
}

// sums[row][column] of 16 M rows, one after the other in memory, and `count` outputs, at most
// kAmxColumns. Reads past the last row; what comes of it is not used.
template <int M>
void amx_product(const Bf16* rows, int64_t K, const uint8_t* blocks, const uint8_t* scales,
                 int count, const uint8_t* next, float* sums, int64_t row_sums) {
  alignas(64) uint32_t tile[2][kMxGroup / 2 * kAmxColumns] = {};
  alignas(64) uint32_t less[kScaleGroups * kAmxColumns] = {};
  const int64_t groups = K / kMxGroup, bytes = count * kMxGroupBytes;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  for (int64_t g = 0; g <= groups; ++g) {  // a tile is read one round after it was written
    if (g < groups) {
      if (g % kScaleGroups == 0) widen_exponents(scales + g, groups, count, groups - g, less);
      decode_scaled(blocks + g * kMxGroupBytes, K / 2, count, less + g % kScaleGroups * kAmxColumns,
                    tile[g % 2]);
      for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(next + g * bytes + i, 0, 2);
    }
    std::atomic_signal_fence(std::memory_order_seq_cst);  // the intrinsics name no memory they read
    if (g > 0) amx_group<M>(rows + (g - 1) * kMxGroup, 2 * K, tile[(g - 1) % 2]);
  }
  const int64_t stride = row_sums * int64_t(sizeof(float));
  _tile_stored(0, sums, stride);
  _tile_stored(3, sums + 16, stride);
  if constexpr (M > 1) {
    _tile_stored(1, sums + 16 * row_sums, stride);
    _tile_stored(4, sums + 16 * row_sums + 16, stride);
  }
  if constexpr (M > 2) {
    _tile_stored(2, sums + 32 * row_sums, stride);
    _tile_stored(5, sums + 32 * row_sums + 16, stride);
  }
  std::atomic_signal_fence(std::memory_order_seq_cst);
}
#endif

// The rows of one expert: pairs [begin, end) of all (row, expert) pairs in the order of experts.
struct Chosen {
  int64_t expert, begin, end;
};

// The weights of all experts: N outputs of each, of K inputs.
struct Weights {
  const uint8_t* blocks;
  const uint8_t* scales;
  int64_t N, K;
};

// finish(expert, pair, first output, outputs, sums) once per pair and tile, over all chosen
// experts. inputs: of every pair; for AMX they follow one another, with kSpareRows after the last.
template <class Form, class Finish>
void products(const std::vector<Chosen>& chosen, const Weights& w,
              const std::vector<const typename Form::Input*>& inputs, Finish finish) {
  using A = typename Form::Sum;
  constexpr int C = kColumns<A>;
  const int64_t tiles = (w.N + C - 1) / C, tasks = tiles * int64_t(chosen.size());
  const int64_t groups = w.K / kMxGroup, stride = w.K / 2;
  const auto blocks_of = [&](int64_t task) {
    return w.blocks + (chosen[size_t(task / tiles)].expert * w.N + task % tiles * C) * stride;
  };
#pragma omp parallel if (tasks * C * w.K > kParallelElements)
  {
    alignas(64) typename Form::Weight tile[Form::kSteps * C] = {};
    alignas(64) A scale[kScaleGroups * C] = {};
    alignas(64) A sums[kRowBlock * C];
#if defined(__AMX_BF16__)
    const TileConfig config;
    _tile_loadconfig(&config);
#endif
#pragma omp for schedule(dynamic, 4)
    for (int64_t task = 0; task < tasks; ++task) {
      const Chosen& own = chosen[size_t(task / tiles)];
      const int64_t n = task % tiles * C;
      const int count = int(std::min<int64_t>(C, w.N - n));
      const uint8_t* blocks = blocks_of(task);
      const uint8_t* scales = w.scales + (own.expert * w.N + n) * groups;
      // a tile is one piece of memory read in `count` streams, more than hardware follows
      const uint8_t* next = blocks_of(std::min(task + 1, tasks - 1));
#if defined(__AMX_BF16__)
      if constexpr (std::is_same_v<Form, Pairs>) {
        if (ordinary(scales, count * groups)) {
          for (int64_t begin = own.begin; begin < own.end; begin += kAmxRows) {
            const int64_t rows = std::min<int64_t>(kAmxRows, own.end - begin);
            const auto product = rows > 32   ? amx_product<3>
                                 : rows > 16 ? amx_product<2>
                                             : amx_product<1>;
            for (int c = 0; c < count; c += kAmxColumns) {
              product(inputs[size_t(begin)], w.K, blocks + c * stride, scales + c * groups,
                      std::min(kAmxColumns, count - c), next + c * stride, sums + c, C);
            }
            for (int64_t m = 0; m < rows; ++m)
              finish(own.expert, begin + m, n, count, sums + m * C);
          }
          continue;
        }
      }
#endif
      for (int64_t begin = own.begin; begin < own.end; begin += kRowBlock) {
        const int64_t rows = std::min(kRowBlock, own.end - begin);
        const int64_t parts = (rows + kRows - 1) / kRows;  // as even as can be
        fill_zero(sums, rows * C);
        for (int64_t g = 0; g < groups; ++g) {
          if (g % kScaleGroups == 0) widen_scales(scales + g, groups, count, groups - g, scale);
          decode(blocks + g * kMxGroupBytes, stride, count, tile, Form{});
          if (begin == own.begin) {
            const int64_t bytes = count * kMxGroupBytes;
            for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(next + g * bytes + i, 0, 2);
          }
          for (int64_t part = 0; part < parts; ++part) {
            const int64_t m = rows * part / parts, end = rows * (part + 1) / parts;
            multiply_rows<Form>(int(end - m), inputs.data() + begin + m, g * kMxGroup, tile,
                                scale + g % kScaleGroups * C, sums + m * C);
          }
        }
        for (int64_t m = 0; m < rows; ++m) finish(own.expert, begin + m, n, count, sums + m * C);
      }
    }
#if defined(__AMX_BF16__)
    _tile_release();
#endif
  }
}

// ---- the layer
// The K largest logits of a row, of equal ones the first, NaN above all, and their softmax.
template <class T, class A>
void route(const MoeMxfp4Params& p, int64_t row, A* logits, int32_t* experts, A* shares) {
  const T* x = static_cast<const T*>(p.x) + row * p.D;
  for (int64_t e = 0; e < p.E; ++e) {
    const T* weight = static_cast<const T*>(p.router_weight) + e * p.D;
    logits[e] =
        sum_columns<A>(p.D,
                       [&](int64_t i, auto lanes, Simd<A> running) LENS_LAMBDA {
                         return mul_add(load(x + i, lanes), load(weight + i, lanes), running);
                       }) +
        widen(static_cast<const T*>(p.router_bias)[e]);
  }
  std::vector<int32_t> order(static_cast<size_t>(p.E));
  std::iota(order.begin(), order.end(), 0);
  std::partial_sort(order.begin(), order.begin() + p.K, order.end(), [&](int32_t a, int32_t b) {
    const bool nan_a = logits[a] != logits[a], nan_b = logits[b] != logits[b];
    if (nan_a || nan_b) return nan_a != nan_b ? nan_a : a < b;
    return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
  });
  A total = 0;
  for (int64_t k = 0; k < p.K; ++k) {
    experts[k] = order[size_t(k)];
    shares[k] = std::exp(logits[experts[k]] - logits[experts[0]]);
    total += shares[k];
  }
  for (int64_t k = 0; k < p.K; ++k) shares[k] /= total;
}

template <class Form, class T>
void layer(const MoeMxfp4Params& p, const typename Form::Input* x) {
  using A = Acc<T>;
  using Input = typename Form::Input;
  constexpr int kMost = kColumns<A> / 2;  // hidden columns of a tile
  const int64_t pairs = p.R * p.K;
  std::vector<int32_t> experts(static_cast<size_t>(pairs));
  std::vector<A> shares(static_cast<size_t>(pairs));
  parallel_ranges(p.R, p.R * p.E * p.D, [&](int64_t begin, int64_t end) {
    std::vector<A> logits(static_cast<size_t>(p.E));
    for (int64_t r = begin; r < end; ++r) {
      route<T>(p, r, logits.data(), experts.data() + r * p.K, shares.data() + r * p.K);
    }
  });

  // pairs by expert, then by row
  std::vector<int64_t> place(static_cast<size_t>(pairs)), start(static_cast<size_t>(p.E + 1));
  for (int32_t e : experts) ++start[size_t(e) + 1];
  std::vector<Chosen> chosen;
  for (int64_t e = 0; e < p.E; ++e) {
    start[size_t(e) + 1] += start[size_t(e)];
    if (start[size_t(e) + 1] > start[size_t(e)])
      chosen.push_back({e, start[size_t(e)], start[size_t(e) + 1]});
  }
  std::vector<const Input*> inputs(static_cast<size_t>(pairs));
  [[maybe_unused]] Input* copies = static_cast<Input*>(p.parts);  // not written before the second
  for (int64_t i = 0; i < pairs; ++i) {
    const int64_t at = place[size_t(i)] = start[size_t(experts[size_t(i)])]++;
    inputs[size_t(at)] = x + i / p.K * p.D;
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<Form, Pairs>) {
      for (int64_t d = 0; d < p.D; d += 8) reordered(inputs[size_t(at)] + d, copies + at * p.D + d);
      inputs[size_t(at)] = copies + at * p.D;
    }
#endif
  }

  Input* hidden = static_cast<Input*>(p.hidden);
  products<Form>(chosen, {p.gate_up_blocks, p.gate_up_scales, 2 * p.F, p.D}, inputs,
                 [&](int64_t e, int64_t pair, int64_t n, int count, const A* sums) {
                   const T* bias = static_cast<const T*>(p.gate_up_bias) + e * 2 * p.F + n;
                   A gate[kMost], up[kMost];
                   for (int i = 0; i < count / 2; ++i) {
                     gate[i] = sums[2 * i] + widen(bias[2 * i]);
                     up[i] = sums[2 * i + 1] + widen(bias[2 * i + 1]);
                   }
                   T made[kMost];
                   const Simd<A> limit{A(p.limit)}, alpha{A(p.alpha)};
                   for_lanes<A>(0, count / 2, [&](int64_t i, auto lanes) LENS_LAMBDA {
                     Simd<A> g = load(gate + i, lanes), u = load(up + i, lanes);
                     g.v = g.v > limit.v ? limit.v : g.v;  // comparisons keep a NaN
                     u.v = u.v > limit.v ? limit.v : u.v;
                     u.v = u.v < -limit.v ? -limit.v : u.v;
                     store(made + i, g * sigmoid(alpha * g) * (u + Simd<A>(1)), lanes);
                   });
                   Input* out = hidden + pair * p.F + n / 2;
                   if constexpr (std::is_same_v<Form, Pairs>) {
#if defined(__AVX512BF16__)
                     for (int i = 0; i < count / 2; i += 8) reordered(made + i, out + i);
#endif
                   } else {
                     for (int i = 0; i < count / 2; ++i) out[i] = widen(made[i]);
                   }
                 });

  for (int64_t i = 0; i < pairs; ++i) inputs[size_t(i)] = hidden + i * p.F;
  A* parts = static_cast<A*>(p.parts);
  products<Form>(chosen, {p.down_blocks, p.down_scales, p.D, p.F}, inputs,
                 [&](int64_t e, int64_t pair, int64_t n, int count, const A* sums) {
                   const T* bias = static_cast<const T*>(p.down_bias) + e * p.D + n;
                   A* out = parts + pair * p.D + n;
                   for (int i = 0; i < count; ++i) out[i] = sums[i] + widen(bias[i]);
                 });

  parallel_ranges(p.R, pairs * p.D, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      T* y = static_cast<T*>(p.y) + r * p.D;
      for_lanes<A>(0, p.D, [&](int64_t i, auto lanes) LENS_LAMBDA {
        Simd<A> sum(0);
        for (int64_t k = 0; k < p.K; ++k) {
          const int64_t pair = place[size_t(r * p.K + k)];
          sum = mul_add(Simd<A>(shares[size_t(r * p.K + k)]), load(parts + pair * p.D + i, lanes),
                        sum);
        }
        store(y + i, sum, lanes);
      });
    }
  });
}

template <class T>
void forward(const MoeMxfp4Params& p) {
  using A = Acc<T>;
  const T* x = static_cast<const T*>(p.x);
  if constexpr (std::is_same_v<T, A>) {
    layer<Values<A>, T>(p, x);
  } else if constexpr (kPairs) {
#if defined(__AVX512BF16__)
    layer<Pairs, T>(p, x);
#endif
  } else {
    A* wide = static_cast<A*>(p.wide);
    parallel_ranges(p.R * p.D, p.R * p.D, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) wide[i] = widen(x[i]);
    });
    layer<Values<A>, T>(p, wide);
  }
}

}  // namespace

void moe_mxfp4(const MoeMxfp4Params& p) {
  if (p.R == 0) return;
  with_type(p.dtype, [&](auto* type) { forward<std::remove_pointer_t<decltype(type)>>(p); });
}

}  // namespace lens::LENS_ISA
