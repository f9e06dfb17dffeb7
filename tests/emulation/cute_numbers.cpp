// What CuTe makes of the layouts our kernels use, for tests/emulation/test_cute.py: one line each.
#include <cute/arch/mma_sm90_desc.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

using namespace cute;
using Element = cutlass::bfloat16_t;
namespace gmma = SM90::GMMA;

alignas(1024) static Element memory[256 * 64];

// Descriptors of the first steps of 16 of K of a tile at address 0, and where its elements lie.
template <gmma::Major kMajor, class Tile>
void tile(const char* name, Tile layout) {
  Tensor whole = make_tensor(make_smem_ptr(memory), layout);  // (rows of M or N, K)
  Tensor first = local_tile(whole, make_shape(size<0>(layout), Int<16>{}), make_coord(0, 0));
  const uint64_t base = gmma::make_gmma_desc<kMajor>(first).desc_;
  Tensor chunks = recast<uint128_t const>(whole);
  printf("%s descriptors", name);
  constexpr int kPerStep = kMajor == gmma::Major::K ? 2 : 16;  // of `chunks` along K
  for (int step = 0; step < size<1>(layout) / 16; ++step) {
    printf(" 0x%016llx",
           (unsigned long long)(base + uint64_t(chunks.layout()(0, step * kPerStep))));
  }
  printf("\n%s layout ", name);
  print(layout);
  printf("\n");
}

template <int N>
void accumulators() {
  printf("accumulators %d ", N);
  print(gmma::CLayout_64xN<N>{});
  printf("\n");
}

int main() {
  tile<gmma::Major::K>("K 64",
                       tile_to_shape(gmma::Layout_K_SW128_Atom<Element>{}, Shape<_64, _64>{}));
  tile<gmma::Major::K>("K 128",
                       tile_to_shape(gmma::Layout_K_SW128_Atom<Element>{}, Shape<_128, _64>{}));
  tile<gmma::Major::MN>("MN 64",
                        tile_to_shape(gmma::Layout_MN_SW128_Atom<Element>{}, Shape<_64, _128>{}));
  accumulators<64>();
  accumulators<128>();
  accumulators<192>();
  accumulators<224>();
  accumulators<256>();
  printf("A in registers ");
  print(gmma::ALayout_64x16{});
  printf("\n");
}
