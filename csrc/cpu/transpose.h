// Rows of registers to columns.
#pragma once

#include "cpu/simd.h"

#if defined(__AVX512F__)
// gcc 12 says so of its own header, which begins some intrinsics from an undefined register
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace lens::LENS_ISA {

// row(r) is 16 bytes, r = 0 to 15: x[t] has in dword r the bytes 4 t to 4 t + 3 of row r.
template <class Row>
LENS_INLINE void transpose(Row row, __m512i x[4]) {
  __m512i quarter[4];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    __m512i q = _mm512_castsi128_si512(row(r));
    q = _mm512_inserti32x4(q, row(4 + r), 1);
    q = _mm512_inserti32x4(q, row(8 + r), 2);
    quarter[r] = _mm512_inserti32x4(q, row(12 + r), 3);
  }
  const __m512i low01 = _mm512_unpacklo_epi32(quarter[0], quarter[1]);
  const __m512i high01 = _mm512_unpackhi_epi32(quarter[0], quarter[1]);
  const __m512i low23 = _mm512_unpacklo_epi32(quarter[2], quarter[3]);
  const __m512i high23 = _mm512_unpackhi_epi32(quarter[2], quarter[3]);
  x[0] = _mm512_unpacklo_epi64(low01, low23);
  x[1] = _mm512_unpackhi_epi64(low01, low23);
  x[2] = _mm512_unpacklo_epi64(high01, high23);
  x[3] = _mm512_unpackhi_epi64(high01, high23);
}

}  // namespace lens::LENS_ISA
#endif
