// Attention over the image and text rows of a sample: joint_attention; of a language model's tokens
// over those before them: sink_attention.
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

// Keys, channels and the rows of a task are padded to whole tiles.
constexpr int64_t kSinkTile = 32;
inline int64_t sink_padded(int64_t n) { return (n + kSinkTile - 1) / kSinkTile * kSinkTile; }

// out = softmax over (q' k^T * scale, sink) times (v, 0), q' the queries turned by the table,
// halves i and i + H / 2 together. Query t is key S - T + t: it sees that key and those before it,
// of a window the last `window` (0: all). N / M query heads share a key head. On the CPU alone.
struct SinkAttentionParams {
  const void* q;             // [T, N, H]
  const void* k;             // [S, M, H], turned
  const void* v;             // [S, M, H]
  const void* sinks;         // [N]
  const void* cos;           // acc [T, H / 2]
  const void* sin;           // acc [T, H / 2]
  void* out;                 // [T, N, H]
  void* keys;                // workspace, acc [M, S, H], S and H padded
  void* values;              // workspace, acc [M, S, H], S and H padded
  void* rooms;               // workspace, acc [W, 32, 2 (S + H)], S and H padded: a thread's
  int64_t T, S, N, M, H, W;  // W threads at most
  int64_t window, causal;
  double scale;
  DType dtype;
  void* stream;
};

template <class V>
void fields(SinkAttentionParams& p, V& v) {
  v.size("T", p.T, 0);
  v.size("S", p.S, 0);
  v.size("M", p.M, 1);
  v.size("N", p.N, 1);
  v.size("H", p.H, 2);
  v.size("W", p.W, 1);
  v.size("causal", p.causal, 0);
  v.size("window", p.window, 0);
  v.expect(p.causal <= 1, "causal must be 0 or 1", p.causal);
  v.expect(p.causal == 1 || p.window == 0, "window must be 0 where causal is", p.window);
  v.expect(p.causal == 0 || p.T <= p.S, "S must be at least T", p.S);
  v.expect(p.M > 0 && p.N % p.M == 0, "N must be a multiple of M", p.N);
  v.expect(p.H % 2 == 0, "H must be even", p.H);
  v.array("q", p.q, p.T * p.N * p.H);
  v.array("k", p.k, p.S * p.M * p.H);
  v.array("v", p.v, p.S * p.M * p.H);
  v.array("sinks", p.sinks, 0);  // may be null
  v.array("cos", p.cos, 0);      // may be null
  v.array("sin", p.sin, p.cos == nullptr ? 0 : p.T * p.H / 2);
  v.array("out", p.out, p.T * p.N * p.H);
  v.array("keys", p.keys, p.M * sink_padded(p.S) * sink_padded(p.H));
  v.array("values", p.values, p.M * sink_padded(p.S) * sink_padded(p.H));
  v.array("rooms", p.rooms, p.W * kSinkTile * 2 * (sink_padded(p.S) + sink_padded(p.H)));
  v.number("scale", p.scale);
}

}  // namespace lens
