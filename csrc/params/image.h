// Of encoded images' pixels, for the data engine: image_scores. On the CPU alone.
#pragma once

#include "params/common.h"

namespace lens {

// Exact integer sums over one image, from which clarity, entropy and luminance follow:
//
//   grey g = (9798 R + 19235 G + 3735 B + 2^14) >> 15, value v = max(R, G, B)
//   area mean of g over h x w equal boxes, q = floor(256 mean + 1/2)
//   L = 3x3 Laplacian (0 1 0, 1 -4 1, 0 1 0) of q, borders mirrored without their edge
//   sums = [histogram of g (256), sum of v, sum of L, sum of L^2]
struct ImageScoresParams {
  const uint8_t* pixels;  // [H, W, 3], R G B
  int64_t* sums;          // [259]
  int64_t* workspace;     // [4 W + 8]
  int64_t H, W, h, w;     // h <= H, w <= W, h w <= 2^27: the sum of L^2 then fits
  DType dtype;            // not read
  void* stream;
};

template <class V>
void fields(ImageScoresParams& p, V& v) {
  v.size("H", p.H, 1);
  v.size("W", p.W, 1);
  v.size("h", p.h, 1);
  v.size("w", p.w, 1);
  v.expect(p.h <= p.H, "h must be at most H", p.h);
  v.expect(p.w <= p.W, "w must be at most W", p.w);
  v.expect(p.h * p.w <= (int64_t(1) << 27), "h w must be at most 2^27", p.h * p.w);
  v.expect(p.H * p.W <= (int64_t(1) << 37), "H W must be at most 2^37", p.H * p.W);
  v.expect(p.H <= (int64_t(1) << 23), "H must be at most 2^23", p.H);
  v.expect(p.W <= (int64_t(1) << 23), "W must be at most 2^23", p.W);
  v.array("pixels", p.pixels, p.H * p.W * 3);
  v.array("sums", p.sums, 259);
  v.array("workspace", p.workspace, 4 * p.W + 8);
}

}  // namespace lens
