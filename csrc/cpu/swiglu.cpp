// y = silu(h[:, :F]) * h[:, F:] and its gradient. Bound by memory; the exponential is our own, so
// that every lane of every row, tail included, gives the same bits.
#include "cpu/rows.h"

namespace lens::LENS_ISA {
namespace {

template <class T>
void forward(const SwigluParams& p) {
  using A = Acc<T>;
  parallel_ranges(p.R, p.R * p.F, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* a = static_cast<const T*>(p.h) + row * 2 * p.F;
      const T* u = a + p.F;
      T* y = static_cast<T*>(p.y) + row * p.F;
      for_lanes<A>(0, p.F, [&](int64_t i, auto lanes) LENS_LAMBDA {
        const Simd<A> gate = load(a + i, lanes);
        store(y + i, gate / (Simd<A>(1) + exponential(-gate)) * load(u + i, lanes), lanes);
      });
    }
  });
}

template <class T>
void backward(const SwigluBackwardParams& p) {
  using A = Acc<T>;
  parallel_ranges(p.R, p.R * p.F, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* dy = static_cast<const T*>(p.dy) + row * p.F;
      const T* a = static_cast<const T*>(p.h) + row * 2 * p.F;
      const T* u = a + p.F;
      T* da = static_cast<T*>(p.dh) + row * 2 * p.F;
      T* du = da + p.F;
      for_lanes<A>(0, p.F, [&](int64_t i, auto lanes) LENS_LAMBDA {
        const Simd<A> d = load(dy + i, lanes), gate = load(a + i, lanes), s = sigmoid(gate);
        store(da + i, swiglu_backward_a(d, gate, load(u + i, lanes), s), lanes);
        store(du + i, swiglu_backward_u(d, gate, s), lanes);
      });
    }
  });
}

}  // namespace

void swiglu(const SwigluParams& p) {
  with_type(p.dtype, [&](auto* type) { forward<std::remove_pointer_t<decltype(type)>>(p); });
}

void swiglu_backward(const SwigluBackwardParams& p) {
  with_type(p.dtype, [&](auto* type) { backward<std::remove_pointer_t<decltype(type)>>(p); });
}

}  // namespace lens::LENS_ISA
