// out = x + gate_b * y, alone and fused with the norm and modulation that follow it, and the
// gradients. Bound by memory: the fused form saves one read of [R, D] forward and two reads and a
// write backward.
#include "cpu/rows.h"

namespace lens::LENS_ISA {
namespace {

template <class T>
void forward(const GatedResidualParams& p) {
  using A = Acc<T>;
  parallel_rows(p.offsets, p.B, p.R, p.R * p.D, [&](int64_t row, int64_t b) LENS_LAMBDA {
    const T* x = static_cast<const T*>(p.x) + row * p.D;
    const T* y = static_cast<const T*>(p.y) + row * p.D;
    const T* gate = static_cast<const T*>(p.gate) + b * p.gate_stride;
    T* out = static_cast<T*>(p.out) + row * p.D;
    for_lanes<A>(0, p.D, [&](int64_t i, auto lanes) LENS_LAMBDA {
      store(out + i, mul_add(load(gate + i, lanes), load(y + i, lanes), load(x + i, lanes)), lanes);
    });
  });
}

template <class T>
void backward(const GatedResidualBackwardParams& p) {
  using A = Acc<T>;
  A* workspace = static_cast<A*>(p.workspace);
  const int64_t D = p.D;
  // stage one: gradients of the rows, column sums of each chunk into its slot
  parallel_chunks(p.offsets, p.B, p.R, p.R * D,
                  [&](int64_t slot, int64_t b, int64_t first, int64_t stop) {
                    const T* gate = static_cast<const T*>(p.gate) + b * p.gate_stride;
                    A* sum = workspace + slot * D;
                    fill_zero(sum, D);
                    for (int64_t row = first; row < stop; ++row) {
                      const T* dout = static_cast<const T*>(p.dout) + row * D;
                      const T* y = static_cast<const T*>(p.y) + row * D;
                      T* dy = static_cast<T*>(p.dy) + row * D;
                      for_lanes<A>(0, D, [&](int64_t i, auto lanes) LENS_LAMBDA {
                        const Simd<A> d = load(dout + i, lanes);
                        store(dy + i, d * load(gate + i, lanes), lanes);
                        store(sum + i, mul_add(d, load(y + i, lanes), load(sum + i, lanes)), lanes);
                      });
                    }
                  });

  // stage two: the slots of each sample, in order
  parallel_columns<A>(D, split_slots(p.R, p.B) * D, [&](int64_t begin, int64_t end) {
    for_lanes<A>(begin, end, [&](int64_t i, auto lanes) LENS_LAMBDA {
      for (int64_t b = 0; b < p.B; ++b) {
        store(static_cast<T*>(p.dgate) + b * D + i,
              sum_slots(workspace, p.offsets, b, 1, 0, D, i, lanes), lanes);
      }
    });
  });
}

template <class T>
void norm_forward(const GatedResidualNormModulateParams& p) {
  using A = Acc<T>;
  const T* weight = static_cast<const T*>(p.weight);
  parallel_rows(p.offsets, p.B, p.R, p.R * p.D, [&](int64_t row, int64_t b) LENS_LAMBDA {
    const T* x = static_cast<const T*>(p.x) + row * p.D;
    const T* y = static_cast<const T*>(p.y) + row * p.D;
    const T* gate = static_cast<const T*>(p.gate) + b * p.gate_stride;
    const T* scale = static_cast<const T*>(p.scale) + b * p.scale_stride;
    const T* shift = static_cast<const T*>(p.shift) + b * p.shift_stride;
    T* x_new = static_cast<T*>(p.x_new) + row * p.D;
    T* normed = static_cast<T*>(p.normed) + row * p.D;
    // the norm reads what was stored, rounding included, and so equals rms_norm_modulate(x_new) bit
    // for bit
    for_lanes<A>(0, p.D, [&](int64_t i, auto lanes) LENS_LAMBDA {
      store(x_new + i, mul_add(load(gate + i, lanes), load(y + i, lanes), load(x + i, lanes)),
            lanes);
    });
    const Simd<A> rstd(reciprocal_rms(x_new, p.D, A(p.eps)));
    for_lanes<A>(0, p.D, [&](int64_t i, auto lanes) LENS_LAMBDA {
      const Simd<A> n = load(x_new + i, lanes) * rstd;
      store(
          normed + i,
          norm_modulate(n, load(weight + i, lanes), load(scale + i, lanes), load(shift + i, lanes)),
          lanes);
    });
  });
}

template <class T>
void norm_backward(const GatedResidualNormModulateBackwardParams& p) {
  using A = Acc<T>;
  const T* weight = static_cast<const T*>(p.weight);
  A* workspace = static_cast<A*>(p.workspace);
  const int64_t D = p.D;
  // stage one: gradients of the rows, column sums of each chunk into its slot
  parallel_chunks(
      p.offsets, p.B, p.R, p.R * D, [&](int64_t slot, int64_t b, int64_t first, int64_t stop) {
        const T* gate = static_cast<const T*>(p.gate) + b * p.gate_stride;
        const T* scale = static_cast<const T*>(p.scale) + b * p.scale_stride;
        A* sum_dn = workspace + slot * 3 * D;
        A* sum_d = sum_dn + D;
        A* sum_gate = sum_d + D;
        fill_zero(sum_dn, 3 * D);
        for (int64_t row = first; row < stop; ++row) {
          const T* dx_new = static_cast<const T*>(p.dx_new) + row * D;
          const T* dnormed = static_cast<const T*>(p.dnormed) + row * D;
          const T* x_new = static_cast<const T*>(p.x_new) + row * D;
          const T* y = static_cast<const T*>(p.y) + row * D;
          T* dx = static_cast<T*>(p.dx) + row * D;
          T* dy = static_cast<T*>(p.dy) + row * D;
          const A rstd = reciprocal_rms(x_new, D, A(p.eps));
          const Simd<A> r(rstd);
          const A gn = sum_columns<A>(D, [&](int64_t i, auto lanes, Simd<A> running) LENS_LAMBDA {
            const Simd<A> g = norm_modulate_backward(
                load(dnormed + i, lanes), load(weight + i, lanes), load(scale + i, lanes));
            return mul_add(g, load(x_new + i, lanes), running);
          });
          const Simd<A> mean_gn(gn * rstd / A(D));
          for_lanes<A>(0, D, [&](int64_t i, auto lanes) LENS_LAMBDA {
            const Simd<A> d = load(dnormed + i, lanes), n = load(x_new + i, lanes) * r;
            const Simd<A> g =
                norm_modulate_backward(d, load(weight + i, lanes), load(scale + i, lanes));
            const Simd<A> total = load(dx_new + i, lanes) + rms_norm_backward(g, n, mean_gn, r);
            store(dx + i, total, lanes);
            store(dy + i, total * load(gate + i, lanes), lanes);
            store(sum_dn + i, mul_add(d, n, load(sum_dn + i, lanes)), lanes);
            store(sum_d + i, d + load(sum_d + i, lanes), lanes);
            store(sum_gate + i, mul_add(total, load(y + i, lanes), load(sum_gate + i, lanes)),
                  lanes);
          });
        }
      });

  // stage two: the slots of each sample, in order
  parallel_columns<A>(D, split_slots(p.R, p.B) * 3 * D, [&](int64_t begin, int64_t end) {
    for_lanes<A>(begin, end, [&](int64_t i, auto lanes) LENS_LAMBDA {
      const Simd<A> w = load(weight + i, lanes);
      Simd<A> dweight(0);
      for (int64_t b = 0; b < p.B; ++b) {
        const Simd<A> dn = sum_slots(workspace, p.offsets, b, 3, 0, D, i, lanes);
        const Simd<A> scale = load(static_cast<const T*>(p.scale) + b * p.scale_stride + i, lanes);
        store(static_cast<T*>(p.dscale) + b * D + i, w * dn, lanes);
        store(static_cast<T*>(p.dshift) + b * D + i,
              sum_slots(workspace, p.offsets, b, 3, 1, D, i, lanes), lanes);
        store(static_cast<T*>(p.dgate) + b * D + i,
              sum_slots(workspace, p.offsets, b, 3, 2, D, i, lanes), lanes);
        dweight = mul_add(Simd<A>(1) + scale, dn, dweight);
      }
      store(static_cast<T*>(p.dweight) + i, dweight, lanes);
    });
  });
}

}  // namespace

void gated_residual(const GatedResidualParams& p) {
  with_type(p.dtype, [&](auto* type) { forward<std::remove_pointer_t<decltype(type)>>(p); });
}

void gated_residual_backward(const GatedResidualBackwardParams& p) {
  with_type(p.dtype, [&](auto* type) { backward<std::remove_pointer_t<decltype(type)>>(p); });
}

void gated_residual_norm_modulate(const GatedResidualNormModulateParams& p) {
  with_type(p.dtype, [&](auto* type) { norm_forward<std::remove_pointer_t<decltype(type)>>(p); });
}

void gated_residual_norm_modulate_backward(const GatedResidualNormModulateBackwardParams& p) {
  with_type(p.dtype, [&](auto* type) { norm_backward<std::remove_pointer_t<decltype(type)>>(p); });
}

}  // namespace lens::LENS_ISA
