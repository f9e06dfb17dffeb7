// GEMMs with a row op as their epilogue, on sm_90a: linear, linear_qkv_norm_rope, linear_swiglu,
// linear_gated_residual.
//
// bfloat16, float accumulators, one rounding at the end. Rows of weight are output columns. Both
// streams run in one launch; a stream without rows may hold null pointers. A row's bits depend on
// that row alone. cluster: neighbouring blocks that share a tile of the weight, 1 or 2; 0 for what
// is predicted quicker.
#pragma once

#include "params/common.h"

namespace lens {

// K and the output columns in whole tiles of a GEMM.
template <class V>
void gemm_sizes(int64_t& K, const char* columns_name, int64_t& columns, int64_t multiple, V& v) {
  v.size("K", K, 1);
  v.size(columns_name, columns, 1);
  v.expect(K % 64 == 0, "K must be a multiple of 64", K);
  v.expect(columns % multiple == 0,
           multiple == 64 ? "D must be a multiple of 64" : "F must be a multiple of 32", columns);
}

template <class V>
void cluster_size(int64_t& cluster, V& v) {
  v.size("cluster", cluster, 0);
  v.expect(cluster <= 2, "cluster must be 0, 1 or 2", cluster);
}

// y = x weight^T + bias
struct LinearParams {
  const void* x;       // [R, K]
  const void* weight;  // [D, K]
  const void* bias;    // [D], may be null
  void* y;             // [R, D]
  int64_t R, K, D;
  int64_t cluster;
  DType dtype;  // bfloat16
  void* stream;
};

template <class V>
void fields(LinearParams& p, V& v) {
  cluster_size(p.cluster, v);
  v.size("R", p.R, 0);
  gemm_sizes(p.K, "D", p.D, 64, v);
  v.array("x", p.x, p.R * p.K);
  v.array("weight", p.weight, p.D * p.K);
  v.array("bias", p.bias, 0);  // may be null
  v.array("y", p.y, p.R * p.D);
}

// qk_norm_rope of x weight^T + bias, whose columns are [3, N, H]
struct LinearQkvNormRopeParams {
  const void* image_x;           // [RI, K]
  const void* text_x;            // [RT, K]
  const void* image_weight;      // [3 * N * H, K]
  const void* text_weight;       // [3 * N * H, K]
  const void* image_bias;        // [3 * N * H], may be null
  const void* text_bias;         // [3 * N * H], may be null
  const void* image_q_weight;    // [H]
  const void* image_k_weight;    // [H]
  const void* text_q_weight;     // [H]
  const void* text_k_weight;     // [H]
  const void* cos;               // float [RS, H / 2], joint layout
  const void* sin;               // float [RS, H / 2], joint layout
  const int32_t* image_offsets;  // [B + 1]
  const int32_t* text_offsets;   // [B + 1]
  void* qkv;                     // [3, RS, N, H], joint layout
  int64_t RI, RT, B, K, N, H;
  double eps;
  int64_t cluster;
  DType dtype;  // bfloat16
  void* stream;
};

template <class V>
void fields(LinearQkvNormRopeParams& p, V& v) {
  cluster_size(p.cluster, v);
  stream_sizes(p, v);
  stream_offsets(p, v);
  v.size("K", p.K, 1);
  v.expect(p.K % 64 == 0, "K must be a multiple of 64", p.K);
  v.size("N", p.N, 1);
  v.size("H", p.H, 2);
  v.expect(p.H == 64, "H must be 64", p.H);
  const int64_t columns = 3 * p.N * p.H;
  v.array("image_x", p.image_x, p.RI * p.K);
  v.array("text_x", p.text_x, p.RT * p.K);
  v.array("image_weight", p.image_weight, p.RI > 0 ? columns * p.K : 0);
  v.array("text_weight", p.text_weight, p.RT > 0 ? columns * p.K : 0);
  v.array("image_bias", p.image_bias, 0);  // may be null
  v.array("text_bias", p.text_bias, 0);    // may be null
  v.array("image_q_weight", p.image_q_weight, p.RI > 0 ? p.H : 0);
  v.array("image_k_weight", p.image_k_weight, p.RI > 0 ? p.H : 0);
  v.array("text_q_weight", p.text_q_weight, p.RT > 0 ? p.H : 0);
  v.array("text_k_weight", p.text_k_weight, p.RT > 0 ? p.H : 0);
  v.array("cos", p.cos, (p.RI + p.RT) * (p.H / 2));
  v.array("sin", p.sin, (p.RI + p.RT) * (p.H / 2));
  v.array("qkv", p.qkv, (p.RI + p.RT) * columns);
  v.number("eps", p.eps);
}

// y = swiglu(x weight^T)
struct LinearSwigluParams {
  const void* image_x;       // [RI, K]
  const void* text_x;        // [RT, K]
  const void* image_weight;  // [2, F, K]
  const void* text_weight;   // [2, F, K]
  void* image_y;             // [RI, F]
  void* text_y;              // [RT, F]
  int64_t RI, RT, K, F;
  int64_t cluster;
  DType dtype;  // bfloat16
  void* stream;
};

template <class V>
void fields(LinearSwigluParams& p, V& v) {
  cluster_size(p.cluster, v);
  v.size("RI", p.RI, 0);
  v.size("RT", p.RT, 0);
  gemm_sizes(p.K, "F", p.F, 32, v);
  v.array("image_x", p.image_x, p.RI * p.K);
  v.array("text_x", p.text_x, p.RT * p.K);
  v.array("image_weight", p.image_weight, p.RI > 0 ? 2 * p.F * p.K : 0);
  v.array("text_weight", p.text_weight, p.RT > 0 ? 2 * p.F * p.K : 0);
  v.array("image_y", p.image_y, p.RI * p.F);
  v.array("text_y", p.text_y, p.RT * p.F);
}

// out = x + gate_b * (y weight^T + bias); out may be x
struct LinearGatedResidualParams {
  const void* image_x;           // [RI, D]
  const void* text_x;            // [RT, D]
  const void* image_y;           // [RI, K]
  const void* text_y;            // [RT, K]
  const void* image_weight;      // [D, K]
  const void* text_weight;       // [D, K]
  const void* image_bias;        // [D], may be null
  const void* text_bias;         // [D], may be null
  const void* image_gate;        // [B, D], row stride image_gate_stride
  const void* text_gate;         // [B, D], row stride text_gate_stride
  const int32_t* image_offsets;  // [B + 1]
  const int32_t* text_offsets;   // [B + 1]
  void* image_out;               // [RI, D]
  void* text_out;                // [RT, D]
  int64_t RI, RT, B, K, D;
  int64_t image_gate_stride, text_gate_stride;
  int64_t cluster;
  DType dtype;  // bfloat16
  void* stream;
};

template <class V>
void fields(LinearGatedResidualParams& p, V& v) {
  cluster_size(p.cluster, v);
  stream_sizes(p, v);
  stream_offsets(p, v);
  gemm_sizes(p.K, "D", p.D, 64, v);
  const int64_t image = p.RI > 0, text = p.RT > 0;
  v.array("image_x", p.image_x, p.RI * p.D);
  v.array("text_x", p.text_x, p.RT * p.D);
  v.array("image_y", p.image_y, p.RI * p.K);
  v.array("text_y", p.text_y, p.RT * p.K);
  v.array("image_weight", p.image_weight, image * p.D * p.K);
  v.array("text_weight", p.text_weight, text * p.D * p.K);
  v.array("image_bias", p.image_bias, 0);  // may be null
  v.array("text_bias", p.text_bias, 0);    // may be null
  v.strided("image_gate", p.image_gate, image * p.B * p.D, "image_gate_stride",
            p.image_gate_stride);
  v.strided("text_gate", p.text_gate, text * p.B * p.D, "text_gate_stride", p.text_gate_stride);
  v.array("image_out", p.image_out, p.RI * p.D);
  v.array("text_out", p.text_out, p.RT * p.D);
}

// out = x + gate_b * (a weight^T + bias) for samples of equal length: the instance of CUTLASS that
// the bench compares with; in builds with LENS_CUTLASS alone.
struct CutlassLinearGatedResidualParams {
  const void* a;       // [B, S, K]
  const void* weight;  // [D, K]
  const void* bias;    // [D], may be null
  const void* gate;    // [B, D], row stride gate_stride
  const void* x;       // [B, S, D]
  void* out;           // [B, S, D]
  int64_t B, S, D, K;
  int64_t gate_stride;
  DType dtype;  // bfloat16
  void* stream;
};
int cutlass_linear_gated_residual_cuda(const CutlassLinearGatedResidualParams& p);

template <class V>
void fields(CutlassLinearGatedResidualParams& p, V& v) {
  v.size("B", p.B, 0);
  v.size("S", p.S, 0);
  v.size("D", p.D, 1);
  v.size("K", p.K, 1);
  v.array("a", p.a, p.B * p.S * p.K);
  v.array("weight", p.weight, p.D * p.K);
  v.array("bias", p.bias, 0);  // may be null
  v.strided("gate", p.gate, p.B * p.D, "gate_stride", p.gate_stride);
  v.array("x", p.x, p.B * p.S * p.D);
  v.array("out", p.out, p.B * p.S * p.D);
}

// ---- on a CPU with AMX
constexpr int64_t kLinearPanel = 32;  // outputs that are multiplied at a time

// y = x weight^T + bias, rounded once; a row's bits depend on that row alone.
struct LinearRowsParams {
  const void* x;       // bfloat16 [R, K]
  const void* weight;  // bfloat16 [N, K]
  const void* bias;    // bfloat16 [N], or null
  void* y;             // bfloat16 [R, N]
  void* packed;        // workspace, bfloat16 [R, K], R padded to 16 and K to 32
  void* panels;        // workspace, bfloat16 [W, P, 32, K], K padded: a thread's weights
  int64_t R, K, N;
  int64_t W, P;  // threads at most, and panels that a thread takes at a time
  DType dtype;   // bfloat16
  void* stream;
};

template <class V>
void fields(LinearRowsParams& p, V& v) {
  v.size("R", p.R, 0);
  v.size("K", p.K, 1);
  v.size("N", p.N, 1);
  v.size("W", p.W, 1);
  v.size("P", p.P, 1);
  v.array("x", p.x, p.R * p.K);
  v.array("weight", p.weight, p.N * p.K);
  v.array("bias", p.bias, 0);  // may be null
  v.array("y", p.y, p.R * p.N);
  v.array("packed", p.packed, p.R * p.K);
  v.array("panels", p.panels, p.P * p.K);
}

}  // namespace lens
