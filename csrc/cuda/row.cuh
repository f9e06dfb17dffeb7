// What every row kernel is built from: 16-byte chunks, sums over lanes, the sample of a row.
//
// A row is cut into chunks of V = 16 bytes / element consecutive elements; lane l of the row's warp
// owns chunks l, l + 32, and so on, and adds in that order. kVector moves a chunk in one access;
// its opposite moves it element by element, for rows that are misaligned or end inside a chunk.
// Which of the two runs changes neither who owns an element nor the order of any sum: a row has the
// same bits wherever it lies.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "math/offsets.h"
#include "math/types.h"

namespace lens::gpu {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

template <class T>
constexpr int kChunk = 16 / int(sizeof(T));

// ---- chunks: 16 raw bytes <-> arithmetic values
__device__ __forceinline__ void unpack(const uint4& raw, Bf16*, float (&out)[8]) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = bits_to_float(words[i] << 16);
    out[2 * i + 1] = bits_to_float(words[i] & 0xffff0000u);
  }
}
__device__ __forceinline__ void unpack(const uint4& raw, float*, float (&out)[4]) {
  out[0] = bits_to_float(raw.x);
  out[1] = bits_to_float(raw.y);
  out[2] = bits_to_float(raw.z);
  out[3] = bits_to_float(raw.w);
}
__device__ __forceinline__ void unpack(const uint4& raw, double*, double (&out)[2]) {
  out[0] = __hiloint2double(int(raw.y), int(raw.x));
  out[1] = __hiloint2double(int(raw.w), int(raw.z));
}

__device__ __forceinline__ uint32_t bf16_pair(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t word;
  memcpy(&word, &pair, 4);
  return word;
}
__device__ __forceinline__ uint4 pack(Bf16*, const float (&in)[8]) {
  return make_uint4(bf16_pair(in[0], in[1]), bf16_pair(in[2], in[3]), bf16_pair(in[4], in[5]),
                    bf16_pair(in[6], in[7]));
}
__device__ __forceinline__ uint4 pack(float*, const float (&in)[4]) {
  return make_uint4(float_to_bits(in[0]), float_to_bits(in[1]), float_to_bits(in[2]),
                    float_to_bits(in[3]));
}
__device__ __forceinline__ uint4 pack(double*, const double (&in)[2]) {
  return make_uint4(uint32_t(__double2loint(in[0])), uint32_t(__double2hiint(in[0])),
                    uint32_t(__double2loint(in[1])), uint32_t(__double2hiint(in[1])));
}

// Elements column .. column + V - 1 of a row; those past its end are zero.
template <bool kVector, class T>
__device__ __forceinline__ uint4 load_raw(const T* row, int column, int width) {
  if constexpr (kVector) {
    return *reinterpret_cast<const uint4*>(row + column);
  } else {
    Pack<T, kChunk<T>> elements;
#pragma unroll
    for (int j = 0; j < kChunk<T>; ++j) {
      elements.e[j] = column + j < width ? row[column + j] : T{};
    }
    uint4 raw;
    memcpy(&raw, &elements, 16);
    return raw;
  }
}

template <class T>
struct Values {
  Acc<T> e[kChunk<T>];
};

template <class T>
__device__ __forceinline__ Values<T> widened(const uint4& raw) {
  Values<T> out;
  unpack(raw, static_cast<T*>(nullptr), out.e);
  return out;
}

template <bool kVector, class T>
__device__ __forceinline__ Values<T> load(const T* row, int column, int width) {
  return widened<T>(load_raw<kVector>(row, column, width));
}

// The chunk as stored: what a later reader of the row will see.
template <bool kVector, class T>
__device__ __forceinline__ uint4 store(T* row, int column, int width, const Values<T>& values) {
  const uint4 raw = pack(static_cast<T*>(nullptr), values.e);
  if constexpr (kVector) {
    *reinterpret_cast<uint4*>(row + column) = raw;
  } else {
    Pack<T, kChunk<T>> elements;
    memcpy(&elements, &raw, 16);
#pragma unroll
    for (int j = 0; j < kChunk<T>; ++j) {
      if (column + j < width) row[column + j] = elements.e[j];
    }
  }
  return raw;
}

// f(k, column) for each chunk a lane owns: k < K unrolled, so that f may index registers by k, or
// any number of chunks with K = 0.
template <class T, int K, class F>
__device__ __forceinline__ void for_chunks(int lane, int width, F f) {
  if constexpr (K > 0) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int column = (k * kWarp + lane) * kChunk<T>;
      if (column < width) f(k, column);
    }
  } else {
    for (int column = lane * kChunk<T>; column < width; column += kWarp * kChunk<T>) {
      f(0, column);
    }
  }
}

// ---- sums
// Sum over `lanes` neighbouring lanes (a power of two), the same bits in each of them.
template <class A>
__device__ __forceinline__ A sum_lanes(A value, int lanes = kWarp) {
  for (int step = lanes / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, step);
  }
  return value;
}

// The sum of a chunk's terms, pairwise, so that the depth is log2 V.
template <class A, int V>
__device__ __forceinline__ A sum_chunk(A (&terms)[V]) {
#pragma unroll
  for (int half = V / 2; half > 0; half /= 2) {
#pragma unroll
    for (int j = 0; j < half; ++j) terms[j] += terms[j + half];
  }
  return terms[0];
}

// Correctly rounded: one a row costs nothing, and rsqrtf's 2 ulp would be every element's.
__device__ __forceinline__ float inverse_sqrt(float x) { return __frsqrt_rn(x); }
__device__ __forceinline__ double inverse_sqrt(double x) { return rsqrt(x); }

// The quick division: 0 where the divisor is infinite or beyond 2^126, which is the limit, 1 ulp
// more elsewhere. The exact one calls a subroutine for every element.
__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }
__device__ __forceinline__ double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }

// ---- samples
// How many of the samples 1 .. B - 1 start at or before what `starts(b)` is compared with; with
// starts rising, the index of the last such sample. All 32 lanes call it together: one load each
// covers 32 samples.
template <class Starts>
__device__ __forceinline__ int64_t last_sample(int64_t B, int lane, int64_t position,
                                               Starts starts) {
  int64_t found = 0;
  for (int64_t first = 1; first < B; first += kWarp) {
    const int64_t b = first + lane;
    found += __popc(__ballot_sync(kFullWarp, b < B && starts(b) <= position));
  }
  return found;
}

// sample_of_row of math/offsets.h, by a whole warp.
__device__ __forceinline__ int64_t warp_sample_of_row(const int32_t* offsets, int64_t B, int lane,
                                                      int64_t row) {
  return last_sample(B, lane, row, [&](int64_t b) { return int64_t(offsets[b]); });
}

}  // namespace lens::gpu
