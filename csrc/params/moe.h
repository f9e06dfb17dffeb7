// A mixture of experts whose weights are packed in MXFP4.
#pragma once

#include "params/common.h"

namespace lens {

// MXFP4 as stored: a byte holds two E2M1 values, the low half first; 32 values share a byte of
// scale, 2^(scale - 127), of which 255 is NaN.
constexpr int64_t kMxGroup = 32, kMxGroupBytes = 16;

// AMX takes an expert's rows in blocks of 16, of at least 64 pairs of channels.
constexpr int64_t kBlockRows = 16, kBlockPairs = 64;
inline int64_t moe_workspace(int64_t R, int64_t K, int64_t E, int64_t channels) {
  const int64_t pairs = R * K, experts = pairs < E ? pairs : E;
  return (pairs + (kBlockRows - 1) * experts) * (channels < kBlockPairs ? kBlockPairs : channels);
}

// Rows of R choose the K experts with the largest logits x router_weight^T + router_bias (of equal
// ones the first), share_k is the softmax among these:
//   y = sum over k of share_k (clamped_swiglu(x W1_e^T + b1_e) W2_e^T + b2_e)
// where g sigmoid(alpha g) (u + 1), g = min(h[2 f], limit), u = h[2 f + 1] within +-limit.
// R rows of D channels, E experts of hidden width F.
struct MoeMxfp4Params {
  const void* x;                  // [R, D]
  const void* router_weight;      // [E, D]
  const void* router_bias;        // [E]
  const uint8_t* gate_up_blocks;  // [E, 2 F, D / 32, 16]
  const uint8_t* gate_up_scales;  // [E, 2 F, D / 32]
  const void* gate_up_bias;       // [E, 2 F]
  const uint8_t* down_blocks;     // [E, D, F / 32, 16]
  const uint8_t* down_scales;     // [E, D, F / 32]
  const void* down_bias;          // [E, D]
  void* y;                        // [R, D]
  void* hidden;   // workspace, acc, of size moe_workspace(.., F): hidden rows by expert
  void* parts;    // workspace, acc, of size moe_workspace(.., D): what each expert of each row adds
  void* wide;     // workspace, acc [R, D]: x where its products need it wider (CPU)
  int32_t* plan;  // workspace [2 R K + 2 (E + 1)]: who reads which expert (GPU, see its kernels)
  void* shares;   // workspace, acc [R K]: of a row's experts (GPU)
  int64_t R, D, F, E, K;
  double alpha, limit;
  DType dtype;
  void* stream;
};

template <class V>
void fields(MoeMxfp4Params& p, V& v) {
  v.size("R", p.R, 0);
  v.size("D", p.D, 1);
  v.size("F", p.F, 1);
  v.size("E", p.E, 1);
  v.size("K", p.K, 1);
  v.expect(p.D % kMxGroup == 0, "D must be a multiple of 32", p.D);
  v.expect(p.F % kMxGroup == 0, "F must be a multiple of 32", p.F);
  v.expect(p.K <= p.E, "K must be at most E", p.K);
  v.array("x", p.x, p.R * p.D);
  v.array("router_weight", p.router_weight, p.E * p.D);
  v.array("router_bias", p.router_bias, p.E);
  v.array("gate_up_blocks", p.gate_up_blocks, p.E * p.F * p.D);
  v.array("gate_up_scales", p.gate_up_scales, p.E * p.F * (p.D / 16));
  v.array("gate_up_bias", p.gate_up_bias, p.E * 2 * p.F);
  v.array("down_blocks", p.down_blocks, p.E * p.D * (p.F / 2));
  v.array("down_scales", p.down_scales, p.E * p.D * (p.F / 32));
  v.array("down_bias", p.down_bias, p.E * p.D);
  v.array("y", p.y, p.R * p.D);
  v.array("hidden", p.hidden, moe_workspace(p.R, p.K, p.E, p.F));
  v.array("parts", p.parts, moe_workspace(p.R, p.K, p.E, p.D));
  v.array("wide", p.wide, p.R * p.D);
  v.array("plan", p.plan, 2 * (p.R * p.K + p.E + 1));
  v.array("shares", p.shares, p.R * p.K);
  v.number("alpha", p.alpha);
  v.number("limit", p.limit);
}

}  // namespace lens
