#include "cuda/moe_mxfp4.cuh"

namespace lens {
namespace gpu {
namespace {

// What every GPU from sm_80 on gives a block, 99 KB, but for the pointers to its inputs.
constexpr int kMoeShared = 98 * 1024;

// As many tiles as there may be: full ones, and one that is not for every expert with rows.
template <int kRows, int kColumns, class Layer>
int launch_product(const MoeMxfp4Params& p, int64_t columns, int64_t depth) {
  using Tile = MoeTile<kRows, kColumns>;
  constexpr auto kernel = &moe_mxfp4_product_kernel<kRows, kColumns, Layer>;
  if (const int error = allow_shared<kernel>(kMoeShared)) return error;
  const int64_t pairs = p.R * p.K, tiles = pairs / kRows + (pairs < p.E ? pairs : p.E);
  const dim3 grid(unsigned(tiles), unsigned(ceil_div(columns, kColumns)));
  LENS_LAUNCH_SHARED(kernel, grid, dim3(kProductThreads), size_t(Tile::shared_bytes(depth)),
                     p.stream, p);
  return int(cudaSuccess);
}

template <int kRows, int kColumns>
bool tile_fits(const MoeMxfp4Params& p) {
  const int64_t depth = p.D > p.F ? p.D : p.F;
  return MoeTile<kRows, kColumns>::shared_bytes(depth) <= kMoeShared;
}

template <int kRows, int kColumns>
int launch_tiles(const MoeMxfp4Params& p) {
  LENS_LAUNCH(moe_mxfp4_route_kernel, dim3(unsigned(p.R)), dim3(kRouteThreads), p.stream, p);
  LENS_LAUNCH(moe_mxfp4_group_kernel, dim3(1), dim3(kRouteThreads), p.stream, p, kRows);
  if (const int error = launch_product<kRows, kColumns, GateUp>(p, 2 * p.F, p.D)) return error;
  if (const int error = launch_product<kRows, kColumns, Down>(p, p.D, p.F)) return error;
  const dim3 grid(unsigned(p.R), unsigned(ceil_div(p.D, kSumThreads * kChunk<Bf16>)));
  LENS_LAUNCH(moe_mxfp4_sum_kernel, grid, dim3(kSumThreads), p.stream, p);
  return int(cudaGetLastError());
}

}  // namespace
}  // namespace gpu

// cudaErrorNotSupported: other types than bfloat16, more than 1024 experts, D or F beyond the
// scales that shared memory holds (26,000), arrays that are not on 16-byte boundaries.
int moe_mxfp4_cuda(const MoeMxfp4Params& p) {
  using namespace gpu;
  constexpr int64_t kMostPairs = int64_t(1) << 30, kMostColumns = 65535 * 64;
  if (p.R == 0) return int(cudaSuccess);
  const bool aligned = chunks_fit<uint8_t>(16, {{p.x, 0},
                                                {p.router_weight, 0},
                                                {p.gate_up_blocks, 0},
                                                {p.gate_up_scales, 0},
                                                {p.down_blocks, 0},
                                                {p.down_scales, 0},
                                                {p.y, 0},
                                                {p.hidden, 0},
                                                {p.parts, 0}});
  if (p.dtype != DType::kBFloat16 || !aligned || p.E > kMostExperts || p.R * p.K > kMostPairs ||
      p.D > kMostColumns || 2 * p.F > kMostColumns || !tile_fits<8, 64>(p)) {
    return int(cudaErrorNotSupported);
  }
  // a weight is decoded anew for every tile of rows, so many rows an expert want a larger one, of
  // which few would leave most empty; it changes no bits
  const int64_t pairs = p.R * p.K;
  return first_fit({Rung{pairs > 24 * p.E && tile_fits<64, 128>(p), launch_tiles<64, 128>},
                    Rung{pairs > 4 * p.E && tile_fits<32, 128>(p), launch_tiles<32, 128>},
                    Rung{true, launch_tiles<8, 64>}})(p);
}

}  // namespace lens
