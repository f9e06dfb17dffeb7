// Stand-in for the toolkit's <cuda_bf16.h>: the conversions the row kernels use.
#pragma once

#include "cuda_runtime.h"
#include "math/types.h"

struct __nv_bfloat162 {
  uint16_t x, y;  // low half first
};
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {lens::narrow<lens::Bf16>(x).bits, lens::narrow<lens::Bf16>(y).bits};
}
