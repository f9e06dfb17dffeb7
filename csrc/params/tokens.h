// Between padded batches and packed rows: pack_tokens, unpack_tokens.
#pragma once

#include "params/common.h"

namespace lens {

// packed[r] = x[rows[r]]
struct PackTokensParams {
  const void* x;        // [B * L, C]
  const int64_t* rows;  // [R], distinct, each in [0, B * L)
  void* packed;         // [R, C]
  int64_t R, BL, C;
  DType dtype;
  void* stream;
};

template <class V>
void fields(PackTokensParams& p, V& v) {
  v.size("R", p.R, 0);
  v.size("BL", p.BL, 0);
  v.size("C", p.C, 1);
  v.array("x", p.x, p.BL * p.C);
  v.rows("rows", p.rows, p.R, p.BL);
  v.array("packed", p.packed, p.R * p.C);
}

// x[rows[r]] = packed[r], zero elsewhere; also the gradient of pack_tokens (and the other way
// round)
struct UnpackTokensParams {
  const void* packed;   // [R, C]
  const int64_t* rows;  // [R], distinct, each in [0, B * L)
  void* x;              // [B * L, C]
  int64_t R, BL, C;
  DType dtype;
  void* stream;
};

template <class V>
void fields(UnpackTokensParams& p, V& v) {
  v.size("R", p.R, 0);
  v.size("BL", p.BL, 0);
  v.size("C", p.C, 1);
  v.array("packed", p.packed, p.R * p.C);
  v.rows("rows", p.rows, p.R, p.BL);
  v.array("x", p.x, p.BL * p.C);
}

}  // namespace lens
