// Backward of qk_norm_rope. With g the gradient turned back by the row's angles, n = x * rstd:
//   dx = rstd * (g * weight - n * mean(g * weight * n)), dweight = sum over rows and heads of g *
//   n; dv is copied
//
// dqkv [3, RS, N, H] in the joint layout, image_qkv [RI, 3, N, H], text_qkv [RT, 3, N, H] ->
// dimage_qkv, dtext_qkv of the same shapes, four weight gradients [H]. Moves 8 RS N H elements (v
// is not read again; bfloat16, RS = 8607, N H = 1536: 212 MB). Bound by memory.
//
// A block owns 32 rows of one stream and one slot of the workspace; its warps take the rows in
// turn. The lanes of a head are those of the forward kernel.
#pragma once

#include "cuda/qk_norm_rope.cuh"

namespace lens::gpu {

constexpr int kSlabWarps = 8;

template <class T>
struct HeadSumsShared {
  Acc<T> sum[kSlabWarps][kMaxHead];
};

// registers <= 128: qk_norm_rope_backward_kernel
// registers <= 255: qk_norm_rope_backward_kernel<double, 0, 8
// registers <= 192: qk_norm_rope_backward_kernel<float, 0, 4
// registers <= 192: qk_norm_rope_backward_kernel<Bf16, 0, 2
template <class T, int kLanes, int K, bool kVector>
__global__ void __launch_bounds__(kWarp* kSlabWarps, K == 1 ? 2 : 1)
    qk_norm_rope_backward_kernel(const QkNormRopeBackwardParams p, int lanes_of_head) {
  using A = Acc<T>;
  constexpr int V = kChunk<T>;
  __shared__ HeadSumsShared<T> shared;

  // thread identity
  const int lanes = kLanes > 0 ? kLanes : lanes_of_head;
  const int lane = threadIdx.x, warp = threadIdx.y, N = int(p.N), H = int(p.H);
  const int64_t image_slots = split_chunks(p.RI), slot = blockIdx.x;
  const bool image = slot < image_slots;
  // rows are counted image stream first
  const int64_t begin = image ? slot * kSplitRows : p.RI + (slot - image_slots) * kSplitRows;
  const int64_t stop = image ? p.RI : p.RI + p.RT;
  const int64_t end = begin + kSplitRows < stop ? begin + kSplitRows : stop;
  const int place = lane % lanes * V, first_head = lane / lanes, heads = kWarp / lanes;
  const auto column_of = [&](int k) { return place + k * kWarp * V; };

  // part 0 is q, 1 is k, 2 is v
  for (int part = 0; part < 3; ++part) {
    const T* weights = static_cast<const T*>(head_weight(p, image, part));
    Values<T> weight[K], sums[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      weight[k] = sums[k] = Values<T>{};
      if (column_of(k) < H) weight[k] = load<kVector>(weights, column_of(k), H);
    }

    // row by row of this warp
    for (int64_t row = begin + warp; row < end; row += kSlabWarps) {
      const HeadRow at = head_row_of(p, lane, row);
      const int64_t inside = (at.source * 3 + part) * p.N * p.H;
      const T* x_row = static_cast<const T*>(image ? p.image_qkv : p.text_qkv) + inside;
      T* dx_row = static_cast<T*>(image ? p.dimage_qkv : p.dtext_qkv) + inside;
      const T* d_row =
          static_cast<const T*>(p.dqkv) + (part * (p.RI + p.RT) + at.joint) * p.N * p.H;
      Angles<T> angles[K];
#pragma unroll
      for (int k = 0; k < K; ++k) {
        angles[k] = Angles<T>{};
        if (part < 2 && column_of(k) < H) {
          angles[k] = load_angles<kVector, T>(p.cos, p.sin, at.joint, column_of(k), H);
        }
      }

      // head by head; every lane takes part in the shuffles, also one whose head does not exist
#pragma unroll 2
      for (int base = 0; base < N; base += heads) {
        const int head = base + first_head;
        Values<T> g[K], x[K];
#pragma unroll
        for (int k = 0; k < K; ++k) {
          g[k] = x[k] = Values<T>{};
          if (head >= N || column_of(k) >= H) continue;
          g[k] = load<kVector>(d_row + head * H, column_of(k), H);
          if (part < 2) x[k] = load<kVector>(x_row + head * H, column_of(k), H);
        }
        // v: copied
        if (part == 2) {
#pragma unroll
          for (int k = 0; k < K; ++k) {
            if (head < N && column_of(k) < H) {
              store<kVector>(dx_row + head * H, column_of(k), H, g[k]);
            }
          }
          continue;
        }
        // sums over the head: of x^2 for rstd, of g * weight * x
        A square = A(0), dot = A(0);
#pragma unroll
        for (int k = 0; k < K; ++k) {
          rotate<T>(g[k], angles[k], A(-1));
          A squares[V], dots[V];
#pragma unroll
          for (int j = 0; j < V; ++j) {
            squares[j] = x[k].e[j] * x[k].e[j];
            dots[j] = g[k].e[j] * weight[k].e[j] * x[k].e[j];
          }
          square += sum_chunk(squares);
          dot += sum_chunk(dots);
        }
        const A rstd = inverse_sqrt(sum_lanes(square, lanes) / A(H) + A(p.eps));
        const A mean_gn = sum_lanes(dot, lanes) * rstd / A(H);
        // dx, and what this head adds to dweight
#pragma unroll
        for (int k = 0; k < K; ++k) {
#pragma unroll
          for (int j = 0; j < V; ++j) {
            const A n = x[k].e[j] * rstd;
            sums[k].e[j] += g[k].e[j] * n;
            x[k].e[j] = rms_norm_backward(g[k].e[j] * weight[k].e[j], n, mean_gn, rstd);
          }
          if (head < N && column_of(k) < H) {
            store<kVector>(dx_row + head * H, column_of(k), H, x[k]);
          }
        }
      }
    }
    if (part == 2) return;

    // dweight of the slab into its slot: heads side by side in the warp, then the warps in order
#pragma unroll
    for (int k = 0; k < K; ++k) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        for (int step = lanes; step < kWarp; step *= 2) {
          sums[k].e[j] += __shfl_xor_sync(kFullWarp, sums[k].e[j], step);
        }
        const int column = column_of(k) + j;
        if (first_head == 0 && column < H) shared.sum[warp][column] = sums[k].e[j];
      }
    }
    __syncthreads();
    A* out = static_cast<A*>(p.workspace) + (slot * 2 + part) * p.H;
    for (int column = warp * kWarp + lane; column < H; column += kSlabWarps * kWarp) {
      A sum = shared.sum[0][column];
#pragma unroll
      for (int i = 1; i < kSlabWarps; ++i) sum += shared.sum[i][column];
      out[column] = sum;
    }
    __syncthreads();  // k reuses the sums of q
  }
}

// Stage two: dweight[stream][part] = sum of the stream's slots in a fixed order. One block of 32
// columns x 8 slots side by side per (column tile, stream and part).
// registers <= 48: sum_head_weights_kernel
template <class T>
__global__ void __launch_bounds__(kWarp* kSlabWarps)
    sum_head_weights_kernel(const QkNormRopeBackwardParams p) {
  using A = Acc<T>;
  __shared__ A partial[kSlabWarps][kWarp];
  const int column = int(blockIdx.x) * kWarp + int(threadIdx.x), part = int(blockIdx.y) % 2;
  const bool image = blockIdx.y < 2;
  const int64_t first = image ? 0 : split_chunks(p.RI);
  const int64_t slots = split_chunks(image ? p.RI : p.RT);
  const A* workspace = static_cast<const A*>(p.workspace) + (first * 2 + part) * p.H;

  A sum = A(0);
  if (column < p.H) {
#pragma unroll 4
    for (int64_t slot = threadIdx.y; slot < slots; slot += kSlabWarps) {
      sum += workspace[slot * 2 * p.H + column];
    }
  }
  partial[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= p.H) return;
#pragma unroll
  for (int i = 1; i < kSlabWarps; ++i) sum += partial[i][threadIdx.x];
  void* out = image ? (part == 0 ? p.dimage_q_weight : p.dimage_k_weight)
                    : (part == 0 ? p.dtext_q_weight : p.dtext_k_weight);
  static_cast<T*>(out)[column] = narrow<T>(sum);
}

}  // namespace lens::gpu
