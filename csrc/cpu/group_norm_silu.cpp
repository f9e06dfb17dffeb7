// y = silu((x - mean_bg) * rstd_bg * weight + bias), the statistics over a sample's rows and a
// group's channels. Bound by memory: two reads and one write of [R, D].
#include <algorithm>

#include "cpu/rows.h"

namespace lens::LENS_ISA {
namespace {

// Mean and sum of squared deviations of the rows [first, stop), channel by channel. Sums go over
// differences from the first row, which lies among the values: nothing cancels where the mean is
// large.
template <class T, class A = Acc<T>>
LENS_INLINE void slot_statistics(const T* x, int64_t D, int64_t first, int64_t stop, A* mean,
                                 A* deviations) {
  const T* origin = x + first * D;
  fill_zero(mean, D);
  fill_zero(deviations, D);
  const auto add_rows = [&](int64_t row, auto count) LENS_LAMBDA {
    for_lanes<A>(0, D, [&](int64_t i, auto lanes) LENS_LAMBDA {
      const Simd<A> from = load(origin + i, lanes);
      Simd<A> sum = load(mean + i, lanes), squares = load(deviations + i, lanes);
      for (int k = 0; k < count; ++k) {
        const Simd<A> difference = load(x + (row + k) * D + i, lanes) - from;
        sum = sum + difference;
        squares = mul_add(difference, difference, squares);
      }
      store(mean + i, sum, lanes);
      store(deviations + i, squares, lanes);
    });
  };
  int64_t row = first + 1;
  for (; row + 4 <= stop; row += 4) add_rows(row, std::integral_constant<int, 4>{});
  for (; row < stop; ++row) add_rows(row, std::integral_constant<int, 1>{});
  const Simd<A> part(A(1) / A(stop - first));
  for_lanes<A>(0, D, [&](int64_t i, auto lanes) LENS_LAMBDA {
    const Simd<A> sum = load(mean + i, lanes), shift = sum * part;
    Simd<A> rest = load(deviations + i, lanes) - sum * shift;
    rest.v = rest.v > 0 ? rest.v : Simd<A>(0).v;  // rounding; a NaN is in the mean as well
    store(mean + i, load(origin + i, lanes) + shift, lanes);
    store(deviations + i, rest, lanes);
  });
}

// Mean and rstd of one group of one sample from its slots, in their order; into the table.
template <class T, class A = Acc<T>>
LENS_INLINE void group_table(const GroupNormSiluParams& p, int64_t b, int64_t g) {
  const int64_t D = p.D, channels = D / p.G, rows = p.offsets[b + 1] - p.offsets[b];
  const A* slots = static_cast<const A*>(p.workspace) + split_slot(p.offsets[b], b) * 2 * D;
  const auto rows_of = [&](int64_t k) {
    return double(std::min(kSplitRows, rows - k * kSplitRows));
  };
  const double values = double(rows) * double(channels);
  double mean = 0, deviations = 0;
  for (int64_t k = 0; k < split_chunks(rows); ++k) {
    double sum = 0;
    for (int64_t c = g * channels; c < (g + 1) * channels; ++c) sum += slots[k * 2 * D + c];
    mean += sum * rows_of(k);
  }
  mean /= values;
  for (int64_t k = 0; k < split_chunks(rows); ++k) {
    double within = 0, between = 0;
    for (int64_t c = g * channels; c < (g + 1) * channels; ++c) {
      const double apart = slots[k * 2 * D + c] - mean;
      within += slots[(k * 2 + 1) * D + c];
      between += apart * apart;
    }
    deviations += within + between * rows_of(k);
  }
  const double rstd = 1 / std::sqrt(deviations / values + p.eps);
  A* table = static_cast<A*>(p.table) + b * 2 * D;
  for (int64_t c = g * channels; c < (g + 1) * channels; ++c) {
    table[c] = A(mean);
    table[D + c] = A(rstd * double(widen(static_cast<const T*>(p.weight)[c])));
  }
}

template <class T, bool kActivate>
void apply(const GroupNormSiluParams& p) {
  using A = Acc<T>;
  const T* bias = static_cast<const T*>(p.bias);
  parallel_rows(p.offsets, p.B, p.R, p.R * p.D, [&](int64_t row, int64_t b) LENS_LAMBDA {
    const T* x = static_cast<const T*>(p.x) + row * p.D;
    const A* mean = static_cast<const A*>(p.table) + b * 2 * p.D;
    const A* scale = mean + p.D;
    T* y = static_cast<T*>(p.y) + row * p.D;
    for_lanes<A>(0, p.D, [&](int64_t i, auto lanes) LENS_LAMBDA {
      Simd<A> n = mul_add(load(x + i, lanes) - load(mean + i, lanes), load(scale + i, lanes),
                          load(bias + i, lanes));
      if constexpr (kActivate) n = n / (Simd<A>(1) + exponential(-n));
      store(y + i, n, lanes);
    });
  });
}

template <class T>
void forward(const GroupNormSiluParams& p) {
  using A = Acc<T>;
  parallel_chunks(p.offsets, p.B, p.R, p.R * p.D,
                  [&](int64_t slot, int64_t, int64_t first, int64_t stop) {
                    A* mean = static_cast<A*>(p.workspace) + slot * 2 * p.D;
                    slot_statistics(static_cast<const T*>(p.x), p.D, first, stop, mean, mean + p.D);
                  });
  parallel_ranges(p.B * p.G, split_slots(p.R, p.B) * p.D, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / p.G;
      if (p.offsets[b + 1] > p.offsets[b]) group_table<T>(p, b, i % p.G);
    }
  });
  p.activate ? apply<T, true>(p) : apply<T, false>(p);
}

}  // namespace

void group_norm_silu(const GroupNormSiluParams& p) {
  with_type(p.dtype, [&](auto* type) { forward<std::remove_pointer_t<decltype(type)>>(p); });
}

}  // namespace lens::LENS_ISA
