// packed[r] = x[rows[r]] and its inverse: copies of C elements per row, bound by memory.
#include "cpu/rows.h"

namespace lens::LENS_ISA {
namespace {

// memcpy by registers: the C library's string instructions are a tenth slower at these sizes
// (measured on Zen 4).
void copy(char* to, const char* from, int64_t bytes) {
  int64_t i = 0;
  for (; i + 4 * kRegisterBytes <= bytes; i += 4 * kRegisterBytes) {
    Simd<float> part[4];
    std::memcpy(part, from + i, sizeof part);
    std::memcpy(to + i, part, sizeof part);
  }
  std::memcpy(to + i, from + i, size_t(bytes - i));
}

// Last row + 1 of the run of consecutive tokens that starts at packed row r: a sample's tokens are
// copied at once.
int64_t end_of_run(const int64_t* rows, int64_t r, int64_t end) {
  int64_t stop = r + 1;
  while (stop < end && rows[stop] == rows[stop - 1] + 1) ++stop;
  return stop;
}

}  // namespace

void pack_tokens(const PackTokensParams& p) {
  const int64_t bytes = p.C * element_bytes(p.dtype);
  const char* x = static_cast<const char*>(p.x);
  char* packed = static_cast<char*>(p.packed);
  parallel_ranges(p.R, p.R * p.C, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end;) {
      const int64_t stop = end_of_run(p.rows, r, end);
      copy(packed + r * bytes, x + p.rows[r] * bytes, (stop - r) * bytes);
      r = stop;
    }
  });
}

void unpack_tokens(const UnpackTokensParams& p) {
  const int64_t bytes = p.C * element_bytes(p.dtype);
  const char* packed = static_cast<const char*>(p.packed);
  char* x = static_cast<char*>(p.x);
  parallel_ranges(p.BL, p.BL * p.C, [&](int64_t begin, int64_t end) {
    std::memset(x + begin * bytes, 0, size_t((end - begin) * bytes));
  });
  parallel_ranges(p.R, p.R * p.C, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end;) {
      const int64_t stop = end_of_run(p.rows, r, end);
      copy(x + p.rows[r] * bytes, packed + r * bytes, (stop - r) * bytes);
      r = stop;
    }
  });
}

}  // namespace lens::LENS_ISA
