// Ops on the heads of q, k and v of both streams: qk_norm_rope.
#pragma once

#include "params/common.h"

namespace lens {

constexpr int kMaxHead = 512;  // channels of a head: what the kernels' buffers hold

// What forward and backward of qk_norm_rope share.
template <class Params, class V>
void head_fields(Params& p, V& v) {
  stream_sizes(p, v);
  v.size("N", p.N, 1);
  v.size("H", p.H, 2);
  v.expect(p.H % 2 == 0 && p.H <= kMaxHead, "H must be even and in [2, 512]", p.H);
  stream_offsets(p, v);
  v.array("image_qkv", p.image_qkv, p.RI * 3 * p.N * p.H);
  v.array("text_qkv", p.text_qkv, p.RT * 3 * p.N * p.H);
  v.array("image_q_weight", p.image_q_weight, p.H);
  v.array("image_k_weight", p.image_k_weight, p.H);
  v.array("text_q_weight", p.text_q_weight, p.H);
  v.array("text_k_weight", p.text_k_weight, p.H);
  v.array("cos", p.cos, (p.RI + p.RT) * (p.H / 2));
  v.array("sin", p.sin, (p.RI + p.RT) * (p.H / 2));
  v.number("eps", p.eps);
}

// q, k: head-wise RMSNorm with the stream's weight, then pairs (2i, 2i + 1) turned by angle i; v
// copied. Image row r of sample b goes to joint row r + text_offsets[b], text row t to t +
// image_offsets[b + 1].
struct QkNormRopeParams {
  const void* image_qkv;         // [RI, 3, N, H]
  const void* text_qkv;          // [RT, 3, N, H]
  const void* image_q_weight;    // [H]
  const void* image_k_weight;    // [H]
  const void* text_q_weight;     // [H]
  const void* text_k_weight;     // [H]
  const void* cos;               // acc [RS, H / 2], joint layout
  const void* sin;               // acc [RS, H / 2], joint layout
  const int32_t* image_offsets;  // [B + 1]
  const int32_t* text_offsets;   // [B + 1]
  void* qkv;                     // [3, RS, N, H], joint layout
  int64_t RI, RT, B, N, H;
  double eps;
  DType dtype;
  void* stream;
};

template <class V>
void fields(QkNormRopeParams& p, V& v) {
  head_fields(p, v);
  v.array("qkv", p.qkv, 3 * (p.RI + p.RT) * p.N * p.H);
}

// Turns dq and dk back (angle -i), then the norm's gradient; dv copied. Column sums run over the
// rows of a stream, not of a sample: chunk k of the image stream holds rows k * kSplitRows and
// following and owns slot k; the text stream's slots follow the image stream's.
struct QkNormRopeBackwardParams {
  const void* dqkv;              // [3, RS, N, H], joint layout
  const void* image_qkv;         // [RI, 3, N, H]
  const void* text_qkv;          // [RT, 3, N, H]
  const void* image_q_weight;    // [H]
  const void* image_k_weight;    // [H]
  const void* text_q_weight;     // [H]
  const void* text_k_weight;     // [H]
  const void* cos;               // acc [RS, H / 2], joint layout
  const void* sin;               // acc [RS, H / 2], joint layout
  const int32_t* image_offsets;  // [B + 1]
  const int32_t* text_offsets;   // [B + 1]
  void* dimage_qkv;              // [RI, 3, N, H]
  void* dtext_qkv;               // [RT, 3, N, H]
  void* dimage_q_weight;         // [H]
  void* dimage_k_weight;         // [H]
  void* dtext_q_weight;          // [H]
  void* dtext_k_weight;          // [H]
  void* workspace;  // acc [split_chunks(RI) + split_chunks(RT), 2, H]: sums for q and for k
  int64_t RI, RT, B, N, H;
  double eps;
  DType dtype;
  void* stream;
};

template <class V>
void fields(QkNormRopeBackwardParams& p, V& v) {
  head_fields(p, v);
  v.array("dqkv", p.dqkv, 3 * (p.RI + p.RT) * p.N * p.H);
  v.array("dimage_qkv", p.dimage_qkv, p.RI * 3 * p.N * p.H);
  v.array("dtext_qkv", p.dtext_qkv, p.RT * 3 * p.N * p.H);
  v.array("dimage_q_weight", p.dimage_q_weight, p.H);
  v.array("dimage_k_weight", p.dimage_k_weight, p.H);
  v.array("dtext_q_weight", p.dtext_q_weight, p.H);
  v.array("dtext_k_weight", p.dtext_k_weight, p.H);
  v.array("workspace", p.workspace, (split_chunks(p.RI) + split_chunks(p.RT)) * 2 * p.H);
}

}  // namespace lens
