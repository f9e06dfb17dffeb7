// y = sum over a row's experts of share_k (clamped_swiglu(x W1^T + b1) W2^T + b2), the weights
// packed in MXFP4.
//
// Rows are sorted by expert, so that a weight is decoded once for all rows that want it: a tile of
// kColumns outputs by one group of 32 inputs at a time, transposed, in the first cache, where
// blocks of kRows rows multiply it from registers. A group's sum is taken over the bare E2M1 values
// and joins the total times its scale, which is exact at any scale and costs one addition in 32.
// For few rows memory bounds it, 17 bytes for 32 weights; for many the products do.
//
// Where the CPU has AMX, moe_mxfp4_amx.h multiplies all but tiles of extreme scales.
//
// An output adds its inputs in order, group by group, whichever rows and threads share the work, so
// its bits depend on its own row alone.
#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "cpu/moe_mxfp4_amx.h"
#include "cpu/rows.h"
#include "cpu/transpose.h"

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
// 16 rows of 16 bytes, `stride` apart, of which those from `count` on repeat the last one.
LENS_INLINE void transpose_rows(const uint8_t* rows, int64_t stride, int count, __m512i x[4]) {
  transpose(
      [&](int r) LENS_LAMBDA {
        return _mm_loadu_si128(
            reinterpret_cast<const __m128i*>(rows + (r < count ? r : count - 1) * stride));
      },
      x);
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
      transpose_rows(rows + v * stride, stride, count - v, x);
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
    transpose_rows(rows + v * stride, stride, count - v, x);
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
        transpose_rows(rows + v * stride, stride, count - v, x);
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

// The rows of one expert: pairs [begin, end) of all (row, expert) pairs in the order of experts,
// and the first of its blocks where each expert begins a block of 16 rows.
struct Chosen {
  int64_t expert, begin, end, block;
};

// The weights of all experts: N outputs of each, of K inputs.
struct Weights {
  const uint8_t* blocks;
  const uint8_t* scales;
  int64_t N, K;
};

// finish(expert, pair, first output, outputs, sums) once per pair and tile, over all chosen
// experts. inputs: of every pair.
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
#pragma omp for schedule(dynamic, 4)
    for (int64_t task = 0; task < tasks; ++task) {
      const Chosen& own = chosen[size_t(task / tiles)];
      const int64_t n = task % tiles * C;
      const int count = int(std::min<int64_t>(C, w.N - n));
      const uint8_t* blocks = blocks_of(task);
      const uint8_t* scales = w.scales + (own.expert * w.N + n) * groups;
      // a tile is one piece of memory read in `count` streams, more than hardware follows
      const uint8_t* next = blocks_of(std::min(task + 1, tasks - 1));
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
  }
}

// ---- the layer
// Logits of `count` rows from `row` on, E each.
constexpr int kRouted = 4;

template <class T, class A>
void logits_of(const MoeMxfp4Params& p, int64_t row, int count, A* logits) {
  const T* x = static_cast<const T*>(p.x) + row * p.D;
  const T* weight = static_cast<const T*>(p.router_weight);
  const T* bias = static_cast<const T*>(p.router_bias);
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, Bf16>) {  // pairs of BF16: products exact, sums in float
    for (int64_t e = 0; e < p.E; e += 4) {
      const int own = int(std::min<int64_t>(4, p.E - e));
      __m512 sums[kRouted][4] = {};
      for (int64_t i = 0; i < p.D; i += kMxGroup) {
        __m512bh rows[kRouted];
#pragma GCC unroll 4
        for (int r = 0; r < kRouted; ++r)
          rows[r] = __m512bh(_mm512_loadu_si512(x + std::min(r, count - 1) * p.D + i));
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          const auto own_weight =
              __m512bh(_mm512_loadu_si512(weight + (e + std::min(j, own - 1)) * p.D + i));
#pragma GCC unroll 4
          for (int r = 0; r < kRouted; ++r)
            sums[r][j] = _mm512_dpbf16_ps(sums[r][j], rows[r], own_weight);
        }
      }
      for (int r = 0; r < count; ++r) {
        for (int j = 0; j < own; ++j)
          logits[r * p.E + e + j] = sum_lanes(Simd<float>(sums[r][j])) + widen(bias[e + j]);
      }
    }
    return;
  }
#endif
  for (int r = 0; r < count; ++r) {
    for (int64_t e = 0; e < p.E; ++e) {
      logits[r * p.E + e] =
          sum_columns<A>(p.D,
                         [&](int64_t i, auto lanes, Simd<A> running) LENS_LAMBDA {
                           return mul_add(load(x + r * p.D + i, lanes),
                                          load(weight + e * p.D + i, lanes), running);
                         }) +
          widen(bias[e]);
    }
  }
}

// The K largest logits of a row, of equal ones the first, NaN above all, and their softmax.
template <class A>
void route(const MoeMxfp4Params& p, const A* logits, int32_t* experts, A* shares) {
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

// Who reads which expert: pairs of a row and one of its experts, by expert, then by row.
template <class A>
struct Plan {
  std::vector<int32_t> experts;  // of pair r K + k
  std::vector<A> shares;         // of pair r K + k
  std::vector<int64_t> place;    // of pair r K + k, among all by expert
  std::vector<int64_t> rows;     // of a place
  std::vector<Chosen> chosen;
  int64_t blocks = 0;
};

template <class T, class A = Acc<T>>
Plan<A> planned(const MoeMxfp4Params& p) {
  const size_t pairs = size_t(p.R * p.K);
  Plan<A> made{std::vector<int32_t>(pairs),
               std::vector<A>(pairs),
               std::vector<int64_t>(pairs),
               std::vector<int64_t>(pairs),
               {},
               0};
  parallel_ranges(p.R, p.R * p.E * p.D, [&](int64_t begin, int64_t end) {
    std::vector<A> logits(static_cast<size_t>(kRouted * p.E));
    for (int64_t first = begin; first < end; first += kRouted) {
      const int64_t stop = std::min(first + kRouted, end);
      logits_of<T>(p, first, int(stop - first), logits.data());
      for (int64_t r = first; r < stop; ++r) {
        route(p, logits.data() + (r - first) * p.E, made.experts.data() + r * p.K,
              made.shares.data() + r * p.K);
      }
    }
  });
  std::vector<int64_t> start(static_cast<size_t>(p.E + 1));
  for (int32_t e : made.experts) ++start[size_t(e) + 1];
  for (int64_t e = 0; e < p.E; ++e) {
    const int64_t begin = start[size_t(e)], end = start[size_t(e) + 1] += begin;
    if (end == begin) continue;
    made.chosen.push_back({e, begin, end, made.blocks});
    made.blocks += (end - begin + kBlockRows - 1) / kBlockRows;
  }
  for (size_t i = 0; i < pairs; ++i) {
    made.place[i] = start[size_t(made.experts[i])]++;
    made.rows[size_t(made.place[i])] = int64_t(i) / p.K;
  }
  return made;
}

// y = the sum over a row's experts of share_k parts_k
template <class T, class A = Acc<T>>
void combine(const MoeMxfp4Params& p, const Plan<A>& plan) {
  const A* parts = static_cast<const A*>(p.parts);
  parallel_ranges(p.R, p.R * p.K * p.D, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      T* y = static_cast<T*>(p.y) + r * p.D;
      for_lanes<A>(0, p.D, [&](int64_t i, auto lanes) LENS_LAMBDA {
        Simd<A> sum(0);
        for (int64_t k = 0; k < p.K; ++k) {
          const size_t pair = size_t(r * p.K + k);
          sum = mul_add(Simd<A>(plan.shares[pair]), load(parts + plan.place[pair] * p.D + i, lanes),
                        sum);
        }
        store(y + i, sum, lanes);
      });
    }
  });
}

template <class A>
LENS_INLINE Simd<A> clamped_swiglu(const MoeMxfp4Params& p, Simd<A> gate, Simd<A> up) {
  const Simd<A> limit{A(p.limit)}, alpha{A(p.alpha)};
  gate.v = gate.v > limit.v ? limit.v : gate.v;  // comparisons keep a NaN
  up.v = up.v > limit.v ? limit.v : up.v;
  up.v = up.v < -limit.v ? -limit.v : up.v;
  return gate * sigmoid(alpha * gate) * (up + Simd<A>(1));
}

template <class Form, class T>
void layer(const MoeMxfp4Params& p, const typename Form::Input* x) {
  using A = Acc<T>;
  using Input = typename Form::Input;
  constexpr int kMost = kColumns<A> / 2;  // hidden columns of a tile
  const int64_t pairs = p.R * p.K;
  const Plan<A> plan = planned<T>(p);
  std::vector<const Input*> inputs(static_cast<size_t>(pairs));
  [[maybe_unused]] Input* copies = static_cast<Input*>(p.parts);  // not written before the second
  for (int64_t i = 0; i < pairs; ++i) {
    inputs[size_t(i)] = x + plan.rows[size_t(i)] * p.D;
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<Form, Pairs>) {
      for (int64_t d = 0; d < p.D; d += 8) reordered(inputs[size_t(i)] + d, copies + i * p.D + d);
      inputs[size_t(i)] = copies + i * p.D;
    }
#endif
  }

  Input* hidden = static_cast<Input*>(p.hidden);
  products<Form>(plan.chosen, {p.gate_up_blocks, p.gate_up_scales, 2 * p.F, p.D}, inputs,
                 [&](int64_t e, int64_t pair, int64_t n, int count, const A* sums) {
                   const T* bias = static_cast<const T*>(p.gate_up_bias) + e * 2 * p.F + n;
                   A gate[kMost], up[kMost];
                   for (int i = 0; i < count / 2; ++i) {
                     gate[i] = sums[2 * i] + widen(bias[2 * i]);
                     up[i] = sums[2 * i + 1] + widen(bias[2 * i + 1]);
                   }
                   T made[kMost];
                   for_lanes<A>(0, count / 2, [&](int64_t i, auto lanes) LENS_LAMBDA {
                     store(made + i, clamped_swiglu(p, load(gate + i, lanes), load(up + i, lanes)),
                           lanes);
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
  products<Form>(plan.chosen, {p.down_blocks, p.down_scales, p.D, p.F}, inputs,
                 [&](int64_t e, int64_t pair, int64_t n, int count, const A* sums) {
                   const T* bias = static_cast<const T*>(p.down_bias) + e * p.D + n;
                   A* out = parts + pair * p.D + n;
                   for (int i = 0; i < count; ++i) out[i] = sums[i] + widen(bias[i]);
                 });
  combine<T>(p, plan);
}

#if defined(__AMX_BF16__)
// ---- the layer by AMX
// What tiles::product makes, by other products, which scale sums: of weights that it does not take.
void product_of_extremes(const tiles::Weights& w, const uint32_t* rows, int blocks, float* sums) {
  constexpr int C = kColumns<float>;
  const int64_t K = w.groups * kMxGroup, block = tiles::chunks_of(K) * tiles::kPacked;
  const int count = blocks * tiles::kRows;
  std::vector<Bf16> copies(size_t(count * K));
  std::vector<const Bf16*> inputs(static_cast<size_t>(count));
  for (int m = 0; m < count; ++m) {
    inputs[size_t(m)] = copies.data() + m * K;
    tiles::unpack(rows + m / tiles::kRows * block, m % tiles::kRows, K,
                  reinterpret_cast<uint32_t*>(copies.data() + m * K));
  }
  alignas(64) uint32_t tile[Pairs::kSteps * C] = {};
  alignas(64) float scale[kScaleGroups * C] = {};
  alignas(64) float by_row[tiles::kMostRows * C] = {};
  for (int64_t g = 0; g < w.groups; ++g) {
    if (g % kScaleGroups == 0)
      widen_scales(w.scales + g, w.groups, tiles::kOutputs, w.groups - g, scale);
    decode(w.blocks + g * kMxGroupBytes, K / 2, tiles::kOutputs, tile, Pairs{});
    for (int m = 0; m < count; m += kRows) {
      multiply_rows<Pairs>(std::min(kRows, count - m), inputs.data() + m, g * kMxGroup, tile,
                           scale + g % kScaleGroups * C, by_row + m * C);
    }
  }
  for (int n = 0; n < tiles::kOutputs; ++n) {
    for (int m = 0; m < count; ++m) sums[n * tiles::kMostRows + m] = by_row[m * C + n];
  }
}

// finish(chosen, first of its blocks, blocks, first output, sums) over all chosen experts and their
// outputs, 32 at a time: sums[output][row], kMostRows apart. packed: the rows, block by block.
template <class Finish>
void products_by_amx(const std::vector<Chosen>& chosen, const Weights& w, const uint32_t* packed,
                     Finish finish) {
  const int64_t per_expert = w.N / tiles::kOutputs, tasks = per_expert * int64_t(chosen.size());
  const int64_t groups = w.K / kMxGroup, chunks = tiles::chunks_of(w.K);
  const int64_t block = chunks * tiles::kPacked;
  bool kept = false;
  for (const Chosen& own : chosen) kept = kept || own.end - own.begin > tiles::kMostRows;
  const auto weights_of = [&](int64_t task) {
    return chosen[size_t(task / per_expert)].expert * w.N + task % per_expert * tiles::kOutputs;
  };
  const __m512i plain = bf16_values();
  const __m512i values =
      _mm512_maskz_add_epi16(_mm512_test_epi16_mask(plain, _mm512_set1_epi16(0x7fff)), plain,
                             _mm512_set1_epi16(tiles::kAbove << 7));
#pragma omp parallel if (tasks * tiles::kOutputs * w.K > kParallelElements)
  {
    alignas(64) float sums[tiles::kOutputs * tiles::kMostRows];
    std::vector<uint32_t> room(size_t((kept ? chunks : 2) * tiles::kDecoded + 16));
    uint32_t* decoded = room.data() + (64 - reinterpret_cast<uintptr_t>(room.data()) % 64) / 4;
    const tiles::Thread own_tiles;
    (void)own_tiles;
#pragma omp for schedule(dynamic, 8)
    for (int64_t task = 0; task < tasks; ++task) {
      const Chosen& own = chosen[size_t(task / per_expert)];
      const int64_t at = weights_of(task), n = task % per_expert * tiles::kOutputs;
      const tiles::Weights tile{w.blocks + at * (w.K / 2), w.scales + at * groups, groups,
                                w.blocks + weights_of(std::min(task + 1, tasks - 1)) * (w.K / 2)};
      const bool ordinary = tiles::ordinary(tile.scales, tiles::kOutputs * groups);
      const int64_t blocks = tiles::blocks_of(own.end - own.begin);
      const int64_t parts = (blocks + tiles::kMostBlocks - 1) / tiles::kMostBlocks;
      for (int64_t part = 0; part < parts; ++part) {  // as even as can be
        const int64_t begin = blocks * part / parts, end = blocks * (part + 1) / parts;
        const uint32_t* rows = packed + (own.block + begin) * block;
        if (ordinary) {
          const auto product = end - begin == 3   ? tiles::product<3>
                               : end - begin == 2 ? tiles::product<2>
                                                  : tiles::product<1>;
          product(tile, rows, decoded, parts > 1, part > 0, values, sums);
        } else {
          product_of_extremes(tile, rows, int(end - begin), sums);
        }
        finish(own, begin, int(end - begin), n, sums);
      }
    }
  }
}

// Both workspaces hold blocks of rows: what is 4 bytes there is a pair of BF16 here.
void layer_by_amx(const MoeMxfp4Params& p) {
  const Plan<float> plan = planned<Bf16>(p);
  const Bf16* x = static_cast<const Bf16*>(p.x);
  uint32_t* packed = static_cast<uint32_t*>(p.parts);  // read before parts are written
  uint32_t* hidden = static_cast<uint32_t*>(p.hidden);
  const int64_t x_block = tiles::chunks_of(p.D) * tiles::kPacked;
  const int64_t hidden_block = tiles::chunks_of(p.F) * tiles::kPacked;

  std::vector<const Chosen*> whose(static_cast<size_t>(plan.blocks));
  for (const Chosen& own : plan.chosen) {
    const int64_t blocks = tiles::blocks_of(own.end - own.begin);
    for (int64_t b = 0; b < blocks; ++b) whose[size_t(own.block + b)] = &own;
  }
  parallel_ranges(plan.blocks, plan.blocks * tiles::kRows * p.D, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const Chosen& own = *whose[size_t(b)];
      const int64_t first = own.begin + (b - own.block) * tiles::kRows;
      const int count = int(std::min<int64_t>(tiles::kRows, own.end - first));
      tiles::pack([&](int r) { return x + plan.rows[size_t(first + r)] * p.D; }, count, p.D,
                  packed + b * x_block);
    }
  });

  products_by_amx(
      plan.chosen, {p.gate_up_blocks, p.gate_up_scales, 2 * p.F, p.D}, packed,
      [&](const Chosen& own, int64_t begin, int blocks, int64_t n, const float* sums) {
        const Bf16* bias = static_cast<const Bf16*>(p.gate_up_bias) + own.expert * 2 * p.F + n;
        for (int b = 0; b < blocks; ++b) {
          const auto rows_of = [&](int output) LENS_LAMBDA {  // a hidden column of 16 rows
            const float* gate = sums + 2 * output * tiles::kMostRows + b * tiles::kRows;
            return clamped_swiglu(
                p, load(gate, All{}) + Simd<float>(widen(bias[2 * output])),
                load(gate + tiles::kMostRows, All{}) + Simd<float>(widen(bias[2 * output + 1])));
          };
          uint32_t* to = hidden + (own.block + begin + b) * hidden_block;
          for (int i = 0; i < tiles::kOutputs / 2; i += 8) {
            for (int j = 0; j < tiles::kSteps; ++j) {
              Bf16 low[tiles::kRows], high[tiles::kRows];
              store(low, rows_of(i + j), All{});
              store(high, rows_of(i + j + 4), All{});
              tiles::store_pairs(low, high, to + tiles::place_of(n / 2 + i + j));
            }
          }
          if (n + tiles::kOutputs == 2 * p.F) tiles::clear_rest(p.F, to);
        }
      });

  float* parts = static_cast<float*>(p.parts);
  products_by_amx(
      plan.chosen, {p.down_blocks, p.down_scales, p.D, p.F}, hidden,
      [&](const Chosen& own, int64_t begin, int blocks, int64_t n, const float* sums) {
        const Bf16* bias = static_cast<const Bf16*>(p.down_bias) + own.expert * p.D + n;
        const int64_t first = own.begin + begin * tiles::kRows;
        const int count = int(std::min<int64_t>(blocks * tiles::kRows, own.end - first));
        for (int half = 0; half < tiles::kOutputs; half += 16) {
          const Simd<float> added = load(bias + half, All{});
          for (int m = 0; m < count; m += 4) {  // four rows at a time
            __m512i x[4];
            transpose(
                [&](int r) LENS_LAMBDA {
                  return _mm_loadu_si128(
                      reinterpret_cast<const __m128i*>(sums + (half + r) * tiles::kMostRows + m));
                },
                x);
            for (int r = 0; r < 4 && m + r < count; ++r) {
              const Simd<float> sum(reinterpret_cast<typename Register<float>::type>(x[r]));
              store(parts + (first + m + r) * p.D + n + half, sum + added, All{});
            }
          }
        }
      });
  combine<Bf16>(p, plan);
}
#endif

template <class T>
void forward(const MoeMxfp4Params& p) {
  using A = Acc<T>;
  const T* x = static_cast<const T*>(p.x);
  if constexpr (std::is_same_v<T, A>) {
    layer<Values<A>, T>(p, x);
  } else if constexpr (kPairs) {
#if defined(__AMX_BF16__)
    layer_by_amx(p);
#elif defined(__AVX512BF16__)
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
