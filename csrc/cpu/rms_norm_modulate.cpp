// y = x * rsqrt(mean(x^2) + eps) * weight * (1 + scale_b) + shift_b and its gradients. Bound by
// memory: one read and one write of [R, D] forward, two reads and one write backward; a row stays
// in the first cache between its passes.
#include "cpu/rows.h"

namespace lens::LENS_ISA {
namespace {

template <class T>
void forward(const RmsNormModulateParams& p) {
  using A = Acc<T>;
  const T* weight = static_cast<const T*>(p.weight);
  parallel_rows(p.offsets, p.B, p.R, p.R * p.D, [&](int64_t row, int64_t b) LENS_LAMBDA {
    const T* x = static_cast<const T*>(p.x) + row * p.D;
    const T* scale = static_cast<const T*>(p.scale) + b * p.scale_stride;
    const T* shift = static_cast<const T*>(p.shift) + b * p.shift_stride;
    T* y = static_cast<T*>(p.y) + row * p.D;
    const Simd<A> rstd(reciprocal_rms(x, p.D, A(p.eps)));
    for_lanes<A>(0, p.D, [&](int64_t i, auto lanes) LENS_LAMBDA {
      const Simd<A> n = load(x + i, lanes) * rstd;
      store(
          y + i,
          norm_modulate(n, load(weight + i, lanes), load(scale + i, lanes), load(shift + i, lanes)),
          lanes);
    });
  });
}

template <class T>
void backward(const RmsNormModulateBackwardParams& p) {
  using A = Acc<T>;
  const T* weight = static_cast<const T*>(p.weight);
  A* workspace = static_cast<A*>(p.workspace);
  const int64_t D = p.D;
  // stage one: gradients of the rows, column sums of each chunk into its slot
  parallel_chunks(
      p.offsets, p.B, p.R, p.R * D, [&](int64_t slot, int64_t b, int64_t first, int64_t stop) {
        const T* scale = static_cast<const T*>(p.scale) + b * p.scale_stride;
        A* sum_dyn = workspace + slot * 2 * D;
        A* sum_dy = sum_dyn + D;
        fill_zero(sum_dyn, 2 * D);
        for (int64_t row = first; row < stop; ++row) {
          const T* dy = static_cast<const T*>(p.dy) + row * D;
          const T* x = static_cast<const T*>(p.x) + row * D;
          T* dx = static_cast<T*>(p.dx) + row * D;
          const A rstd = reciprocal_rms(x, D, A(p.eps));
          const Simd<A> r(rstd);
          const A gn = sum_columns<A>(D, [&](int64_t i, auto lanes, Simd<A> running) LENS_LAMBDA {
            const Simd<A> g = norm_modulate_backward(load(dy + i, lanes), load(weight + i, lanes),
                                                     load(scale + i, lanes));
            return mul_add(g, load(x + i, lanes), running);
          });
          const Simd<A> mean_gn(gn * rstd / A(D));
          for_lanes<A>(0, D, [&](int64_t i, auto lanes) LENS_LAMBDA {
            const Simd<A> d = load(dy + i, lanes), n = load(x + i, lanes) * r;
            const Simd<A> g =
                norm_modulate_backward(d, load(weight + i, lanes), load(scale + i, lanes));
            store(dx + i, rms_norm_backward(g, n, mean_gn, r), lanes);
            store(sum_dyn + i, mul_add(d, n, load(sum_dyn + i, lanes)), lanes);
            store(sum_dy + i, d + load(sum_dy + i, lanes), lanes);
          });
        }
      });

  // stage two: the slots of each sample, in order
  parallel_columns<A>(D, split_slots(p.R, p.B) * 2 * D, [&](int64_t begin, int64_t end) {
    for_lanes<A>(begin, end, [&](int64_t i, auto lanes) LENS_LAMBDA {
      const Simd<A> w = load(weight + i, lanes);
      Simd<A> dweight(0);
      for (int64_t b = 0; b < p.B; ++b) {
        const Simd<A> dyn = sum_slots(workspace, p.offsets, b, 2, 0, D, i, lanes);
        const Simd<A> dy = sum_slots(workspace, p.offsets, b, 2, 1, D, i, lanes);
        const Simd<A> scale = load(static_cast<const T*>(p.scale) + b * p.scale_stride + i, lanes);
        store(static_cast<T*>(p.dscale) + b * D + i, w * dyn, lanes);
        store(static_cast<T*>(p.dshift) + b * D + i, dy, lanes);
        dweight = mul_add(Simd<A>(1) + scale, dyn, dweight);
      }
      store(static_cast<T*>(p.dweight) + i, dweight, lanes);
    });
  });
}

}  // namespace

void rms_norm_modulate(const RmsNormModulateParams& p) {
  with_type(p.dtype, [&](auto* type) { forward<std::remove_pointer_t<decltype(type)>>(p); });
}

void rms_norm_modulate_backward(const RmsNormModulateBackwardParams& p) {
  with_type(p.dtype, [&](auto* type) { backward<std::remove_pointer_t<decltype(type)>>(p); });
}

}  // namespace lens::LENS_ISA
