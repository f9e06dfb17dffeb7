// Head-wise RMSNorm of q and k, rotation of the pairs (2i, 2i + 1), v copied; both streams written
// into the joint layout. One read and one write of [RS, 3, N, H], bound by memory. Gradients: the
// rotation turned back, then the norm's; the weights' sums run over rows and heads.
#include "cpu/rows.h"

namespace lens::LENS_ISA {
namespace {

// cos and signed sin of one row, each angle twice: a pair (e, o) turns by (e, o) * cos + (o, e) *
// sin.
template <class A>
struct Rotation {
  alignas(64) A cos[kMaxHead];
  alignas(64) A sin[kMaxHead];

  // direction +1 turns by the angle, -1 back
  LENS_INLINE void fill(const A* row_cos, const A* row_sin, int64_t H, A direction) {
    for (int64_t i = 0; i < H / 2; ++i) {
      cos[2 * i] = cos[2 * i + 1] = row_cos[i];
      sin[2 * i] = -direction * row_sin[i];
      sin[2 * i + 1] = direction * row_sin[i];
    }
  }
  template <class Lanes>
  LENS_INLINE Simd<A> turn(Simd<A> x, int64_t i, Lanes lanes) const {
    return mul_add(swap_pairs(x), load(sin + i, lanes), x * load(cos + i, lanes));
  }
};

// The rows of one stream: where they come from, where they go, which weights norm them.
template <class T>
struct StreamRows {
  const T* qkv;
  const T* weight[2];      // of q and of k
  const int32_t* offsets;  // of this stream
  const int32_t* others;   // offsets of the other stream
  int64_t rows;
  bool image;

  LENS_INLINE int64_t joint_row(int64_t b, int64_t row) const {
    return image ? joint_row_of_image(others, b, row) : joint_row_of_text(others, b, row);
  }
};

template <class T, class Params>
StreamRows<T> image_stream(const Params& p) {
  return {static_cast<const T*>(p.image_qkv),
          {static_cast<const T*>(p.image_q_weight), static_cast<const T*>(p.image_k_weight)},
          p.image_offsets,
          p.text_offsets,
          p.RI,
          true};
}

template <class T, class Params>
StreamRows<T> text_stream(const Params& p) {
  return {static_cast<const T*>(p.text_qkv),
          {static_cast<const T*>(p.text_q_weight), static_cast<const T*>(p.text_k_weight)},
          p.text_offsets,
          p.image_offsets,
          p.RT,
          false};
}

// kH: the head dim as a constant, or 0 where it is only known at run time.
template <class T, int kH>
void forward_stream(const QkNormRopeParams& p, const StreamRows<T>& stream) {
  using A = Acc<T>;
  const int64_t H = kH ? kH : p.H, D = p.N * H, RS = p.RI + p.RT;
  const A *cos = static_cast<const A*>(p.cos), *sin = static_cast<const A*>(p.sin);
  parallel_rows(
      stream.offsets, p.B, stream.rows, stream.rows * 3 * D,
      [&](int64_t row, int64_t b) LENS_LAMBDA {
        const int64_t joint = stream.joint_row(b, row);
        const T* in = stream.qkv + row * 3 * D;
        T* out = static_cast<T*>(p.qkv) + joint * D;
        Rotation<A> rotation;
        rotation.fill(cos + joint * (H / 2), sin + joint * (H / 2), H, A(1));
        for (int part = 0; part < 2; ++part) {
          const T* weight = stream.weight[part];
          for (int64_t head = 0; head < p.N; ++head) {
            const T* x = in + part * D + head * H;
            T* y = out + part * RS * D + head * H;
            const Simd<A> rstd(reciprocal_rms(x, H, A(p.eps)));
            for_lanes<A>(0, H, [&](int64_t i, auto lanes) LENS_LAMBDA {
              store(y + i,
                    rotation.turn(load(x + i, lanes) * rstd * load(weight + i, lanes), i, lanes),
                    lanes);
            });
          }
        }
        std::memcpy(out + 2 * RS * D, in + 2 * D, size_t(D) * sizeof(T));
      });
}

template <class T, int kH>
void forward(const QkNormRopeParams& p) {
  forward_stream<T, kH>(p, image_stream<T>(p));
  forward_stream<T, kH>(p, text_stream<T>(p));
}

// sums: acc [split_chunks(rows), 2, H]
template <class T, int kH>
void backward_stream(const QkNormRopeBackwardParams& p, const StreamRows<T>& stream, T* dqkv_stream,
                     Acc<T>* sums) {
  using A = Acc<T>;
  const int64_t H = kH ? kH : p.H, D = p.N * H, RS = p.RI + p.RT;
  const A *cos = static_cast<const A*>(p.cos), *sin = static_cast<const A*>(p.sin);
  parallel_ranges(split_chunks(stream.rows), stream.rows * 3 * D, [&](int64_t begin, int64_t end) {
    int64_t b = sample_of_row(stream.offsets, p.B, begin * kSplitRows);
    Rotation<A> rotation;
    // over the heads of one row: short sums first keep the error low
    alignas(64) A row_sum[2 * kMaxHead];
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      A* sum = sums + chunk * 2 * H;
      fill_zero(sum, 2 * H);
      const int64_t first = chunk * kSplitRows;
      const int64_t stop = first + kSplitRows < stream.rows ? first + kSplitRows : stream.rows;
      for (int64_t row = first; row < stop; ++row) {
        // of this row: its sample, its joint row, its angles turned back
        while (row >= stream.offsets[b + 1]) ++b;
        const int64_t joint = stream.joint_row(b, row);
        const T* in = stream.qkv + row * 3 * D;
        const T* dout = static_cast<const T*>(p.dqkv) + joint * D;
        T* din = dqkv_stream + row * 3 * D;
        rotation.fill(cos + joint * (H / 2), sin + joint * (H / 2), H, A(-1));
        fill_zero(row_sum, 2 * H);
        for (int part = 0; part < 2; ++part) {
          const T* weight = stream.weight[part];
          A* dweight = row_sum + part * H;
          for (int64_t head = 0; head < p.N; ++head) {
            const T* x = in + part * D + head * H;
            const T* dy = dout + part * RS * D + head * H;
            T* dx = din + part * D + head * H;
            // mean(g * weight * n) over the head, then dx and dweight
            const A rstd = reciprocal_rms(x, H, A(p.eps));
            const Simd<A> r(rstd);
            const A gn = sum_columns<A>(H, [&](int64_t i, auto lanes, Simd<A> running) LENS_LAMBDA {
              const Simd<A> g =
                  rotation.turn(load(dy + i, lanes), i, lanes) * load(weight + i, lanes);
              return mul_add(g, load(x + i, lanes), running);
            });
            const Simd<A> mean_gn(gn * rstd / A(H));
            for_lanes<A>(0, H, [&](int64_t i, auto lanes) LENS_LAMBDA {
              const Simd<A> d = rotation.turn(load(dy + i, lanes), i, lanes),
                            n = load(x + i, lanes) * r;
              store(dx + i, rms_norm_backward(d * load(weight + i, lanes), n, mean_gn, r), lanes);
              store(dweight + i, mul_add(d, n, load(dweight + i, lanes)), lanes);
            });
          }
        }
        // the row's part of the chunk's sums; v is copied
        for (int64_t i = 0; i < 2 * H; ++i) sum[i] += row_sum[i];
        std::memcpy(din + 2 * D, dout + 2 * RS * D, size_t(D) * sizeof(T));
      }
    }
  });
}

template <class T>
void sum_weights(const Acc<T>* sums, int64_t chunks, int64_t H, void* dq_weight, void* dk_weight) {
  using A = Acc<T>;
  T* out[2] = {static_cast<T*>(dq_weight), static_cast<T*>(dk_weight)};
  for (int part = 0; part < 2; ++part) {
    for_lanes<A>(0, H, [&](int64_t i, auto lanes) LENS_LAMBDA {
      Simd<A> sum(0);
      for (int64_t chunk = 0; chunk < chunks; ++chunk)
        sum = sum + load(sums + (chunk * 2 + part) * H + i, lanes);
      store(out[part] + i, sum, lanes);
    });
  }
}

template <class T, int kH>
void backward(const QkNormRopeBackwardParams& p) {
  Acc<T>* image_sums = static_cast<Acc<T>*>(p.workspace);
  Acc<T>* text_sums = image_sums + split_chunks(p.RI) * 2 * p.H;
  backward_stream<T, kH>(p, image_stream<T>(p), static_cast<T*>(p.dimage_qkv), image_sums);
  backward_stream<T, kH>(p, text_stream<T>(p), static_cast<T*>(p.dtext_qkv), text_sums);
  sum_weights<T>(image_sums, split_chunks(p.RI), p.H, p.dimage_q_weight, p.dimage_k_weight);
  sum_weights<T>(text_sums, split_chunks(p.RT), p.H, p.dtext_q_weight, p.dtext_k_weight);
}

}  // namespace

void qk_norm_rope(const QkNormRopeParams& p) {
  with_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    p.H == 64 ? forward<T, 64>(p) : forward<T, 0>(p);
  });
}

void qk_norm_rope_backward(const QkNormRopeBackwardParams& p) {
  with_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    p.H == 64 ? backward<T, 64>(p) : backward<T, 0>(p);
  });
}

}  // namespace lens::LENS_ISA
