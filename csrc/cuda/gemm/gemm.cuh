// The GEMM d = x weight^T over the rows of two streams, image and text, each with weights of its
// own, in one persistent launch; an epilogue takes d in registers and stores what becomes of it.
//
// x [rows, K], weight [columns, K], bfloat16; d float. A tile is M rows by N columns; blocks take
// tiles blockIdx, blockIdx + gridDim, .. One warp of the first warpgroup copies tiles of K = 64
// into a ring of shared memory, M / 64 more warpgroups multiply 64 rows each and hold N / 2
// accumulators per thread. They meet nowhere but at the ring, so one may store while another still
// multiplies, and the copies of the next tile run under both. A row's bits depend on that row and
// the weights alone: K in order, no split.
//
// In a cluster two blocks take the tiles of two neighbouring row tiles at the same time. Each
// copies its own rows, and half of the columns to both: a stage is full with both halves and empty
// when the consumers of both are done. The second block of a cluster whose rows end before it
// multiplies the zeros it is sent.
//
// Bound by the tensor cores or L2: M x N x 64 multiply-adds take M N / 32 cycles, their copies are
// (M + N) x 128 bytes; see docs/gemm.md.
#pragma once

#include <algorithm>
#include <iterator>

#include "cuda/hopper.cuh"
#include "cuda/launch.cuh"
#include "cuda/ring.cuh"
#include "cuda/tensor_map.cuh"

namespace lens::gpu {

constexpr int kTileK = 64;

// Tiles of M rows by N columns: threads, registers, and a ring of as many stages as fit.
template <int M, int N>
struct GemmTile {
  static constexpr int kConsumers = M / 64;  // warpgroups
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kCopierRegisters = kConsumers == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : 160;
  static constexpr int kXBytes = M * kTileK * 2, kStageBytes = kXBytes + N * kTileK * 2;
  static constexpr int kStages = (227 * 1024 - 256) / kStageBytes;
  static constexpr int kBarriers = kStages * kStageBytes;  // their offset, behind the stages
  static constexpr int kSharedBytes = kBarriers + 2 * kStages * 8;
};

struct TileAt {
  int stream, row, column;  // in tiles
};

// Tiles of both streams, the image's first. Within a stream, bands of kBand row tiles, column by
// column: what runs at a time shares few rows and few columns, which then come from L2.
struct TileOrder {
  static constexpr int kBand = 16;
  int image_rows, text_rows, columns;  // in tiles

  LENS_HD int count() const { return (image_rows + text_rows) * columns; }

  LENS_HD TileAt operator[](int t) const {
    const bool text = t >= image_rows * columns;
    const int rows = text ? text_rows : image_rows;
    if (text) t -= image_rows * columns;
    const int band = t / (kBand * columns), within = t - band * kBand * columns;
    const int left = rows - band * kBand, height = left < kBand ? left : kBand;
    return {text ? kText : kImage, band * kBand + within % height, within / height};
  }
};

struct GemmMaps {
  CUtensorMap x[2], weight[2];
};

// Where a consumer thread's accumulators lie: d[16 g + 4 j + 2 h + e] is row `row + 8 h`, column
// `column + 32 g + 8 quad + 2 j + e` of its stream, 8 neighbours of each 32. A wgmma leaves 2
// neighbours of each 8 in a thread, so the copies bring row 8 q + 2 j + e of each 32 of the weight
// to row 8 j + 2 q + e in shared memory.
struct Fragment {
  int stream, row, column, quad;  // stream and column are the tile's: the same in all lanes
};

// Epilogue: struct with Params; kParts: weight is [kParts, F, K], and a tile takes the same N /
// kParts columns of every part, one part after the other in d; store<M, N>(p, d, fragment), by all
// threads.
// registers <= 168: gemm_kernel
// registers <= 128: gemm_kernel<192
template <int M, int N, class Epilogue>
__global__ void __launch_bounds__(GemmTile<M, N>::kThreads, 1)
    gemm_kernel(const __grid_constant__ GemmMaps maps, const TileOrder order, const int depth,
                const int part_columns, const int cluster, const typename Epilogue::Params p) {
  constexpr int kPartN = N / Epilogue::kParts, kHalfBytes = N / 2 * kTileK * 2;
  using Ring = GemmTile<M, N>;
  LENS_DYNAMIC_SHARED(shared);
  auto* full = reinterpret_cast<uint64_t*>(shared + Ring::kBarriers);
  uint64_t* empty = full + Ring::kStages;

  // thread identity; the warp from lane 0, so that descriptors are known to be the same in all
  // lanes
  const int warp = __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0);
  const int lane = int(threadIdx.x) % 32;
  const int tiles = order.count(), rank = cluster > 1 ? int(cluster_rank()) : 0;
  const int first = int(blockIdx.x) / cluster, stride = int(gridDim.x) / cluster;

  // barriers, in a cluster known to both blocks before either uses the other's
  if (threadIdx.x == 0) {
    for (int s = 0; s < Ring::kStages; ++s) {
      barrier_init(full + s, 1);
      barrier_init(empty + s, 4 * Ring::kConsumers * cluster);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (cluster > 1) {
    cluster_arrive();
    cluster_wait();
  }

  // the first warpgroup copies, one thread of it
  if (warp < 4) {
    registers_down<Ring::kCopierRegisters>();
    if (warp != 0 || !elect_one()) return;
    for (const CUtensorMap& map : maps.x) tma_prefetch(&map);
    for (const CUtensorMap& map : maps.weight) tma_prefetch(&map);
    const int half_columns = Epilogue::kParts > 1 ? part_columns : N / 2;
    RingPlace<Ring::kStages> at;
    for (int t = first; t < tiles; t += stride) {
      const TileAt tile = order[t];
      for (int k = 0; k < depth; k += kTileK) {
        unsigned char* to = shared + at.stage * Ring::kStageBytes;
        barrier_wait(empty + at.stage, at.parity ^ 1);
        barrier_arrive_expect_tx(full + at.stage, Ring::kStageBytes);
        tma_load_2d(to, &maps.x[tile.stream], full + at.stage, k, (tile.row * cluster + rank) * M);
        const CUtensorMap* weight = &maps.weight[tile.stream];
        unsigned char* piece = to + Ring::kXBytes + rank * kHalfBytes;
        if (cluster > 1) {
          const int column = tile.column * kPartN + rank * half_columns;
          tma_multicast_5d(piece, weight, full + at.stage, 3, k, 0, 0, 0, column / 32);
        } else {
#pragma unroll
          for (int part = 0; part < Epilogue::kParts; ++part) {
            const int column = part * part_columns + tile.column * kPartN;
            tma_load_5d(piece + part * kHalfBytes, weight, full + at.stage, k, 0, 0, 0,
                        column / 32);
          }
        }
        at.advance();
      }
    }
    for (int s = 0; cluster > 1 && s < Ring::kStages; ++s) {  // the other block's last arrivals
      barrier_wait(empty + at.stage, at.parity ^ 1);
      at.advance();
    }
    return;
  }

  // the others multiply
  registers_up<Ring::kConsumerRegisters>();
  const int part = warp / 4 - 1;  // of the tile's rows, 64 each
  const bool releases = lane < cluster;
  const uint32_t release = cluster_address(empty, unsigned(releases ? rank ^ lane : rank));
  RingPlace<Ring::kStages> at;
  for (int t = first; t < tiles; t += stride) {
    const TileAt tile = order[t];
    float d[N / 2];
    int held = -1;  // the stage that wgmmas under way read
    for (int k = 0; k < depth; k += kTileK) {
      const unsigned char* from = shared + at.stage * Ring::kStageBytes;
      const uint64_t x = matrix_k(from + part * 64 * kTileK * 2);
      const uint64_t weight = matrix_k(from + Ring::kXBytes);
      barrier_wait(full + at.stage, at.parity);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < kTileK / 16; ++step) {
        wgmma<N>(d, x + step * kStepK, weight + step * kStepK, k + step > 0);
      }
      wgmma_commit();
      wgmma_wait<1>();
      if (held >= 0 && releases) cluster_barrier_arrive(release + uint32_t(held) * 8);
      held = at.stage;
      at.advance();
    }

    // the tile is summed: give the last stage back, run the epilogue
    wgmma_wait<0>(d);
    if (releases) cluster_barrier_arrive(release + uint32_t(held) * 8);
    Epilogue::template store<M, N>(
        p, d,
        Fragment{tile.stream,
                 (tile.row * cluster + rank) * M + part * 64 + warp % 4 * 16 + lane / 4,
                 tile.column * kPartN, lane % 4});
  }
}

// ---- host side

// x and weight of one stream; no rows, no pointers.
struct GemmOperands {
  const void *x, *weight;
  int64_t rows;
};

inline TileOrder tile_order(int64_t image_rows, int64_t text_rows, int64_t columns, int M, int N) {
  return {int(ceil_div(image_rows, M)), int(ceil_div(text_rows, M)), int(ceil_div(columns, N))};
}

// Multiprocessors that run blocks at the same time: all, or as many as whole clusters cover.
template <int M, int N, class Epilogue>
int busy_multiprocessors(int cluster, int multiprocessors) {
  using Ring = GemmTile<M, N>;
  if (cluster == 1) return multiprocessors;
  if (N % 64) return 0;  // no halves of whole 32s
  constexpr auto kernel = &gemm_kernel<M, N, Epilogue>;
  if (allow_shared<kernel>(Ring::kSharedBytes)) return 0;
  const ClusterLaunch launch(cluster, cluster, Ring::kThreads, Ring::kSharedBytes, nullptr);
  return cluster * active_clusters<kernel>(launch.config, multiprocessors);
}

template <int M, int N, class Epilogue>
int launch_tiles(const typename Epilogue::Params& p, const GemmOperands& image,
                 const GemmOperands& text, int64_t columns, int cluster, int multiprocessors) {
  using Ring = GemmTile<M, N>;
  GemmMaps maps;
  const GemmOperands streams[] = {image, text};
  const uint32_t columns_a_copy = N / std::max(Epilogue::kParts, cluster);
  for (int s = 0; s < 2; ++s) {
    // a stream without rows has no tiles, but its maps are prefetched: those of the other stream
    const GemmOperands& stream = streams[streams[s].rows ? s : 1 - s];
    if (const int error =
            make_tensor_map(&maps.x[s], stream.x, {p.K, stream.rows}, {p.K}, {kTileK, M})) {
      return error;
    }
    // dimensions behind K: e, q and j of Fragment, then the 32s
    if (const int error = make_tensor_map(
            &maps.weight[s], stream.weight, {p.K, 2, 4, 4, columns / 32},
            {p.K, 8 * p.K, 2 * p.K, 32 * p.K}, {kTileK, 2, 4, 4, columns_a_copy / 32})) {
      return error;
    }
  }
  if (const int error = allow_shared<&gemm_kernel<M, N, Epilogue>>(Ring::kSharedBytes)) {
    return error;
  }
  const TileOrder order = tile_order(image.rows, text.rows, columns, M * cluster, N);
  const int clusters = std::min(order.count(), multiprocessors / cluster);
  const ClusterLaunch launch(clusters * cluster, cluster, Ring::kThreads, Ring::kSharedBytes,
                             p.stream);
  cudaLaunchKernelEx(&launch.config, gemm_kernel<M, N, Epilogue>, maps, order, int(p.K),
                     int(columns / Epilogue::kParts), cluster, p);
  return int(cudaGetLastError());
}

template <int M, int N>
struct Shape {
  static constexpr int kM = M, kN = N;
};

// Cycles the slowest multiprocessor takes: whole waves of tiles, each bound by its wgmmas or by its
// copies out of L2, and its epilogue, by the instructions counted in the machine code.
inline int64_t gemm_cycles(int64_t tiles, int multiprocessors, int64_t depth, int M, int N,
                           int cluster) {
  constexpr int64_t kL2Bytes = 40;  // a cycle and multiprocessor, predicted
  const int64_t multiply = M * N / 32, copies = (M + N / cluster) * kTileK * 2 / kL2Bytes;
  const int64_t step = multiply > copies ? multiply : copies, epilogue = M * N / 10;
  return ceil_div(tiles, multiprocessors) * (depth / kTileK * step + epilogue);
}

// A way to compute a GEMM: a tile shape, in clusters or not, and the cycles predicted for it.
template <class Params>
struct GemmPlan {
  int64_t cycles;
  int cluster, multiprocessors;
  int (*launch)(const Params&, const GemmOperands& image, const GemmOperands& text, int64_t columns,
                int cluster, int multiprocessors);
};
constexpr int64_t kNever = int64_t(1) << 62;  // cycles of what this device or the caller rules out

template <int M, int N, class Epilogue>
GemmPlan<typename Epilogue::Params> gemm_plan(const typename Epilogue::Params& p,
                                              const GemmOperands& image, const GemmOperands& text,
                                              int64_t columns, int cluster, int multiprocessors) {
  if (p.cluster && p.cluster != cluster) return {kNever, cluster, 0, nullptr};
  const int busy = busy_multiprocessors<M, N, Epilogue>(cluster, multiprocessors);
  if (busy == 0) return {kNever, cluster, 0, nullptr};
  const int tiles = tile_order(image.rows, text.rows, columns, M * cluster, N).count();
  return {gemm_cycles(tiles, busy / cluster, p.K, M, N, cluster), cluster, busy,
          launch_tiles<M, N, Epilogue>};
}

// Takes the quickest of the shapes, in clusters or not (p.cluster, unless 0), which changes no
// bits: an accumulator sees the same multiplications in the same order. columns: rows of weight, of
// all parts. cudaErrorNotSupported: no sm_90, other types than bfloat16, or sizes beyond the tiles,
// which are 64 of K and of columns (32 of F).
template <class Epilogue, int... kM, int... kN>
int launch_gemm(const typename Epilogue::Params& p, const GemmOperands& image,
                const GemmOperands& text, int64_t columns, Shape<kM, kN>...) {
  constexpr int64_t kMostRows = 1 << 24, kMostColumns = 1 << 20;  // tiles fit an int
  if (image.rows + text.rows == 0) return int(cudaSuccess);
  if (p.dtype != DType::kBFloat16 || p.K < kTileK || p.K % kTileK || columns < 64 || columns % 64 ||
      image.rows + text.rows > kMostRows || columns > kMostColumns || p.K > kMostColumns) {
    return int(cudaErrorNotSupported);
  }
  const int multiprocessors = hopper_multiprocessors();
  if (multiprocessors == 0) return int(cudaErrorNotSupported);
  const GemmPlan<typename Epilogue::Params> plans[] = {
      gemm_plan<kM, kN, Epilogue>(p, image, text, columns, 1, multiprocessors)...,
      gemm_plan<kM, kN, Epilogue>(p, image, text, columns, 2, multiprocessors)...};
  const auto& plan =
      *std::min_element(std::begin(plans), std::end(plans),
                        [](const auto& one, const auto& two) { return one.cycles < two.cycles; });
  if (plan.cycles == kNever) return int(cudaErrorNotSupported);
  return plan.launch(p, image, text, columns, plan.cluster, plan.multiprocessors);
}

}  // namespace lens::gpu
