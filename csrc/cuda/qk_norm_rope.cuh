// q, k: head-wise RMSNorm with the stream's weight, then pairs (2i, 2i + 1) turned by angle i; v is
// copied. Both streams in one launch, written into the joint layout.
//
// image_qkv [RI, 3, N, H], text_qkv [RT, 3, N, H] -> qkv [3, RS, N, H]; weights [H]; cos, sin acc
// [RS, H / 2]; offsets int32 [B + 1]. Moves 6 RS N H elements and RS H acc (bfloat16, RS = 8607,
// N H = 1536: 163 MB). Bound by memory.
//
// A head lies across `lanes` neighbouring lanes of a warp, one 16-byte chunk each: 8 lanes at 64
// bfloat16, so a warp takes four heads at once and finds a head's sum in three shuffles. A warp
// owns one of q, k, v of one row. Which lane holds what depends on H and the type alone.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/row.cuh"
#include "math/formulas.h"

namespace lens::gpu {

constexpr int kHeadWarps = 6;  // warps of a block: q, k, v of two rows
// chunks per lane of a head wider than a warp's 32 chunks, up to kMaxHead
template <class T>
constexpr int kWideHead = kMaxHead / (kWarp * kChunk<T>);

inline int lanes_of_head(int64_t H, int chunk) {
  int lanes = 1;
  while (lanes < kWarp && lanes * chunk < H) lanes *= 2;
  return lanes;
}

// A packed row of either stream and where it goes.
struct HeadRow {
  bool image;
  int64_t source, joint;  // row in its stream, row in the joint layout
};

// Rows are counted image stream first. All 32 lanes call it together.
template <class Params>
__device__ __forceinline__ HeadRow head_row_of(const Params& p, int lane, int64_t row) {
  HeadRow at;
  at.image = row < p.RI;
  at.source = at.image ? row : row - p.RI;
  const int64_t b =
      warp_sample_of_row(at.image ? p.image_offsets : p.text_offsets, p.B, lane, at.source);
  at.joint = at.image ? joint_row_of_image(p.text_offsets, b, at.source)
                      : joint_row_of_text(p.image_offsets, b, at.source);
  return at;
}

template <class Params>
__device__ __forceinline__ const void* head_weight(const Params& p, bool image, int part) {
  return image ? (part == 0 ? p.image_q_weight : p.image_k_weight)
               : (part == 0 ? p.text_q_weight : p.text_k_weight);
}

// The angles of a chunk, the same for every head of a row.
template <class T>
struct Angles {
  Acc<T> cos[kChunk<T> / 2], sin[kChunk<T> / 2];
};

template <bool kVector, class T>
__device__ __forceinline__ Angles<T> load_angles(const void* cos, const void* sin, int64_t row,
                                                 int column, int H) {
  using A = Acc<T>;
  constexpr int kPairs = kChunk<T> / 2;
  const A* c = static_cast<const A*>(cos) + row * (H / 2);
  const A* s = static_cast<const A*>(sin) + row * (H / 2);
  Angles<T> out;
  if constexpr (kVector) {
    const auto cs = *reinterpret_cast<const Pack<A, kPairs>*>(c + column / 2);
    const auto sn = *reinterpret_cast<const Pack<A, kPairs>*>(s + column / 2);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      out.cos[i] = cs.e[i];
      out.sin[i] = sn.e[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const bool inside = column + 2 * i < H;
      out.cos[i] = inside ? c[column / 2 + i] : A(0);
      out.sin[i] = inside ? s[column / 2 + i] : A(0);
    }
  }
  return out;
}

// Turns the pairs of a chunk by their angles times `direction`, which is 1 or -1.
template <class T>
__device__ __forceinline__ void rotate(Values<T>& x, const Angles<T>& angles, Acc<T> direction) {
#pragma unroll
  for (int i = 0; i < kChunk<T> / 2; ++i) {
    const Acc<T> even = x.e[2 * i], odd = x.e[2 * i + 1];
    const Acc<T> sine = direction * angles.sin[i];
    x.e[2 * i] = mul_add(even, angles.cos[i], -(odd * sine));
    x.e[2 * i + 1] = mul_add(even, sine, odd * angles.cos[i]);
  }
}

// kLanes: lanes of a head known at compile time, or 0. K: chunks per lane, 1 but for wide heads.
// registers <= 80: qk_norm_rope_kernel
// registers <= 168: qk_norm_rope_kernel<double, 0, 8
template <class T, int kLanes, int K, bool kVector>
__global__ void __launch_bounds__(kWarp* kHeadWarps)
    qk_norm_rope_kernel(const QkNormRopeParams p, int lanes_of_head) {
  using A = Acc<T>;
  constexpr int V = kChunk<T>;
  // thread identity
  const int lanes = kLanes > 0 ? kLanes : lanes_of_head;
  const int lane = threadIdx.x, N = int(p.N), H = int(p.H);
  const int64_t item = int64_t(blockIdx.x) * kHeadWarps + threadIdx.y;
  const int64_t rows = p.RI + p.RT, row = item / 3;
  const int part = int(item % 3);
  if (row >= rows) return;
  const HeadRow at = head_row_of(p, lane, row);
  const int slot = lane % lanes * V, first_head = lane / lanes, heads = kWarp / lanes;
  const T* from = static_cast<const T*>(at.image ? p.image_qkv : p.text_qkv) +
                  (at.source * 3 + part) * p.N * p.H;
  T* to = static_cast<T*>(p.qkv) + (part * rows + at.joint) * p.N * p.H;
  const auto column_of = [&](int k) { return slot + k * kWarp * V; };

  // v: copied
  if (part == 2) {
#pragma unroll 3
    for (int head = first_head; head < N; head += heads) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        if (column_of(k) >= H) continue;
        const Values<T> v = load<kVector>(from + head * H, column_of(k), H);
        store<kVector>(to + head * H, column_of(k), H, v);
      }
    }
    return;
  }

  // q and k: what all heads of the row share
  const T* weights = static_cast<const T*>(head_weight(p, at.image, part));
  Values<T> weight[K];
  Angles<T> angles[K];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    weight[k] = Values<T>{};
    angles[k] = Angles<T>{};
    if (column_of(k) < H) {
      weight[k] = load<kVector>(weights, column_of(k), H);
      angles[k] = load_angles<kVector, T>(p.cos, p.sin, at.joint, column_of(k), H);
    }
  }

  // head by head; every lane takes part in the shuffles, also one whose head does not exist
#pragma unroll 3
  for (int base = 0; base < N; base += heads) {
    const int head = base + first_head;
    Values<T> x[K];
    A square = A(0);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      x[k] = Values<T>{};
      if (head < N && column_of(k) < H) x[k] = load<kVector>(from + head * H, column_of(k), H);
      A squares[V];
#pragma unroll
      for (int j = 0; j < V; ++j) squares[j] = x[k].e[j] * x[k].e[j];
      square += sum_chunk(squares);
    }
    const A rstd = inverse_sqrt(sum_lanes(square, lanes) / A(H) + A(p.eps));
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (head >= N || column_of(k) >= H) continue;
#pragma unroll
      for (int j = 0; j < V; ++j) x[k].e[j] *= rstd * weight[k].e[j];
      rotate<T>(x[k], angles[k], A(1));
      store<kVector>(to + head * H, column_of(k), H, x[k]);
    }
  }
}

}  // namespace lens::gpu
