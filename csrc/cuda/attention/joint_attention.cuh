// out = softmax(q k^T * scale) v within each sample: bfloat16, heads of 64 channels, not causal.
//
// q, k, v [RS, N, 64] in the joint layout, offsets int32 [B + 1] -> image_out [RI, N, 64], text_out
// [RT, N, 64], lse float [N, RS]. Per 128 queries and 128 keys 4 MFLOP on the tensor cores, 16,384
// exponentials, 32 KB from L2; docs/attention.md counts the cycles.
//
// A block stays on its multiprocessor and iterates over tiles of 128 queries of one head. Two
// consumer warpgroups own 64 queries each; of the third, one warp loads tiles by TMA into rings of
// kStages blocks of 128 keys, and one zeroes foreign values: copies cross the border of a sample,
// and a neighbour's value rows, were they NaN, would poison the output even at probability zero, so
// they are zeroed in shared memory before a consumer reads them. Foreign keys are masked in
// registers. The consumers take turns in issuing wgmmas, so that the exponentials of one run under
// the wgmmas of the other.
//
// Keys go from the last block, the only partial one, to the first. A sample's bits depend on
// nothing but the sample: not on its neighbours, the grid, or which block computes a tile.
#pragma once

#include "cuda/attention/schedule.cuh"
#include "cuda/attention/softmax.cuh"
#include "cuda/hopper.cuh"
#include "cuda/ring.cuh"

namespace lens::gpu {

constexpr int kHeadWidth = 64, kBlockKeys = 128, kStages = 4;
constexpr int kConsumers = 2, kConsumerQueries = kTileQueries / kConsumers;
constexpr int kWarpgroup = 128, kAttentionThreads = (kConsumers + 1) * kWarpgroup;
constexpr int kConsumerWarps = kConsumers * kWarpgroup / kWarp;
constexpr int kTileElements = 128 * kHeadWidth;  // of q, k or v: 128 rows
constexpr int kTileBytes = kTileElements * int(sizeof(Bf16));
static_assert(kTileQueries == 128 && kBlockKeys == 128, "one box serves q, k and v");

struct AttentionShared {
  Bf16 q[2][kTileElements];  // the next tile's arrives while this one's is in use
  Bf16 k[kStages][kTileElements];
  Bf16 v[kStages][kTileElements];
  uint64_t q_full[2], q_empty[2];
  uint64_t k_full[kStages], k_empty[kStages];
  uint64_t v_full[kStages], v_empty[kStages];
  uint64_t v_landed[kStages];  // value rows, some of them foreign and to be zeroed: not yet full
  Schedule schedule;
};
constexpr int kAttentionShared = int(sizeof(AttentionShared));

__device__ __forceinline__ int blocks_of(int keys) { return (keys + kBlockKeys - 1) / kBlockKeys; }
// keys of the last block
__device__ __forceinline__ int last_keys(int keys) {
  return keys - (blocks_of(keys) - 1) * kBlockKeys;
}

// One thread: every tile of q, k and v into its ring.
__device__ inline void load_tiles(AttentionShared& shared, const CUtensorMap* q_map,
                                  const CUtensorMap* k_map, const CUtensorMap* v_map,
                                  TileIterator tile) {
  RingPlace<2> q;
  RingPlace<kStages> k, v;
  const auto load = [](Bf16* to, const CUtensorMap* map, uint64_t* full, int head, int row) {
    barrier_arrive_expect_tx(full, kTileBytes);
    tma_load_2d(to, map, full, head * kHeadWidth, row);
  };
  const auto load_values = [&](int block) {
    const bool partial = block == blocks_of(tile.keys) - 1 && last_keys(tile.keys) < kBlockKeys;
    barrier_wait(&shared.v_empty[v.stage], v.parity ^ 1);
    load(shared.v[v.stage], v_map, partial ? &shared.v_landed[v.stage] : &shared.v_full[v.stage],
         tile.head, tile.row() + block * kBlockKeys);
    v.advance();
  };
  for (const CUtensorMap* map : {q_map, k_map, v_map}) tma_prefetch(map);
  while (tile.next()) {
    barrier_wait(&shared.q_empty[q.stage], q.parity ^ 1);
    load(shared.q[q.stage], q_map, &shared.q_full[q.stage], tile.head, tile.row() + tile.query);
    q.advance();
    for (int block = blocks_of(tile.keys) - 1; block >= 0; --block) {
      barrier_wait(&shared.k_empty[k.stage], k.parity ^ 1);
      load(shared.k[k.stage], k_map, &shared.k_full[k.stage], tile.head,
           tile.row() + block * kBlockKeys);
      k.advance();
      if (block + 1 < blocks_of(tile.keys)) load_values(block + 1);  // wanted one block later
    }
    load_values(0);
  }
}

// One warp: zeroes the value rows behind a sample's end, then says that the block is full.
__device__ inline void zero_foreign_values(AttentionShared& shared, TileIterator tile, int lane) {
  RingPlace<kStages> v;
  uint32_t parities = 0;  // of v_landed, by stage
  while (tile.next()) {
    const int valid = last_keys(tile.keys);
    if (valid < kBlockKeys) {
      barrier_wait(&shared.v_landed[v.stage], parities >> v.stage & 1);
      parities ^= 1u << v.stage;
      auto* chunks = reinterpret_cast<uint4*>(shared.v[v.stage]);  // a row is eight, swizzled
      for (int i = valid * 8 + lane; i < kBlockKeys * 8; i += kWarp) {
        chunks[i] = make_uint4(0, 0, 0, 0);
      }
      fence_async_shared();
      __syncwarp();
      if (lane == 0) barrier_arrive(&shared.v_full[v.stage]);
    }
    for (int block = blocks_of(tile.keys); block > 0; --block) v.advance();
  }
}

// A descriptor that is the same in all lanes, in a form from which the compiler sees it and keeps
// it in uniform registers: else moves would stand between the wgmmas of every step, within the
// turn.
__device__ __forceinline__ uint64_t uniform(uint64_t bits) {
  return bits >> 32 << 32 | __shfl_sync(kFullWarp, uint32_t(bits), 0);
}

// Starts s = Q K^T of 64 queries and 128 keys.
__device__ __forceinline__ void start_scores(float (&s)[kBlockKeys / 2], const Bf16* q,
                                             const Bf16* k) {
  const uint64_t a = uniform(matrix_k(q)), b = uniform(matrix_k(k));
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kHeadWidth / 16; ++step) {
    wgmma<kBlockKeys>(s, a + step * kStepK, b + step * kStepK, step > 0);
  }
  wgmma_commit();
}

// Starts o += P V of 64 queries and 128 keys; the first of a tile sets o.
__device__ __forceinline__ void start_values(float (&o)[kHeadWidth / 2],
                                             const uint32_t (&p)[kBlockKeys / 16][4], const Bf16* v,
                                             bool accumulate) {
  const uint64_t b = uniform(matrix_mn(v));
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kBlockKeys / 16; ++step) {
    wgmma_rs<kHeadWidth, Major::kMN>(o, p[step], b + step * kStepMN, accumulate || step > 0);
  }
  wgmma_commit();
}

// The exponentials of a block as the first factor of P V.
__device__ __forceinline__ void round_scores(uint32_t (&p)[kBlockKeys / 16][4],
                                             const float (&s)[kBlockKeys / 2]) {
#pragma unroll
  for (int i = 0; i < kBlockKeys / 4; ++i) p[i / 4][i % 4] = bf16_pair(s[2 * i], s[2 * i + 1]);
}

// o / sum of a thread's two rows to where the out-projections read them, and the rows' lse.
__device__ __forceinline__ void write_rows(const JointAttentionParams& p, const TileIterator& tile,
                                           const float (&o)[kHeadWidth / 2], const RowSums& rows,
                                           bool shifted, int first, int lane) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float sum = sum_of_row(rows, h);  // by all lanes, before any of them leaves
    const int query = first + 8 * h + lane / 4;
    if (query >= tile.queries) continue;
    const float inverse = __fdividef(1.0f, sum);
    const bool image = query < tile.images;
    const int64_t row = image ? tile.image_row + query : tile.text_row + query - tile.images;
    auto* out = static_cast<Bf16*>(image ? p.image_out : p.text_out) +
                (row * p.N + tile.head) * kHeadWidth + 2 * (lane & 3);
#pragma unroll
    for (int j = 0; j < kHeadWidth / 8; ++j) {
      const float* pair = o + 4 * j + 2 * h;
      *reinterpret_cast<uint32_t*>(out + 8 * j) = bf16_pair(pair[0] * inverse, pair[1] * inverse);
    }
    if (p.lse != nullptr && (lane & 3) == 0) {
      const float shift = shifted ? rows.shift[h] : 0.0f;
      static_cast<float*>(p.lse)[tile.head * (p.RI + p.RT) + tile.row() + query] =
          (shift + log2f(sum)) * float(1 / kLog2E);
    }
  }
}

// A consumer warpgroup: 64 queries of every tile.
template <Softmax kSoftmax, int kPolynomial>
__device__ __forceinline__ void attend(AttentionShared& shared, const JointAttentionParams& p,
                                       TileIterator tile, int consumer) {
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp % 4;
  const float scale = float(p.scale * kLog2E);  // scores in powers of two
  // named barrier 1 + c: consumer c may issue its wgmmas
  const int turn = 1 + consumer, other = 1 + (consumer + 1) % kConsumers;
  constexpr int kBoth = kConsumers * kWarpgroup;
  const auto release = [&](uint64_t* empty) {
    __syncwarp();
    if (lane == 0) barrier_arrive(empty);
  };
  RingPlace<2> q;
  RingPlace<kStages> k, v;
  if (consumer == 1) named_barrier_arrive(other, kBoth);  // consumer 0 begins

  while (tile.next()) {
    float s[kBlockKeys / 2], o[kHeadWidth / 2], rescale[2];
    uint32_t probabilities[kBlockKeys / 16][4];
    RowSums rows;
    const Bf16* queries = shared.q[q.stage] + consumer * kConsumerQueries * kHeadWidth;

    // the last block of keys, the one with a mask: its scores and probabilities
    barrier_wait(&shared.q_full[q.stage], q.parity);
    barrier_wait(&shared.k_full[k.stage], k.parity);
    named_barrier_sync(turn, kBoth);
    start_scores(s, queries, shared.k[k.stage]);
    named_barrier_arrive(other, kBoth);
    wgmma_wait<0>(s);
    release(&shared.k_empty[k.stage]);
    k.advance();
    mask_keys(s, last_keys(tile.keys), lane);
    exponentials<kSoftmax, 0, true>(s, scale, rows, rescale);  // a polynomial knows no infinity
    barrier_wait(&shared.v_full[v.stage], v.parity);
    round_scores(probabilities, s);

    // the blocks before it: scores of this one, under them P V of the block after it
    bool summed = false;  // o holds something
    for (int block = blocks_of(tile.keys) - 2; block >= 0; --block) {
      barrier_wait(&shared.k_full[k.stage], k.parity);
      named_barrier_sync(turn, kBoth);
      start_scores(s, queries, shared.k[k.stage]);
      start_values(o, probabilities, shared.v[v.stage], summed);
      named_barrier_arrive(other, kBoth);
      summed = true;
      wgmma_wait<1>(s);
      release(&shared.k_empty[k.stage]);
      k.advance();
      exponentials<kSoftmax, kPolynomial, false>(s, scale, rows, rescale);
      uint64_t* const read = &shared.v_empty[v.stage];
      v.advance();
      // The values of the scores at hand. Here, because the branch in it also keeps the compiler
      // from moving the exponentials behind the wait for the wgmmas that they are to run under.
      barrier_wait(&shared.v_full[v.stage], v.parity);
      wgmma_wait<0>(o, s);
      release(read);
      if constexpr (kSoftmax == Softmax::kRunning) {
#pragma unroll
        for (int i = 0; i < kHeadWidth / 2; ++i) o[i] *= rescale[i / 2 % 2];
      }
      round_scores(probabilities, s);
    }

    // P V of the first block, and the tile's rows
    release(&shared.q_empty[q.stage]);
    q.advance();
    start_values(o, probabilities, shared.v[v.stage], summed);
    wgmma_wait<0>(o);
    release(&shared.v_empty[v.stage]);
    v.advance();
    const int row = tile.query + consumer * kConsumerQueries + warp * 16;
    write_rows(p, tile, o, rows, kSoftmax == Softmax::kRunning, row, lane);
  }
  if (consumer == 0) named_barrier_sync(turn, kBoth);  // the last turn consumer 1 gave away
}

// registers <= 168: joint_attention_kernel
template <Softmax kSoftmax, int kPolynomial>
__global__ void __launch_bounds__(kAttentionThreads, 1)
    joint_attention_kernel(const __grid_constant__ CUtensorMap q_map,
                           const __grid_constant__ CUtensorMap k_map,
                           const __grid_constant__ CUtensorMap v_map,
                           const JointAttentionParams p) {
  LENS_DYNAMIC_SHARED(bytes);
  auto& shared = *reinterpret_cast<AttentionShared*>(bytes);

  // barriers and schedule
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      barrier_init(&shared.q_full[i], 1);
      barrier_init(&shared.q_empty[i], kConsumerWarps);
    }
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&shared.k_full[i], 1);
      barrier_init(&shared.k_empty[i], kConsumerWarps);
      barrier_init(&shared.v_full[i], 1);
      barrier_init(&shared.v_empty[i], kConsumerWarps);
      barrier_init(&shared.v_landed[i], 1);
    }
    fence_barrier_init();
  }
  make_schedule(shared.schedule, p);
  __syncthreads();

  // roles: consumers, and a warpgroup that loads
  const int warpgroup = __shfl_sync(kFullWarp, int(threadIdx.x) / kWarpgroup, 0);
  const TileIterator tiles(shared.schedule, p);
  if (warpgroup < kConsumers) {
    registers_up<232>();
    attend<kSoftmax, kPolynomial>(shared, p, tiles, warpgroup);
  } else {
    registers_down<40>();
    const int warp = int(threadIdx.x) / kWarp % 4, lane = int(threadIdx.x) % kWarp;
    if (warp == 0 && lane == 0) load_tiles(shared, &q_map, &k_map, &v_map, tiles);
    if (warp == 1) zero_foreign_values(shared, tiles, lane);
  }
}

}  // namespace lens::gpu
