// out = softmax over (q' k^T * scale, sink) times (v, 0): causal attention of grouped queries, of a
// window or of all keys before; without causality, sinks and turning, joint_attention of a sample
// (params/attention.h).
//
// A task is a key head and 32 of its rows: row t G + g is query t of the g-th of the G heads that
// share its keys. Its scores stay in the caches between the two products; keys that none of its
// rows sees are not read. Keys and values are laid out once a call for all tasks.
//
// A row's bits depend on nothing but its query and what it sees, of finite values: keys are summed
// in their order from a multiple of 32 on, and those that others of the task see add zeros. BF16
// rows are multiplied by AMX where the CPU has it, with shares rounded to BF16 behind the
// exponential; all else in the arithmetic type.
#include <omp.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "cpu/amx_tiles.h"
#include "cpu/rows.h"
#include "cpu/transpose.h"

namespace lens::LENS_ISA {
namespace {

constexpr int kRows = kSinkTile;

// What a task needs of its call.
template <class T>
struct Call {
  const SinkAttentionParams& p;
  int64_t group = p.N / p.M, before = p.S - p.T;
  int64_t keys = sink_padded(p.S), channels = sink_padded(p.H);  // padded
};

// ---- layouts and products in the arithmetic type
// Keys lie in panels of two registers, [keys / C][channels][C], values in rows [keys][channels].
template <class T>
struct Plain {
  using A = Acc<T>;
  using Query = A;
  using Share = A;
  static constexpr int C = 2 * Simd<A>::kLanes;
  static_assert(kSinkTile % C == 0);

  // keys first to first + 31 of a head
  static void pack(const Call<T>& call, int64_t m, int64_t first) {
    const auto& [p, group, before, keys, channels] = call;
    A* packed = static_cast<A*>(p.keys) + m * keys * channels;
    A* values = static_cast<A*>(p.values) + m * keys * channels;
    for (int64_t s = first; s < first + kSinkTile; ++s) {
      A* column = packed + s / C * C * channels + s % C;
      A* row = values + s * channels;
      const bool there = s < p.S;
      const T* k = static_cast<const T*>(p.k) + (there ? (s * p.M + m) * p.H : 0);
      const T* v = static_cast<const T*>(p.v) + (there ? (s * p.M + m) * p.H : 0);
      for (int64_t h = 0; h < channels; ++h) {
        column[h * C] = there && h < p.H ? A(widen(k[h])) : A(0);
        row[h] = there && h < p.H ? A(widen(v[h])) : A(0);
      }
    }
  }

  // scores[row][key - begin] of the keys [begin, end)
  static void score(const Call<T>& call, int64_t m, const Query* queries, int64_t begin,
                    int64_t end, A* scores) {
    const A* packed = static_cast<const A*>(call.p.keys) + m * call.keys * call.channels;
    for (int64_t s = begin; s < end; s += C) {
      for (int r = 0; r < kRows; r += 4) {
        products(queries + r * call.channels, call.channels, packed + s * call.channels, C,
                 call.channels, scores + r * call.keys + s - begin, call.keys);
      }
    }
  }

  // mixed[row][channel] over the keys [begin, end)
  static void mix(const Call<T>& call, int64_t m, const A* scores, const Share*, int64_t begin,
                  int64_t end, A* mixed) {
    const A* values = static_cast<const A*>(call.p.values) + m * call.keys * call.channels;
    for (int64_t h = 0; h < call.channels; h += C) {
      for (int r = 0; r < kRows; r += 4) {
        products(scores + r * call.keys, call.keys, values + begin * call.channels + h,
                 call.channels, end - begin, mixed + r * call.channels + h, call.channels);
      }
    }
  }

  // out[i][0 .. C) = sum over k of left[i][k] right[k][0 .. C), i = 0 to 3
  static void products(const A* left, int64_t left_stride, const A* right, int64_t right_stride,
                       int64_t count, A* out, int64_t out_stride) {
    constexpr int L = Simd<A>::kLanes;
    Simd<A> sum[4][2];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sum[i][0] = sum[i][1] = Simd<A>(0);
    for (int64_t k = 0; k < count; ++k) {
      const Simd<A> low = load(right + k * right_stride, All{});
      const Simd<A> high = load(right + k * right_stride + L, All{});
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const Simd<A> own(left[i * left_stride + k]);
        sum[i][0] = mul_add(own, low, sum[i][0]);
        sum[i][1] = mul_add(own, high, sum[i][1]);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      store(out + i * out_stride, sum[i][0], All{});
      store(out + i * out_stride + L, sum[i][1], All{});
    }
  }

  static constexpr A kUnit = 1;  // of what `power` takes

  static LENS_INLINE Simd<A> power(Simd<A> x) { return exponential(x); }
  static LENS_INLINE A power(A x) { return std::exp(x); }
  static LENS_INLINE void write(Simd<A> share, A* scores, Share*) { store(scores, share, All{}); }

  struct Thread {};
};

#if defined(__AMX_BF16__)
// ---- layouts and products of BF16 by AMX
// Both right operands are tiles of 16 pairs by 16 columns: of keys [keys / 16][channels / 32] with
// pairs of channels, of values [keys / 32][channels / 16] with pairs of keys.
struct Tiles {
  using A = float;
  using Query = Bf16;
  using Share = Bf16;
  static constexpr int64_t kTile = tiles::kTile;

  static uint32_t pair(Bf16 low, Bf16 high) { return uint32_t(high.bits) << 16 | low.bits; }

  static void pack(const Call<Bf16>& call, int64_t m, int64_t first) {
    const auto& [p, group, before, keys, channels] = call;
    uint32_t* packed = static_cast<uint32_t*>(p.keys) + (m * keys + first) * (channels / 2);
    uint32_t* values = static_cast<uint32_t*>(p.values) + (m * keys + first) * (channels / 2);
    const int64_t row = p.M * p.H, whole = first + kSinkTile <= p.S ? p.H / 16 * 16 : 0;
    const Bf16* k = static_cast<const Bf16*>(p.k) + first * row + m * p.H;
    const Bf16* v = static_cast<const Bf16*>(p.v) + first * row + m * p.H;
    const auto key = [&](int64_t s, int64_t h) { return packed + s / 16 * 8 * channels + h * 8; };
    const auto value = [&](int64_t s, int64_t h) { return values + h / 16 * kTile + s * 8; };
    for (int64_t h = 0; h < whole; h += 16) {
      for (int64_t s = 0; s < kSinkTile; s += 16) {
        for (int64_t part = h; part < h + 16; part += 8) {
          __m512i columns[4];
          transpose(
              [&](int r) LENS_LAMBDA {
                return _mm_loadu_si128(reinterpret_cast<const __m128i*>(k + (s + r) * row + part));
              },
              columns);
          for (int i = 0; i < 4; ++i) _mm512_storeu_si512(key(s, part + 2 * i), columns[i]);
        }
      }
      for (int64_t s = 0; s < kSinkTile; s += 2) {
        const auto wide = [&](int64_t of) LENS_LAMBDA {
          return _mm512_cvtepu16_epi32(
              _mm256_loadu_si256(reinterpret_cast<const __m256i*>(v + of * row + h)));
        };
        _mm512_storeu_si512(value(s, h),
                            _mm512_or_si512(wide(s), _mm512_slli_epi32(wide(s + 1), 16)));
      }
    }
    // what is no whole tile, padding included
    const auto at = [&](const Bf16* from, int64_t s, int64_t h) LENS_LAMBDA {
      return first + s < p.S && h < p.H ? from[s * row + h] : Bf16{0};
    };
    for (int64_t h = whole; h < channels; h += 2) {
      for (int64_t s = 0; s < kSinkTile; ++s)
        key(s, h)[s % 16] = pair(at(k, s, h), at(k, s, h + 1));
    }
    for (int64_t h = whole; h < channels; ++h) {
      for (int64_t s = 0; s < kSinkTile; s += 2)
        value(s, h)[h % 16] = pair(at(v, s, h), at(v, s + 1, h));
    }
  }

  // 32 x 32 sums over `steps` of 32: tiles 0 and 1 of the first 16 rows, 2 and 3 of the others
  static void products(const Bf16* left, int64_t left_stride, const uint32_t* right,
                       int64_t right_step, int64_t right_second, int64_t steps, float* out,
                       int64_t out_stride) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < steps; ++k) {
      _tile_loadd(4, left + 32 * k, left_stride * 2);
      _tile_loadd(5, left + 16 * left_stride + 32 * k, left_stride * 2);
      _tile_loadd(6, right + k * right_step, 64);
      _tile_loadd(7, right + k * right_step + right_second, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out, out_stride * 4);
    _tile_stored(1, out + 16, out_stride * 4);
    _tile_stored(2, out + 16 * out_stride, out_stride * 4);
    _tile_stored(3, out + 16 * out_stride + 16, out_stride * 4);
  }

  static void score(const Call<Bf16>& call, int64_t m, const Bf16* queries, int64_t begin,
                    int64_t end, float* scores) {
    const uint32_t* packed =
        static_cast<const uint32_t*>(call.p.keys) + m * call.keys * (call.channels / 2);
    tiles::fence();
    for (int64_t s = begin; s < end; s += kSinkTile) {
      products(queries, call.channels, packed + s * (call.channels / 2), kTile, 8 * call.channels,
               call.channels / 32, scores + s - begin, call.keys);
    }
    tiles::fence();
  }

  static void mix(const Call<Bf16>& call, int64_t m, const float*, const Bf16* shares,
                  int64_t begin, int64_t end, float* mixed) {
    const uint32_t* values =
        static_cast<const uint32_t*>(call.p.values) + (m * call.keys + begin) * (call.channels / 2);
    tiles::fence();
    for (int64_t h = 0; h < call.channels; h += 32) {
      products(shares, call.keys, values + h / 16 * kTile, 16 * call.channels, kTile,
               (end - begin) / 32, mixed + h, call.channels);
    }
    tiles::fence();
  }

  static constexpr float kUnit = 1.44269504f;  // log2(e)

  // 2^x by a polynomial on [-1/2, 1/2], within 4e-6: far below what rounds a share to BF16
  static LENS_INLINE Simd<float> power(Simd<float> x) {
    const Simd<float> round(12582912.0f);  // 1.5 * 2^23
    const Simd<float> n = (x + round) - round, f = x - n;
    Simd<float> e(0.00967603736f);
    e = mul_add(e, f, Simd<float>(0.0559220351f));
    e = mul_add(e, f, Simd<float>(0.240221068f));
    e = mul_add(e, f, Simd<float>(0.693121016f));
    e = mul_add(e, f, Simd<float>(1.00000012f));
    return Simd<float>(_mm512_maskz_scalef_ps(0xffff, e.v, n.v));
  }
  static LENS_INLINE float power(float x) { return std::exp2(x); }

  // Numbers below the smallest normal one, which AMX would take for 0, are 0 already.
  static LENS_INLINE void write(Simd<float> share, float*, Bf16* to) {
    const __m256bh rounded = _mm512_cvtneps_pbh(share.v);
    std::memcpy(static_cast<void*>(to), &rounded, sizeof rounded);
  }

  using Thread = tiles::Thread;
};
#endif

// ---- a row's queries and shares, whoever multiplies them
// The query turned by its angles, rounded to T, as the product wants it; zeros behind it.
template <class T, class Query, class A = Acc<T>>
void turn(const T* q, const A* cos, const A* sin, int64_t H, int64_t channels, Query* to) {
  const int64_t half = H / 2;
  if (cos == nullptr) {
    for_lanes<A>(
        0, H, [&](int64_t i, auto lanes) LENS_LAMBDA { store(to + i, load(q + i, lanes), lanes); });
    std::fill(to + H, to + channels, Query{});
    return;
  }
  const auto write = [&](int64_t h, Simd<A> value, auto lanes) LENS_LAMBDA {
    if constexpr (std::is_same_v<T, Query>) {
      store(to + h, value, lanes);
    } else {
      T rounded[Simd<A>::kLanes];
      store(rounded, value, All{});
      store(to + h, load(rounded, All{}), lanes);
    }
  };
  for_lanes<A>(0, half, [&](int64_t i, auto lanes) LENS_LAMBDA {
    const Simd<A> a = load(q + i, lanes), b = load(q + half + i, lanes);
    const Simd<A> c = load(cos + i, lanes), s = load(sin + i, lanes);
    write(i, mul_add(a, c, -(b * s)), lanes);
    write(half + i, mul_add(b, c, a * s), lanes);
  });
  std::fill(to + H, to + channels, Query{});
}

// Of a register without NaN.
template <class A>
LENS_INLINE A largest_lane(Simd<A> a) {
  A lane[Simd<A>::kLanes], most = -std::numeric_limits<A>::infinity();
  store(lane, a, All{});
  for (A value : lane) most = std::max(most, value);
  return most;
}

// Scores of `count` keys, of which [low, high) are seen, to exponentials with the sink's: their
// sum. They lie in `scores`, or rounded in `shares` where that is another type. scale and sink in
// units of what Form::power takes.
template <class Form, class A = typename Form::A>
A exponentials(A* scores, typename Form::Share* shares, int64_t low, int64_t high, int64_t count,
               A scale, A sink) {
  constexpr int L = Simd<A>::kLanes;
  const A none = -std::numeric_limits<A>::infinity();
  std::fill(scores, scores + low, none);
  std::fill(scores + high, scores + count, none);
  const Simd<A> by(scale);
  Simd<A> first(none), second(none);
  for (int64_t s = 0; s < count; s += 2 * L) {  // a NaN is left out here and stays below
    const Simd<A> x = load(scores + s, All{}) * by, y = load(scores + s + L, All{}) * by;
    first.v = x.v > first.v ? x.v : first.v;
    second.v = y.v > second.v ? y.v : second.v;
  }
  first.v = second.v > first.v ? second.v : first.v;
  const A most = std::max(sink, largest_lane(first));

  // a share that is no normal number is taken for 0: CPUs make such numbers slowly
  const Simd<A> least((std::is_same_v<A, float> ? A(-87) : A(-708)) * Form::kUnit);
  const Simd<A> shift(most == none ? A(0) : -most);
  Simd<A> sum(0), other(0);
  const auto one = [&](int64_t s) LENS_LAMBDA {
    Simd<A> x = mul_add(load(scores + s, All{}), by, shift);
    const auto lost = x.v < least.v;  // false of a NaN
    x.v = lost ? least.v : x.v;
    Simd<A> e = Form::power(x);
    e.v = lost ? Simd<A>(0).v : e.v;
    Form::write(e, scores + s, shares + s);
    return e;
  };
  for (int64_t s = 0; s < count; s += 2 * L) {
    sum = sum + one(s);
    other = other + one(s + L);
  }
  return sum_lanes(sum + other) + (sink == none ? A(0) : Form::power(sink - most));
}

// ---- a call
template <class T, class Form>
void forward(const SinkAttentionParams& p) {
  using A = Acc<T>;
  const Call<T> call{p};
  const auto [group, keys, channels] = std::tuple(call.group, call.keys, call.channels);
  const int64_t rows = p.T * group, blocks = (rows + kRows - 1) / kRows;
  const A scale = A(p.scale) * Form::kUnit;

  const auto task = [&](int64_t m, int64_t block, A* room) {
    A* scores = room;
    auto* shares = reinterpret_cast<typename Form::Share*>(scores + kRows * keys);
    auto* queries = reinterpret_cast<typename Form::Query*>(scores + 2 * kRows * keys);
    A* mixed = scores + kRows * (2 * keys + channels);
    const int64_t row = block * kRows, count = std::min<int64_t>(kRows, rows - row);
    // keys that query t sees: [low(t), high(t))
    const auto high = [&](int64_t t) { return p.causal ? call.before + t + 1 : p.S; };
    const auto low = [&](int64_t t) {
      return p.window ? std::max<int64_t>(0, high(t) - p.window) : 0;
    };
    const int64_t begin = low(row / group) / kSinkTile * kSinkTile;
    const int64_t end = sink_padded(high((row + count - 1) / group));

    const auto place = [&](int64_t r) {
      return ((row + r) / group * p.N + m * group + (row + r) % group) * p.H;
    };
    for (int64_t r = 0; r < count; ++r) {
      const int64_t t = (row + r) / group, angles = t * (p.H / 2);
      const A* cos = p.cos == nullptr ? nullptr : static_cast<const A*>(p.cos) + angles;
      turn(static_cast<const T*>(p.q) + place(r), cos, static_cast<const A*>(p.sin) + angles, p.H,
           channels, queries + r * channels);
    }
    std::fill(queries + count * channels, queries + kRows * channels, typename Form::Query{});
    Form::score(call, m, queries, begin, end, scores);
    A sums[kRows];
    for (int64_t r = 0; r < count; ++r) {
      const int64_t t = (row + r) / group;
      A sink = -std::numeric_limits<A>::infinity();
      if (p.sinks != nullptr) {
        sink =
            A(widen(static_cast<const T*>(p.sinks)[m * group + (row + r) % group])) * Form::kUnit;
      }
      sums[r] = exponentials<Form>(scores + r * keys, shares + r * keys, low(t) - begin,
                                   high(t) - begin, end - begin, scale, sink);
    }
    if constexpr (!std::is_same_v<A, typename Form::Share>) {
      for (int64_t r = count; r < kRows; ++r)
        std::fill(shares + r * keys, shares + r * keys + end - begin, typename Form::Share{});
    }
    Form::mix(call, m, scores, shares, begin, end, mixed);
    for (int64_t r = 0; r < count; ++r) {
      T* out = static_cast<T*>(p.out) + place(r);
      const Simd<A> whole(sums[r]);
      for_lanes<A>(0, p.H, [&](int64_t h, auto lanes) LENS_LAMBDA {
        store(out + h, load(mixed + r * channels + h, lanes) / whole, lanes);
      });
    }
  };

  const int threads = int(std::min<int64_t>(p.W, omp_get_max_threads()));
#pragma omp parallel num_threads(threads) if (rows * p.S * p.M > kParallelElements)
  {
    const typename Form::Thread own_tiles;
    A* room = static_cast<A*>(p.rooms) + omp_get_thread_num() * kRows * 2 * (keys + channels);
#pragma omp for
    for (int64_t i = 0; i < p.M * (keys / kSinkTile); ++i) {
      Form::pack(call, i % p.M, i / p.M * kSinkTile);
    }
#pragma omp for schedule(dynamic)
    for (int64_t i = p.M * blocks - 1; i >= 0; --i) task(i / blocks, i % blocks, room);
    (void)own_tiles;
  }
}

}  // namespace

void sink_attention(const SinkAttentionParams& p) {
  with_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
#if defined(__AMX_BF16__)
    if constexpr (std::is_same_v<T, Bf16>) return forward<T, Tiles>(p);
#endif
    return forward<T, Plain<T>>(p);
  });
}

}  // namespace lens::LENS_ISA
