// y = sum over a row's experts of share_k (clamped_swiglu(x W1^T + b1) W2^T + b2), the weights
// packed in MXFP4, activations bfloat16.
//
// Five launches: route, a block a row, chooses experts; group, one block, sorts the pairs of row
// and expert by expert; the product with W1 and its SwiGLU; the product with W2; the sum over a
// row's experts, in their order. Nothing is waited for on the host: the products are launched for
// as many tiles as there may be, and blocks without one return.
//
// A product's block multiplies a tile of kColumns weight rows by kRows inputs of one expert. Stages
// of kStageGroups groups of 32 go through a ring in shared memory: packed weights as they are,
// decoded in registers by the only warp that multiplies them. They are A of the matrix products,
// inputs are B, so that eight inputs fill a product where a token reads each expert alone. A
// group's sum is taken over the bare E2M1 values and joins the total times its scale, which is
// exact at any scale; the same on the CPU. Four lanes share a row of a group, 8 weights each, and
// the products take K in the order that this gives both sides.
//
// The bits of an output depend on its own row and the weights alone: groups in order, no split,
// whatever the tile.
//
// Bound by memory for few rows, 17 bytes for 32 weights (a prompt that hits all experts of
// GPT-OSS-20B reads 423 MB a layer: 88 us at 4.8 TB/s); by the decoding, 17 integer instructions
// for 8 weights of a lane, half of them a cycle, about 60 % of that rate on an H200; and, from
// about 64 rows an expert on, by the products.
#pragma once

#include "cuda/hopper.cuh"
#include "cuda/launch.cuh"
#include "cuda/row.cuh"
#include "math/formulas.h"

namespace lens::gpu {

constexpr int kRouteThreads = 1024, kMostExperts = 1024, kSumThreads = 128, kProductThreads = 128;
constexpr int kStageGroups = 4, kStageDepth = kStageGroups * int(kMxGroup);

// What route and group leave for the products, in p.plan. A tile is at most kRows pairs of one
// expert.
struct MoePlan {
  int32_t* experts;  // [R K] of each pair: of row r pairs r K to r K + K - 1
  int32_t* order;    // [R K] pairs by expert, then as they are numbered
  int32_t* first;    // [E + 1] where in `order` each expert begins
  int32_t* tile;     // [E + 1] the number of its first tile

  LENS_HD explicit MoePlan(const MoeMxfp4Params& p)
      : experts(p.plan),
        order(experts + p.R * p.K),
        first(order + p.R * p.K),
        tile(first + p.E + 1) {}
};

// Larger for the larger logit, of equal ones for the first expert; NaN above all. Never 0.
__device__ __forceinline__ uint64_t rank_key(float logit, int expert) {
  const uint32_t bits = float_to_bits(logit + 0.0f);  // -0 is no smaller than 0
  const uint32_t rising = bits >> 31 ? ~bits : bits | 0x80000000u;
  return uint64_t(logit != logit ? 0xffffffffu : rising) << 32 | (0xffffffffu - uint32_t(expert));
}

// registers <= 64: moe_mxfp4_route_kernel
__global__ void __launch_bounds__(kRouteThreads) moe_mxfp4_route_kernel(const MoeMxfp4Params p) {
  __shared__ float logits[kMostExperts];
  // thread identity
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const int64_t row = blockIdx.x;
  const int width = int(p.D), experts = int(p.E);
  const Bf16* x = static_cast<const Bf16*>(p.x) + row * p.D;

  // a warp an expert
  for (int e = warp; e < experts; e += kRouteThreads / kWarp) {
    const Bf16* weight = static_cast<const Bf16*>(p.router_weight) + e * p.D;
    float sum = 0.0f;
#pragma unroll 4
    for (int column = lane * kChunk<Bf16>; column < width; column += kWarp * kChunk<Bf16>) {
      const Values<Bf16> a = load<true>(x, column, width), b = load<true>(weight, column, width);
#pragma unroll
      for (int j = 0; j < kChunk<Bf16>; ++j) sum = mul_add(a.e[j], b.e[j], sum);
    }
    sum = sum_lanes(sum);
    if (lane == 0) logits[e] = sum + widen(static_cast<const Bf16*>(p.router_bias)[e]);
  }
  __syncthreads();
  if (warp > 0) return;

  // the first warp takes the largest one after the other, and the softmax among them
  int32_t* chosen = MoePlan(p).experts + row * p.K;
  float* shares = static_cast<float*>(p.shares) + row * p.K;
  uint32_t taken = 0;  // bit i: expert 32 i + lane
  float largest = 0.0f, total = 0.0f;
  for (int k = 0; k < int(p.K); ++k) {
    uint64_t key = 0;
    for (int i = 0; i * kWarp + lane < experts; ++i) {
      if (taken >> i & 1) continue;
      const uint64_t other = rank_key(logits[i * kWarp + lane], i * kWarp + lane);
      if (other > key) key = other;
    }
    for (int step = kWarp / 2; step > 0; step /= 2) {
      const uint64_t other = __shfl_xor_sync(kFullWarp, key, step);
      if (other > key) key = other;
    }
    const int e = int(0xffffffffu - uint32_t(key));
    if (e % kWarp == lane) taken |= 1u << (e / kWarp);
    if (k == 0) largest = logits[e];
    const float share = expf(logits[e] - largest);
    total += share;
    if (lane == 0) {
      chosen[k] = e;
      shares[k] = share;
    }
  }
  for (int k = 0; lane == 0 && k < int(p.K); ++k) shares[k] /= total;
}

// One block. A warp an expert counts its pairs, then writes them in order.
// registers <= 64: moe_mxfp4_group_kernel
__global__ void __launch_bounds__(kRouteThreads)
    moe_mxfp4_group_kernel(const MoeMxfp4Params p, const int tile_rows) {
  __shared__ int start[kMostExperts];
  // thread identity
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const int experts = int(p.E), pairs = int(p.R * p.K);
  const MoePlan plan(p);

  for (int e = warp; e < experts; e += kRouteThreads / kWarp) {
    int count = 0;
#pragma unroll 4
    for (int from = 0; from < pairs; from += kWarp) {
      const int pair = from + lane;
      count += __popc(__ballot_sync(kFullWarp, pair < pairs && plan.experts[pair] == e));
    }
    if (lane == 0) start[e] = count;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int pair = 0, tile = 0;
    for (int e = 0; e < experts; ++e) {
      const int count = start[e];
      plan.first[e] = start[e] = pair;
      plan.tile[e] = tile;
      pair += count;
      tile += (count + tile_rows - 1) / tile_rows;
    }
    plan.first[experts] = pair;
    plan.tile[experts] = tile;
  }
  __syncthreads();
  for (int e = warp; e < experts; e += kRouteThreads / kWarp) {
    int at = start[e];
#pragma unroll 4
    for (int from = 0; from < pairs; from += kWarp) {
      const int pair = from + lane;
      const bool own = pair < pairs && plan.experts[pair] == e;
      const unsigned votes = __ballot_sync(kFullWarp, own);
      if (own) plan.order[at + __popc(votes & ((1u << lane) - 1))] = pair;
      at += __popc(votes);
    }
  }
}

// ---- the two products: what they read, and what becomes of a sum
// Sums of the columns n and n + 1 of one pair, n even.
struct GateUp {
  static __device__ __forceinline__ int columns(const MoeMxfp4Params& p) { return int(2 * p.F); }
  static __device__ __forceinline__ int depth(const MoeMxfp4Params& p) { return int(p.D); }
  static __device__ __forceinline__ const uint8_t* blocks(const MoeMxfp4Params& p) {
    return p.gate_up_blocks;
  }
  static __device__ __forceinline__ const uint8_t* scales(const MoeMxfp4Params& p) {
    return p.gate_up_scales;
  }
  static __device__ __forceinline__ const void* bias(const MoeMxfp4Params& p) {
    return p.gate_up_bias;
  }
  static __device__ __forceinline__ const Bf16* input(const MoeMxfp4Params& p, int64_t at) {
    return static_cast<const Bf16*>(p.x) + MoePlan(p).order[at] / p.K * p.D;
  }
  static __device__ __forceinline__ void store(const MoeMxfp4Params& p, int64_t at, int n,
                                               float gate, float up) {
    const float limit = float(p.limit);
    gate = gate > limit ? limit : gate;  // comparisons keep a NaN
    up = up > limit ? limit : up;
    up = up < -limit ? -limit : up;
    const float made = gate * sigmoid(float(p.alpha) * gate) * (up + 1.0f);
    static_cast<Bf16*>(p.hidden)[at * p.F + n / 2] = narrow<Bf16>(made);
  }
};

struct Down {
  static __device__ __forceinline__ int columns(const MoeMxfp4Params& p) { return int(p.D); }
  static __device__ __forceinline__ int depth(const MoeMxfp4Params& p) { return int(p.F); }
  static __device__ __forceinline__ const uint8_t* blocks(const MoeMxfp4Params& p) {
    return p.down_blocks;
  }
  static __device__ __forceinline__ const uint8_t* scales(const MoeMxfp4Params& p) {
    return p.down_scales;
  }
  static __device__ __forceinline__ const void* bias(const MoeMxfp4Params& p) {
    return p.down_bias;
  }
  static __device__ __forceinline__ const Bf16* input(const MoeMxfp4Params& p, int64_t at) {
    return static_cast<const Bf16*>(p.hidden) + at * p.F;
  }
  static __device__ __forceinline__ void store(const MoeMxfp4Params& p, int64_t at, int n,
                                               float one, float two) {
    const int64_t pair = MoePlan(p).order[at];
    *reinterpret_cast<float2*>(static_cast<float*>(p.parts) + pair * p.D + n) = {one, two};
  }
};

// Shared memory of a tile: the ring, then the scales of all its weights. A row of inputs of a stage
// takes 256 bytes, of weights 64; their 16-byte chunks are exchanged so that the lanes of a warp
// that read at a time meet all banks.
template <int kRows, int kColumns>
struct MoeTile {
  static constexpr int kStages = kRows > 8 ? 3 : 8;
  static constexpr int kInputBytes = kStageDepth * 2;                // of a row
  static constexpr int kWeightBytes = kStageGroups * kMxGroupBytes;  // of a row
  static constexpr int kWeights = kRows * kInputBytes;               // their offset in a stage
  static constexpr int kStageBytes = kWeights + kColumns * kWeightBytes;
  static constexpr int kScales = kStages * kStageBytes;  // their offset
  static constexpr int kRowTiles = kRows / 8;
  static constexpr int kColumnTiles = kColumns / 64;  // of a warp, 16 columns each

  static int64_t shared_bytes(int64_t depth) { return kScales + depth / kMxGroup * kColumns; }

  static __device__ __forceinline__ int input_at(int row, int chunk) {
    return row * kInputBytes + (chunk ^ (row & 1) << 2) * 16;
  }
  // Of 16 columns the even ones come first: a lane takes two neighbours, gate and up, in rows g and
  // g + 8 of A.
  static __device__ __forceinline__ int column_of(int place) {
    return place / 16 * 16 + place % 8 * 2 + place / 8 % 2;
  }
  static __device__ __forceinline__ int weight_at(int place, int group) {
    return kWeights + place * kWeightBytes + (group ^ (place >> 1 & 3)) * int(kMxGroupBytes);
  }
};

// Eight E2M1 values, the low nibble first, in pairs of bfloat16.
__device__ __forceinline__ void decode(uint32_t word, uint32_t (&pairs)[4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t four = half ? word >> 16 : word, sizes = four & 0x7777;
    // upper and lower bytes of 0, 0.5, 1, 1.5 and of 2, 3, 4, 6
    const uint32_t upper = byte_permute(0x3f3f3f00, 0x40404040, sizes);
    const uint32_t lower = byte_permute(0xc0800000, 0xc0804000, sizes);
    // a nibble's top bit, its sign, makes 0xff of 0x80: bit 6 tells
    const uint32_t spread = byte_permute(0x80808080, 0x80808080, four);
    const uint32_t signed_upper = upper | (spread << 1 & 0x80808080);
    pairs[2 * half] = byte_permute(lower, signed_upper, 0x5140);
    pairs[2 * half + 1] = byte_permute(lower, signed_upper, 0x7362);
  }
}

// 2^(scale - 127); of 0 a denormal, of 255 NaN: both differ by the same bit from what the shift
// gives.
__device__ __forceinline__ float scale_value(uint32_t scale) {
  return bits_to_float(scale << 23 | (((scale + 1) & 255) < 2 ? 0x00400000u : 0u));
}

// registers <= 224: moe_mxfp4_product_kernel
// registers <= 168: moe_mxfp4_product_kernel<32
// registers <= 96: moe_mxfp4_product_kernel<8
template <int kRows, int kColumns, class Layer>
__global__ void __launch_bounds__(kProductThreads, kRows > 32  ? 2
                                                   : kRows > 8 ? 3
                                                               : 4)
    moe_mxfp4_product_kernel(const MoeMxfp4Params p) {
  using Tile = MoeTile<kRows, kColumns>;
  LENS_DYNAMIC_SHARED(shared);
  __shared__ const Bf16* inputs[kRows];  // null behind the last
  // thread identity
  const int thread = int(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int quad = lane / 4, place = lane % 4;
  const int columns = Layer::columns(p), groups = Layer::depth(p) / int(kMxGroup);
  const MoePlan plan(p);

  // the tile: rows of an expert, columns
  const int64_t slot = blockIdx.x;
  if (slot >= plan.tile[p.E]) return;  // fewer tiles than there might have been
  const int64_t e = last_sample(p.E, lane, slot, [&](int64_t b) { return int64_t(plan.tile[b]); });
  const int64_t begin = plan.first[e] + (slot - plan.tile[e]) * kRows;
  const int rows = int(min(int64_t(kRows), plan.first[e + 1] - begin));
  const int column = int(blockIdx.y) * kColumns, count = min(kColumns, columns - column);
  for (int i = thread; i < kRows; i += kProductThreads) {
    inputs[i] = i < rows ? Layer::input(p, begin + i) : nullptr;
  }
  __syncthreads();

  // all scales of the tile lie in one piece, and arrive with the first stage
  const int64_t weight_row = e * columns + column;
  const uint8_t* blocks = Layer::blocks(p) + weight_row * groups * kMxGroupBytes;
  const uint8_t* scales_from = Layer::scales(p) + weight_row * groups;
  unsigned char* scales = shared + Tile::kScales;
  for (int i = thread * 16; i < count * groups; i += kProductThreads * 16) {
    cp_async_16(scales + i, scales_from + i, true);
  }
  const auto copy = [&](int stage, int group) {
    unsigned char* to = shared + stage * Tile::kStageBytes;
    constexpr int kChunks = Tile::kInputBytes / 16;
#pragma unroll
    for (int i = thread; i < kRows * kChunks; i += kProductThreads) {
      const int row = i / kChunks, chunk = i % kChunks;
      const bool there = inputs[row] != nullptr && group + chunk / 4 < groups;
      const Bf16* from = there ? inputs[row] + group * int(kMxGroup) + chunk * 8 : inputs[0];
      cp_async_16(to + Tile::input_at(row, chunk), from, there);
    }
#pragma unroll
    for (int i = thread; i < kColumns * kStageGroups; i += kProductThreads) {
      const int at = i / kStageGroups, g = i % kStageGroups, n = Tile::column_of(at);
      const bool there = n < count && group + g < groups;
      const int64_t block = there ? int64_t(n) * groups + group + g : 0;
      cp_async_16(to + Tile::weight_at(at, g), blocks + block * kMxGroupBytes, there);
    }
  };
  const int steps = (groups + kStageGroups - 1) / kStageGroups;
#pragma unroll
  for (int stage = 0; stage < Tile::kStages - 1; ++stage) {
    if (stage < steps) copy(stage, stage * kStageGroups);
    cp_async_commit();
  }

  float sums[Tile::kColumnTiles][Tile::kRowTiles][4] = {};
  const int own = warp * 16 * Tile::kColumnTiles;  // first column of the warp
  int stage = 0;
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<Tile::kStages - 2>();
    __syncthreads();  // this stage has arrived for all, and all are done with the one before
    const int next = step + Tile::kStages - 1;
    if (next < steps) copy(stage ? stage - 1 : Tile::kStages - 1, next * kStageGroups);
    cp_async_commit();
    const unsigned char* from = shared + stage * Tile::kStageBytes;
    if (++stage == Tile::kStages) stage = 0;

#pragma unroll
    for (int g = 0; g < kStageGroups; ++g) {
      const int group = step * kStageGroups + g;
      if (group >= groups) break;
      uint32_t weights[Tile::kColumnTiles][2][4];  // of the columns n and n + 1
      float scale[Tile::kColumnTiles][2];
#pragma unroll
      for (int i = 0; i < Tile::kColumnTiles; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int at = own + 16 * i + 8 * h + quad, n = own + 16 * i + 2 * quad + h;
          const unsigned char* word = from + Tile::weight_at(at, g) + 4 * place;
          decode(*reinterpret_cast<const uint32_t*>(word), weights[i][h]);
          scale[i][h] = scale_value(scales[n * groups + group]);
        }
      }
#pragma unroll
      for (int j = 0; j < Tile::kRowTiles; ++j) {
        const uint4 x =
            *reinterpret_cast<const uint4*>(from + Tile::input_at(8 * j + quad, 4 * g + place));
#pragma unroll
        for (int i = 0; i < Tile::kColumnTiles; ++i) {
          const auto& w = weights[i];
          float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
          mma(sum, {w[0][0], w[1][0], w[0][1], w[1][1]}, {x.x, x.y});
          mma(sum, {w[0][2], w[1][2], w[0][3], w[1][3]}, {x.z, x.w});
#pragma unroll
          for (int h = 0; h < 4; ++h) {
            sums[i][j][h] = mul_add(sum[h], scale[i][h / 2], sums[i][j][h]);
          }
        }
      }
    }
  }

  // sums[i][j][2 h + c] is column n + h of row 8 j + 2 place + c
  const Bf16* bias = static_cast<const Bf16*>(Layer::bias(p)) + weight_row;
#pragma unroll
  for (int i = 0; i < Tile::kColumnTiles; ++i) {
    const int n = own + 16 * i + 2 * quad;
    if (n >= count) break;
    const float add[2] = {widen(bias[n]), widen(bias[n + 1])};
#pragma unroll
    for (int j = 0; j < Tile::kRowTiles; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int row = 8 * j + 2 * place + c;
        if (row < rows) {
          Layer::store(p, begin + row, column + n, sums[i][j][c] + add[0],
                       sums[i][j][2 + c] + add[1]);
        }
      }
    }
  }
}

// registers <= 64: moe_mxfp4_sum_kernel
__global__ void __launch_bounds__(kSumThreads) moe_mxfp4_sum_kernel(const MoeMxfp4Params p) {
  // thread identity
  const int64_t row = blockIdx.x;
  const int column = (int(blockIdx.y) * kSumThreads + int(threadIdx.x)) * kChunk<Bf16>;
  if (column >= p.D) return;

  const float* part = static_cast<const float*>(p.parts) + row * p.K * p.D + column;
  const float* shares = static_cast<const float*>(p.shares) + row * p.K;
  Values<Bf16> sum{};
#pragma unroll 2
  for (int k = 0; k < int(p.K); ++k) {
    const float share = shares[k];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Values<float> value = load<true>(part + k * p.D + 4 * half, 0, 4);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        sum.e[4 * half + j] = mul_add(share, value.e[j], sum.e[4 * half + j]);
      }
    }
  }
  store<true>(static_cast<Bf16*>(p.y) + row * p.D, column, int(p.D), sum);
}

}  // namespace lens::gpu
