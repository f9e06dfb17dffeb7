// out = x + gate_b * (a W^T + bias) as one instance of CUTLASS 3: what `csrc/cuda/gemm` is measured
// against. Built with LENS_CUTLASS=ON alone (its headers come from PyPI's nvidia-cutlass; a minute
// and 3.6 GB of compiling).
//
// A ping-pong kernel of TMA and wgmma whose epilogue is a visitor tree. Samples are CUTLASS's
// batch, so they have equal length and share the weight; the gate is a row per sample.
#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "params.h"

namespace lens {
namespace {

using namespace cute;
namespace fusion = cutlass::epilogue::fusion;

using Element = cutlass::bfloat16_t;
using Tile = Shape<_64, _256, _64>;
using Cluster = Shape<_2, _1, _1>;
constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;
constexpr int kAlignment = 8;  // elements: 16 bytes, what TMA asks of every row

// gate * (accumulator + bias) + x
using Bias = fusion::Sm90RowBroadcast<0, Tile, Element, float>;
using Gate = fusion::Sm90RowBroadcast<0, Tile, Element, float, Stride<_0, _1, int64_t>>;
using Biased = fusion::Sm90EVT<fusion::Sm90Compute<cutlass::plus, float, float, kRound>,
                               fusion::Sm90AccFetch, Bias>;
using Tree =
    fusion::Sm90EVT<fusion::Sm90Compute<cutlass::homogeneous_multiply_add, Element, float, kRound>,
                    Gate, Biased, fusion::Sm90SrcFetch<Element>>;

using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
    cutlass::epilogue::collective::EpilogueTileAuto, float, float, Element,
    cutlass::layout::RowMajor, kAlignment, Element, cutlass::layout::RowMajor, kAlignment,
    cutlass::epilogue::TmaWarpSpecialized, Tree>::CollectiveOp;
using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, cutlass::layout::RowMajor,
    kAlignment, Element, cutlass::layout::ColumnMajor, kAlignment, float, Tile, Cluster,
    cutlass::gemm::collective::StageCountAutoCarveout<int(
        sizeof(typename Epilogue::SharedStorage))>,
    cutlass::gemm::KernelTmaWarpSpecializedPingpong>::CollectiveOp;
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<
    cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue>>;

}  // namespace

int cutlass_linear_gated_residual_cuda(const CutlassLinearGatedResidualParams& p) {
  if (p.dtype != DType::kBFloat16 || p.D % kAlignment || p.K % kAlignment) {
    return int(cudaErrorNotSupported);
  }
  if (p.B == 0 || p.S == 0) return int(cudaSuccess);
  const auto element = [](const void* pointer) { return static_cast<const Element*>(pointer); };
  const int rows = int(p.S), width = int(p.D), depth = int(p.K), batch = int(p.B);
  using StrideA = typename Gemm::GemmKernel::StrideA;
  using StrideB = typename Gemm::GemmKernel::StrideB;
  using StrideC = typename Gemm::GemmKernel::StrideC;
  const StrideA a_stride{p.K, _1{}, p.S * p.K};
  const StrideB b_stride{p.K, _1{}, 0};
  const StrideC c_stride{p.D, _1{}, p.S * p.D};
  typename Gemm::Arguments arguments{cutlass::gemm::GemmUniversalMode::kGemm,
                                     {rows, width, depth, batch},
                                     {element(p.a), a_stride, element(p.weight), b_stride},
                                     {{{element(p.gate), Element(0), {_0{}, _1{}, p.gate_stride}},
                                       {{}, {element(p.bias), Element(0), {}}, {}},
                                       {},
                                       {}},
                                      element(p.x),
                                      c_stride,
                                      static_cast<Element*>(p.out),
                                      c_stride}};
  int device = 0;
  cudaGetDevice(&device);
  arguments.hw_info.device_id = device;
  arguments.hw_info.sm_count =
      cutlass::KernelHardwareInfo::query_device_multiprocessor_count(device);
  Gemm gemm;
  if (Gemm::get_workspace_size(arguments) != 0 ||
      gemm.can_implement(arguments) != cutlass::Status::kSuccess) {
    return int(cudaErrorNotSupported);
  }
  const auto stream = static_cast<cudaStream_t>(p.stream);
  if (gemm.initialize(arguments, nullptr, stream) != cutlass::Status::kSuccess ||
      gemm.run(stream) != cutlass::Status::kSuccess) {
    return int(cudaErrorInvalidValue);
  }
  return int(cudaGetLastError());
}

}  // namespace lens
