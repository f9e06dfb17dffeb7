// Packed-row bookkeeping shared by the CPU and CUDA kernels: which sample owns a row, where a row
// goes.
#pragma once

#include "math/types.h"

namespace lens {

// Sample b with offsets[b] <= row < offsets[b + 1]; samples without rows are never returned. Stays
// within [0, B - 1] whatever the offsets hold.
LENS_HD int64_t sample_of_row(const int32_t* offsets, int64_t B, int64_t row) {
  int64_t low = 0, high = B - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (offsets[middle] <= row) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Joint row of row `row` of sample b's image, or text, stream.
LENS_HD int64_t joint_row_of_image(const int32_t* text_offsets, int64_t b, int64_t row) {
  return row + text_offsets[b];
}
LENS_HD int64_t joint_row_of_text(const int32_t* image_offsets, int64_t b, int64_t row) {
  return row + image_offsets[b + 1];
}

}  // namespace lens
