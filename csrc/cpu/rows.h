// How the row kernels walk their data: lanes of a row, rows of a thread, chunks of a column sum.
#pragma once

#include <omp.h>

#include "cpu/simd.h"
#include "math/offsets.h"
#include "params.h"

namespace lens::LENS_ISA {

// body(i, lanes) over the columns [begin, end); begin is a multiple of the register width.
template <class A, class Body>
LENS_INLINE void for_lanes(int64_t begin, int64_t end, Body body) {
  constexpr int kLanes = Simd<A>::kLanes;
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) body(i, All{});
  if (i < end) body(i, Some{int(end - i)});
}

// Sum over the columns [0, D) of term(i, lanes, running): each call adds its registers to
// `running`. Four running sums hide the latency of the addition; which one a column joins depends
// on the column alone.
template <class A, class Term>
LENS_INLINE A sum_columns(int64_t D, Term term) {
  constexpr int kLanes = Simd<A>::kLanes;
  Simd<A> s0(0), s1(0), s2(0), s3(0);
  int64_t i = 0;
  for (; i + 4 * kLanes <= D; i += 4 * kLanes) {
    s0 = term(i, All{}, s0);
    s1 = term(i + kLanes, All{}, s1);
    s2 = term(i + 2 * kLanes, All{}, s2);
    s3 = term(i + 3 * kLanes, All{}, s3);
  }
  for (; i + kLanes <= D; i += kLanes) s0 = term(i, All{}, s0);
  if (i < D) s1 = term(i, Some{int(D - i)}, s1);
  return sum_lanes((s0 + s1) + (s2 + s3));
}

// rsqrt(mean(x^2) + eps)
template <class T, class A = Acc<T>>
LENS_INLINE A reciprocal_rms(const T* x, int64_t D, A eps) {
  const A squares = sum_columns<A>(D, [&](int64_t i, auto lanes, Simd<A> running) LENS_LAMBDA {
    const Simd<A> value = load(x + i, lanes);
    return mul_add(value, value, running);
  });
  return A(1) / std::sqrt(squares / A(D) + eps);
}

// A team costs a few microseconds; below this many elements one thread is faster.
constexpr int64_t kParallelElements = 32768;

// body(begin, end) once per thread over an even split of [0, count). `elements` is the size of the
// whole job.
template <class Body>
inline void parallel_ranges(int64_t count, int64_t elements, Body body) {
#pragma omp parallel if (elements > kParallelElements)
  {
    const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    const int64_t begin = count * thread / threads, end = count * (thread + 1) / threads;
    if (begin < end) body(begin, end);
  }
}

// body(row, sample) over all rows.
template <class Body>
inline void parallel_rows(const int32_t* offsets, int64_t B, int64_t R, int64_t elements,
                          Body body) {
  parallel_ranges(R, elements, [&](int64_t begin, int64_t end) {
    int64_t b = sample_of_row(offsets, B, begin);
    for (int64_t row = begin; row < end; ++row) {
      while (row >= offsets[b + 1]) ++b;
      body(row, b);
    }
  });
}

// body(slot, sample, first row, last row + 1) over the chunks of a column sum, see
// params/common.h.
template <class Body>
inline void parallel_chunks(const int32_t* offsets, int64_t B, int64_t R, int64_t elements,
                            Body body) {
  parallel_ranges(split_slots(R, B), elements, [&](int64_t begin, int64_t end) {
    int64_t b = 0;
    for (int64_t slot = begin; slot < end; ++slot) {
      while (b + 1 < B && split_slot(offsets[b + 1], b + 1) <= slot) ++b;
      const int64_t first = offsets[b] + (slot - split_slot(offsets[b], b)) * kSplitRows;
      const int64_t stop =
          offsets[b + 1] < first + kSplitRows ? offsets[b + 1] : first + kSplitRows;
      if (first < stop) body(slot, b, first, stop);
    }
  });
}

// Sum of the slots of sample b at column i: workspace [slots, planes, D], plane `plane`.
template <class A, class Lanes>
LENS_INLINE Simd<A> sum_slots(const A* workspace, const int32_t* offsets, int64_t b, int64_t planes,
                              int64_t plane, int64_t D, int64_t i, Lanes lanes) {
  const int64_t first = split_slot(offsets[b], b);
  const int64_t stop = first + split_chunks(offsets[b + 1] - offsets[b]);
  Simd<A> sum(0);
  for (int64_t slot = first; slot < stop; ++slot) {
    sum = sum + load(workspace + (slot * planes + plane) * D + i, lanes);
  }
  return sum;
}

// body(begin, end) over ranges of columns that start at multiples of the register width.
template <class A, class Body>
inline void parallel_columns(int64_t D, int64_t elements, Body body) {
  constexpr int kLanes = Simd<A>::kLanes;
  parallel_ranges((D + kLanes - 1) / kLanes, elements, [&](int64_t begin, int64_t end) {
    body(begin * kLanes, end * kLanes < D ? end * kLanes : D);
  });
}

template <class T>
LENS_INLINE void fill_zero(T* p, int64_t count) {
  std::memset(static_cast<void*>(p), 0, size_t(count) * sizeof(T));
}

}  // namespace lens::LENS_ISA
