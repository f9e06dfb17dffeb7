// What the params structs share: letters, layouts, storage types, and how `fields` tells a struct.
//
// One struct per op: what a kernel reads, what it writes, the sizes, `stream` (CUDA's) last.
//
//   B samples   R packed rows   D width   N heads   H head dim   F MLP hidden   C latent channels
//   L padded length RI, RT, RS packed image, text and joint rows, RS = RI + RT
//
// Every array is dense and row-major unless a stride (in elements) is given, and holds `dtype`
// unless its comment says otherwise. "acc" is the arithmetic type: float for float32 and bfloat16,
// double for float64. Offsets are int32 [B + 1]: sample b owns rows offsets[b] .. offsets[b + 1] -
// 1; offsets[0] = 0, offsets[B] = R. The joint layout holds [image rows | text rows] per sample:
// joint_offsets = image_offsets + text_offsets. All pointers live on the device that runs the
// kernel. Sizes may be zero; pointers to empty arrays may be null.
//
// Beside a struct stands fields(p, v), which names each of its fields but `dtype` and `stream` to a
// visitor v, sizes before the arrays that they count:
//
//   v.size(name, field, minimum)                  an integer of at least `minimum`
//   v.number(name, field)                         a double
//   v.array(name, field, elements)                a pointer; 0 elements: it may be null
//   v.strided(name, field, elements, stride_name, stride)   a pointer and its row stride
//   v.offsets(name, field, B, rows_name, rows)    offsets that end at `rows`
//   v.rows(name, field, R, BL)                    R distinct row numbers below BL
//   v.expect(held, rule, got)                     what else must hold
//
// A visitor fills the struct from Python and checks it, another writes its docstring (arguments.h),
// a third tells the tests where each field lies (emulation/entry_points.cpp).
#pragma once

#include <cstdint>

#include "math/types.h"

namespace lens {

// ---- storage types
enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat64 = 2 };

// Calls f with a null T* for the storage type; false for a value that names none.
template <class F>
inline __attribute__((always_inline)) bool with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(static_cast<float*>(nullptr)), true;
    case DType::kBFloat16:
      return f(static_cast<Bf16*>(nullptr)), true;
    case DType::kFloat64:
      return f(static_cast<double*>(nullptr)), true;
  }
  return false;
}

// Bytes of an element.
constexpr int64_t element_bytes(DType dtype) {
  return dtype == DType::kBFloat16 ? 2 : dtype == DType::kFloat32 ? 4 : 8;
}

// ---- streams: image and text rows are packed apart, each with weights of its own
enum Stream : int { kImage = 0, kText = 1 };

// Rows of both streams in B samples.
template <class Params, class V>
void stream_sizes(Params& p, V& v) {
  v.size("RI", p.RI, 0);
  v.size("RT", p.RT, 0);
  v.size("B", p.B, p.RI + p.RT > 0);
}

template <class Params, class V>
void stream_offsets(Params& p, V& v) {
  v.offsets("image_offsets", p.image_offsets, p.B, "RI", p.RI);
  v.offsets("text_offsets", p.text_offsets, p.B, "RT", p.RT);
}

// ---- column sums
// They run in two stages without atomics. Stage one sums at most kSplitRows consecutive rows of one
// sample into one slot of the workspace; stage two adds a sample's slots in order. Chunk k of
// sample b holds rows offsets[b] + k * kSplitRows and following, and owns slot
// split_slot(offsets[b], b) + k. Slots of different samples never meet, because
// ceil(n / s) <= floor((o + n) / s) - floor(o / s) + 1; a slot without rows is neither written nor
// read. So neither the thread count nor the other samples change a sample's sums.
constexpr int64_t kSplitRows = 32;

LENS_HD constexpr int64_t split_slot(int64_t offset, int64_t b) { return offset / kSplitRows + b; }
LENS_HD constexpr int64_t split_slots(int64_t R, int64_t B) { return R / kSplitRows + B; }
LENS_HD constexpr int64_t split_chunks(int64_t rows) {
  return (rows + kSplitRows - 1) / kSplitRows;
}

}  // namespace lens
