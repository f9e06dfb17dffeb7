// comb = u + guidance * (c - u), held at the norm of c per row, then x + delta_b * comb: guidance,
// rescale and Euler step in one read of x, cond and uncond and one write. Bound by memory.
#include "cpu/rows.h"

namespace lens::LENS_ISA {
namespace {

template <class T>
void forward(const GuidanceStepParams& p) {
  using A = Acc<T>;
  const Simd<A> guidance = Simd<A>(A(p.guidance));
  parallel_rows(p.offsets, p.B, p.R, p.R * p.C, [&](int64_t row, int64_t b) LENS_LAMBDA {
    const A* x = static_cast<const A*>(p.x) + row * p.C;
    const T* cond = static_cast<const T*>(p.cond) + row * p.C;
    A* out = static_cast<A*>(p.out) + row * p.C;
    const A delta = static_cast<const A*>(p.delta)[b];
    if (p.uncond == nullptr) {
      for_lanes<A>(0, p.C, [&](int64_t i, auto lanes) LENS_LAMBDA {
        store(out + i, mul_add(Simd<A>(delta), load(cond + i, lanes), load(x + i, lanes)), lanes);
      });
      return;
    }
    const T* uncond = static_cast<const T*>(p.uncond) + row * p.C;
    const A cond_square =
        sum_columns<A>(p.C, [&](int64_t i, auto lanes, Simd<A> running) LENS_LAMBDA {
          const Simd<A> c = load(cond + i, lanes);
          return mul_add(c, c, running);
        });
    const A comb_square =
        sum_columns<A>(p.C, [&](int64_t i, auto lanes, Simd<A> running) LENS_LAMBDA {
          const Simd<A> comb = guide(load(cond + i, lanes), load(uncond + i, lanes), guidance);
          return mul_add(comb, comb, running);
        });
    const A factor = comb_square == A(0) ? A(1) : std::sqrt(cond_square) / std::sqrt(comb_square);
    for_lanes<A>(0, p.C, [&](int64_t i, auto lanes) LENS_LAMBDA {
      const Simd<A> comb =
          guide(load(cond + i, lanes), load(uncond + i, lanes), guidance) * Simd<A>(factor);
      store(out + i, mul_add(Simd<A>(delta), comb, load(x + i, lanes)), lanes);
    });
  });
}

}  // namespace

void guidance_step(const GuidanceStepParams& p) {
  with_type(p.dtype, [&](auto* type) { forward<std::remove_pointer_t<decltype(type)>>(p); });
}

}  // namespace lens::LENS_ISA
