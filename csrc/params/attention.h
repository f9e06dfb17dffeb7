// Attention over the image and text rows of a sample: joint_attention.
#pragma once

#include "params/common.h"

namespace lens {

// out = softmax(q k^T * scale) v within each sample, over its image and text rows together, not
// causal; lse = log(sum(exp(q k^T * scale))), natural. What a sample's rows hold depends on nothing
// outside the sample.
struct JointAttentionParams {
  const void* q;                 // [RS, N, H], joint layout
  const void* k;                 // [RS, N, H], joint layout
  const void* v;                 // [RS, N, H], joint layout
  const int32_t* image_offsets;  // [B + 1]
  const int32_t* text_offsets;   // [B + 1]
  void* image_out;               // [RI, N, H]
  void* text_out;                // [RT, N, H], or null: text rows are keys and values, no queries
  void* lse;                     // float [N, RS], or null; rows without a query stay unwritten
  int64_t RI, RT, B, N, H;
  int64_t polynomial;  // of every four exponentials, how many are polynomials: 0 or 1
  double scale;        // positive
  double score_bound;  // |q . k| * scale exceeds it nowhere; infinity where that is not known
  DType dtype;
  void* stream;
};

template <class V>
void fields(JointAttentionParams& p, V& v) {
  stream_sizes(p, v);
  v.size("N", p.N, 1);
  v.size("H", p.H, 1);
  v.array("q", p.q, (p.RI + p.RT) * p.N * p.H);
  v.array("k", p.k, (p.RI + p.RT) * p.N * p.H);
  v.array("v", p.v, (p.RI + p.RT) * p.N * p.H);
  stream_offsets(p, v);
  v.array("image_out", p.image_out, p.RI * p.N * p.H);
  v.array("text_out", p.text_out, 0);  // may be null
  v.array("lse", p.lse, 0);            // may be null
  v.size("polynomial", p.polynomial, 0);
  v.expect(p.polynomial <= 1, "polynomial must be 0 or 1", p.polynomial);
  v.number("scale", p.scale);
  v.number("score_bound", p.score_bound);
}

}  // namespace lens
