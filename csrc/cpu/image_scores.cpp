// Histogram of grey, sum of value, and the sums of the Laplacian of the reduced grey image: one
// pass over the pixels, rows of the reduced image as they become complete, three of them kept. All
// integers, but for one product and rounding per reduced pixel in double: the same bits on every
// CPU.
#include "cpu/rows.h"

namespace lens::LENS_ISA {
namespace {

struct Workspace {
  int64_t* prefix;  // [W + 1]
  int32_t* column;  // [W + 1], the last one stays 0
  int32_t* ring;    // [3, w]
  uint8_t* grey;    // [W]

  Workspace(const ImageScoresParams& p)
      : prefix(p.workspace),
        column(reinterpret_cast<int32_t*>(prefix + p.W + 1)),
        ring(column + p.W + 2),
        grey(reinterpret_cast<uint8_t*>(ring + 3 * p.w)) {}
};

// Grey of a row; returns the sum of its values.
int64_t grey_row(const uint8_t* __restrict rgb, uint8_t* __restrict grey, int64_t W) {
  int32_t sum = 0;  // W is at most 2^23: 255 W fits
  for (int64_t x = 0; x < W; ++x) {
    const int32_t r = rgb[3 * x], g = rgb[3 * x + 1], b = rgb[3 * x + 2];
    const int32_t rg = r > g ? r : g;
    grey[x] = uint8_t((9798 * r + 19235 * g + 3735 * b + (1 << 14)) >> 15);
    sum += rg > b ? rg : b;
  }
  return sum;
}

// Four tables: runs of one grey would wait for each other's store.
void count_row(const uint8_t* grey, int64_t W, int32_t (&counts)[4][256]) {
  int64_t x = 0;
  for (; x + 8 <= W; x += 8) {
    uint64_t eight;
    std::memcpy(&eight, grey + x, 8);
    for (int i = 0; i < 8; ++i) ++counts[i & 3][(eight >> (8 * i)) & 255];
  }
  for (; x < W; ++x) ++counts[0][grey[x]];
}

void add_row(const uint8_t* __restrict grey, int32_t weight, int32_t* __restrict column,
             int64_t W) {
  for (int64_t x = 0; x < W; ++x) column[x] += weight * grey[x];
}

// The reduced row of complete columns. Source pixel x covers [x w, (x + 1) w), reduced pixel X
// [X W, (X + 1) W): whole pixels by a difference of prefix sums, the two at the ends in part.
void reduce_row(const Workspace& s, int64_t W, int64_t w, double scale, int32_t* row) {
  s.prefix[0] = 0;
  for (int64_t x = 0; x < W; ++x) s.prefix[x + 1] = s.prefix[x] + s.column[x];
  const int64_t whole = W / w, rest = W % w;
  int64_t first = 0, before = 0;  // X W = first w + before
  for (int64_t X = 0; X < w; ++X) {
    int64_t last = first + whole, after = before + rest;
    if (after >= w) after -= w, ++last;
    const int64_t sum =
        w * (s.prefix[last] - s.prefix[first]) - before * s.column[first] + after * s.column[last];
    row[X] = int32_t(double(sum) * scale + 0.5);
    first = last, before = after;
  }
}

// Adds the Laplacian of one row, whose neighbours are `up` and `down`.
void add_laplacian(const int32_t* up, const int32_t* row, const int32_t* down, int64_t w,
                   int64_t& sum, int64_t& squares) {
  const auto at = [&](int64_t x, int64_t left, int64_t right) LENS_LAMBDA {
    return int64_t(up[x] + down[x] + row[left] + row[right] - 4 * row[x]);
  };
  const int64_t beside = w > 1 ? 1 : 0;
  int64_t total = 0, square = 0;
  for (int64_t x = 1; x + 1 < w; ++x) {
    const int64_t l = at(x, x - 1, x + 1);
    total += l;
    square += l * l;
  }
  const int64_t head = at(0, beside, beside);
  total += head, square += head * head;
  if (w > 1) {
    const int64_t tail = at(w - 1, w - 2, w - 2);
    total += tail, square += tail * tail;
  }
  sum += total, squares += square;
}

}  // namespace

void image_scores(const ImageScoresParams& p) {
  const Workspace s(p);
  int64_t* histogram = p.sums;
  int64_t &value = p.sums[256], &sum = p.sums[257], &squares = p.sums[258];
  fill_zero(p.sums, 259);
  fill_zero(s.column, p.W + 1);
  int32_t counts[4][256] = {};
  int64_t counted = 0;
  const auto flush = [&]() LENS_LAMBDA {
    for (int g = 0; g < 256; ++g) {
      for (auto& table : counts) histogram[g] += table[g], table[g] = 0;
    }
    counted = 0;
  };
  const double scale = 256.0 / (double(p.H) * double(p.W));
  const auto reduced = [&](int64_t Y) LENS_LAMBDA { return s.ring + (Y % 3) * p.w; };
  const auto complete = [&](int64_t Y) LENS_LAMBDA {  // row Y of the reduced image
    reduce_row(s, p.W, p.w, scale, reduced(Y));
    fill_zero(s.column, p.W);
    if (Y == 0) return;
    const int32_t *up = reduced(Y > 1 ? Y - 2 : Y), *down = reduced(Y);
    add_laplacian(up, reduced(Y - 1), down, p.w, sum, squares);
  };
  int64_t Y = 0;
  for (int64_t y = 0; y < p.H; ++y) {
    value += grey_row(p.pixels + y * p.W * 3, s.grey, p.W);
    count_row(s.grey, p.W, counts);
    if ((counted += p.W) > (int64_t(1) << 30)) flush();
    // source row y covers [y h, (y + 1) h), reduced row Y [Y H, (Y + 1) H)
    const int64_t begin = y * p.h, end = begin + p.h, edge = (Y + 1) * p.H;
    if (end < edge) {
      add_row(s.grey, int32_t(p.h), s.column, p.W);
      continue;
    }
    const int64_t rest = end - edge;
    add_row(s.grey, int32_t(p.h - rest), s.column, p.W);
    complete(Y++);
    if (rest > 0) add_row(s.grey, int32_t(rest), s.column, p.W);
  }
  flush();
  const int32_t *up = reduced(p.h > 1 ? p.h - 2 : 0), *last = reduced(p.h - 1);
  add_laplacian(up, last, up, p.w, sum, squares);
}

}  // namespace lens::LENS_ISA
