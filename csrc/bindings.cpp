// The pybind11 table of lens._C. Tensors arrive as addresses and sizes, so that no torch header is
// needed; the ops in lens/ops check shapes and dtypes and own the memory. Every entry fills a
// struct of params.h, checks what a struct can tell, and runs the kernel without the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "dispatch.h"

namespace py = pybind11;
using namespace lens;
using py::operator""_a;

namespace {

using Address = uintptr_t;

void* at(Address address) { return reinterpret_cast<void*>(address); }

template <class E>
E* at(Address address) {
  return reinterpret_cast<E*>(address);
}

DType storage(const char* op, int dtype) {
  if (dtype < 0 || dtype > 2) refuse(op, "dtype must be 0, 1 or 2, got " + std::to_string(dtype));
  return DType(dtype);
}

template <class Params>
void run_unlocked(const Params& p, int device) {
  py::gil_scoped_release unlocked;
  run(p, device);
}

struct Size {
  const char* name;
  int64_t minimum;
  int64_t value;
};
struct Array {
  const char* name;
  int64_t elements;
  const void* address;
};

void expect(const char* op, std::initializer_list<Size> sizes,
            std::initializer_list<Array> arrays) {
  for (const Size& s : sizes) expect_at_least(op, s.name, s.minimum, s.value);
  for (const Array& a : arrays) expect_pointer(op, a.name, a.elements, a.address);
}

void bind_pack_tokens(py::module_& m) {
  m.def(
      "pack_tokens",
      [](Address x, Address rows, Address packed, int64_t R, int64_t BL, int64_t C, int dtype,
         int device, Address stream) {
        const char* op = "pack_tokens";
        PackTokensParams p{at(x), at<int64_t>(rows),  at(packed), R, BL,
                           C,     storage(op, dtype), at(stream)};
        expect(op, {{"R", 0, R}, {"B * L", 0, BL}, {"C", 1, C}},
               {{"x", BL * C, p.x}, {"rows", R, p.rows}, {"packed", R * C, p.packed}});
        if (device < 0) expect_rows(op, p.rows, R, BL);
        run_unlocked(p, device);
      },
      "x"_a, "rows"_a, "packed"_a, "R"_a, "BL"_a, "C"_a, "dtype"_a, "device"_a, "stream"_a);
  m.def(
      "unpack_tokens",
      [](Address packed, Address rows, Address x, int64_t R, int64_t BL, int64_t C, int dtype,
         int device, Address stream) {
        const char* op = "unpack_tokens";
        UnpackTokensParams p{at(packed), at<int64_t>(rows),  at(x),     R, BL,
                             C,          storage(op, dtype), at(stream)};
        expect(op, {{"R", 0, R}, {"B * L", 0, BL}, {"C", 1, C}},
               {{"packed", R * C, p.packed}, {"rows", R, p.rows}, {"x", BL * C, p.x}});
        if (device < 0) expect_rows(op, p.rows, R, BL);
        run_unlocked(p, device);
      },
      "packed"_a, "rows"_a, "x"_a, "R"_a, "BL"_a, "C"_a, "dtype"_a, "device"_a, "stream"_a);
}

void bind_rms_norm_modulate(py::module_& m) {
  m.def(
      "rms_norm_modulate",
      [](Address x, Address weight, Address scale, Address shift, Address offsets, Address y,
         int64_t R, int64_t B, int64_t D, int64_t scale_stride, int64_t shift_stride, double eps,
         int dtype, int device, Address stream) {
        const char* op = "rms_norm_modulate";
        RmsNormModulateParams p{
            at(x), at(weight),   at(scale),    at(shift), at<int32_t>(offsets), at(y),     R, B,
            D,     scale_stride, shift_stride, eps,       storage(op, dtype),   at(stream)};
        expect(op, {{"R", 0, R}, {"B", R > 0, B}, {"D", 1, D}},
               {{"x", R * D, p.x},
                {"weight", D, p.weight},
                {"scale", B * D, p.scale},
                {"shift", B * D, p.shift},
                {"offsets", B + 1, p.offsets},
                {"y", R * D, p.y}});
        if (device < 0) expect_offsets(op, "offsets", p.offsets, B, "R", R);
        run_unlocked(p, device);
      },
      "x"_a, "weight"_a, "scale"_a, "shift"_a, "offsets"_a, "y"_a, "R"_a, "B"_a, "D"_a,
      "scale_stride"_a, "shift_stride"_a, "eps"_a, "dtype"_a, "device"_a, "stream"_a);
  m.def(
      "rms_norm_modulate_backward",
      [](Address dy, Address x, Address weight, Address scale, Address offsets, Address dx,
         Address dweight, Address dscale, Address dshift, Address workspace, int64_t R, int64_t B,
         int64_t D, int64_t scale_stride, double eps, int dtype, int device, Address stream) {
        const char* op = "rms_norm_modulate_backward";
        RmsNormModulateBackwardParams p{at(dy),
                                        at(x),
                                        at(weight),
                                        at(scale),
                                        at<int32_t>(offsets),
                                        at(dx),
                                        at(dweight),
                                        at(dscale),
                                        at(dshift),
                                        at(workspace),
                                        R,
                                        B,
                                        D,
                                        scale_stride,
                                        eps,
                                        storage(op, dtype),
                                        at(stream)};
        expect(op, {{"R", 0, R}, {"B", R > 0, B}, {"D", 1, D}},
               {{"dy", R * D, p.dy},
                {"x", R * D, p.x},
                {"weight", D, p.weight},
                {"scale", B * D, p.scale},
                {"offsets", B + 1, p.offsets},
                {"dx", R * D, p.dx},
                {"dweight", D, p.dweight},
                {"dscale", B * D, p.dscale},
                {"dshift", B * D, p.dshift},
                {"workspace", split_slots(R, B) * 2 * D, p.workspace}});
        if (device < 0) expect_offsets(op, "offsets", p.offsets, B, "R", R);
        run_unlocked(p, device);
      },
      "dy"_a, "x"_a, "weight"_a, "scale"_a, "offsets"_a, "dx"_a, "dweight"_a, "dscale"_a,
      "dshift"_a, "workspace"_a, "R"_a, "B"_a, "D"_a, "scale_stride"_a, "eps"_a, "dtype"_a,
      "device"_a, "stream"_a);
}

void expect_heads(const char* op, int64_t H) {
  if (H < 2 || H > 512 || H % 2)
    refuse(op, "H must be even and in [2, 512], got " + std::to_string(H));
}

void bind_qk_norm_rope(py::module_& m) {
  m.def(
      "qk_norm_rope",
      [](Address image_qkv, Address text_qkv, Address image_q_weight, Address image_k_weight,
         Address text_q_weight, Address text_k_weight, Address cos, Address sin,
         Address image_offsets, Address text_offsets, Address qkv, int64_t RI, int64_t RT,
         int64_t B, int64_t N, int64_t H, double eps, int dtype, int device, Address stream) {
        const char* op = "qk_norm_rope";
        QkNormRopeParams p{at(image_qkv),
                           at(text_qkv),
                           at(image_q_weight),
                           at(image_k_weight),
                           at(text_q_weight),
                           at(text_k_weight),
                           at(cos),
                           at(sin),
                           at<int32_t>(image_offsets),
                           at<int32_t>(text_offsets),
                           at(qkv),
                           RI,
                           RT,
                           B,
                           N,
                           H,
                           eps,
                           storage(op, dtype),
                           at(stream)};
        expect_heads(op, H);
        expect(op, {{"RI", 0, RI}, {"RT", 0, RT}, {"B", RI + RT > 0, B}, {"N", 1, N}},
               {{"image_qkv", RI * 3 * N * H, p.image_qkv},
                {"text_qkv", RT * 3 * N * H, p.text_qkv},
                {"image_q_weight", H, p.image_q_weight},
                {"image_k_weight", H, p.image_k_weight},
                {"text_q_weight", H, p.text_q_weight},
                {"text_k_weight", H, p.text_k_weight},
                {"cos", (RI + RT) * (H / 2), p.cos},
                {"sin", (RI + RT) * (H / 2), p.sin},
                {"image_offsets", B + 1, p.image_offsets},
                {"text_offsets", B + 1, p.text_offsets},
                {"qkv", 3 * (RI + RT) * N * H, p.qkv}});
        if (device < 0) {
          expect_offsets(op, "image_offsets", p.image_offsets, B, "RI", RI);
          expect_offsets(op, "text_offsets", p.text_offsets, B, "RT", RT);
        }
        run_unlocked(p, device);
      },
      "image_qkv"_a, "text_qkv"_a, "image_q_weight"_a, "image_k_weight"_a, "text_q_weight"_a,
      "text_k_weight"_a, "cos"_a, "sin"_a, "image_offsets"_a, "text_offsets"_a, "qkv"_a, "RI"_a,
      "RT"_a, "B"_a, "N"_a, "H"_a, "eps"_a, "dtype"_a, "device"_a, "stream"_a);
  m.def(
      "qk_norm_rope_backward",
      [](Address dqkv, Address image_qkv, Address text_qkv, Address image_q_weight,
         Address image_k_weight, Address text_q_weight, Address text_k_weight, Address cos,
         Address sin, Address image_offsets, Address text_offsets, Address dimage_qkv,
         Address dtext_qkv, Address dimage_q_weight, Address dimage_k_weight,
         Address dtext_q_weight, Address dtext_k_weight, Address workspace, int64_t RI, int64_t RT,
         int64_t B, int64_t N, int64_t H, double eps, int dtype, int device, Address stream) {
        const char* op = "qk_norm_rope_backward";
        QkNormRopeBackwardParams p{at(dqkv),
                                   at(image_qkv),
                                   at(text_qkv),
                                   at(image_q_weight),
                                   at(image_k_weight),
                                   at(text_q_weight),
                                   at(text_k_weight),
                                   at(cos),
                                   at(sin),
                                   at<int32_t>(image_offsets),
                                   at<int32_t>(text_offsets),
                                   at(dimage_qkv),
                                   at(dtext_qkv),
                                   at(dimage_q_weight),
                                   at(dimage_k_weight),
                                   at(dtext_q_weight),
                                   at(dtext_k_weight),
                                   at(workspace),
                                   RI,
                                   RT,
                                   B,
                                   N,
                                   H,
                                   eps,
                                   storage(op, dtype),
                                   at(stream)};
        expect_heads(op, H);
        expect(op, {{"RI", 0, RI}, {"RT", 0, RT}, {"B", RI + RT > 0, B}, {"N", 1, N}},
               {{"dqkv", 3 * (RI + RT) * N * H, p.dqkv},
                {"image_qkv", RI * 3 * N * H, p.image_qkv},
                {"text_qkv", RT * 3 * N * H, p.text_qkv},
                {"image_q_weight", H, p.image_q_weight},
                {"image_k_weight", H, p.image_k_weight},
                {"text_q_weight", H, p.text_q_weight},
                {"text_k_weight", H, p.text_k_weight},
                {"cos", (RI + RT) * (H / 2), p.cos},
                {"sin", (RI + RT) * (H / 2), p.sin},
                {"image_offsets", B + 1, p.image_offsets},
                {"text_offsets", B + 1, p.text_offsets},
                {"dimage_qkv", RI * 3 * N * H, p.dimage_qkv},
                {"dtext_qkv", RT * 3 * N * H, p.dtext_qkv},
                {"dimage_q_weight", H, p.dimage_q_weight},
                {"dimage_k_weight", H, p.dimage_k_weight},
                {"dtext_q_weight", H, p.dtext_q_weight},
                {"dtext_k_weight", H, p.dtext_k_weight},
                {"workspace", (split_chunks(RI) + split_chunks(RT)) * 2 * H, p.workspace}});
        if (device < 0) {
          expect_offsets(op, "image_offsets", p.image_offsets, B, "RI", RI);
          expect_offsets(op, "text_offsets", p.text_offsets, B, "RT", RT);
        }
        run_unlocked(p, device);
      },
      "dqkv"_a, "image_qkv"_a, "text_qkv"_a, "image_q_weight"_a, "image_k_weight"_a,
      "text_q_weight"_a, "text_k_weight"_a, "cos"_a, "sin"_a, "image_offsets"_a, "text_offsets"_a,
      "dimage_qkv"_a, "dtext_qkv"_a, "dimage_q_weight"_a, "dimage_k_weight"_a, "dtext_q_weight"_a,
      "dtext_k_weight"_a, "workspace"_a, "RI"_a, "RT"_a, "B"_a, "N"_a, "H"_a, "eps"_a, "dtype"_a,
      "device"_a, "stream"_a);
}

void bind_gated_residual(py::module_& m) {
  m.def(
      "gated_residual",
      [](Address x, Address y, Address gate, Address offsets, Address out, int64_t R, int64_t B,
         int64_t D, int64_t gate_stride, int dtype, int device, Address stream) {
        const char* op = "gated_residual";
        GatedResidualParams p{at(x), at(y), at(gate),    at<int32_t>(offsets), at(out),   R,
                              B,     D,     gate_stride, storage(op, dtype),   at(stream)};
        expect(op, {{"R", 0, R}, {"B", R > 0, B}, {"D", 1, D}},
               {{"x", R * D, p.x},
                {"y", R * D, p.y},
                {"gate", B * D, p.gate},
                {"offsets", B + 1, p.offsets},
                {"out", R * D, p.out}});
        if (device < 0) expect_offsets(op, "offsets", p.offsets, B, "R", R);
        run_unlocked(p, device);
      },
      "x"_a, "y"_a, "gate"_a, "offsets"_a, "out"_a, "R"_a, "B"_a, "D"_a, "gate_stride"_a, "dtype"_a,
      "device"_a, "stream"_a);
  m.def(
      "gated_residual_backward",
      [](Address dout, Address y, Address gate, Address offsets, Address dy, Address dgate,
         Address workspace, int64_t R, int64_t B, int64_t D, int64_t gate_stride, int dtype,
         int device, Address stream) {
        const char* op = "gated_residual_backward";
        GatedResidualBackwardParams p{at(dout),  at(y),     at(gate),      at<int32_t>(offsets),
                                      at(dy),    at(dgate), at(workspace), R,
                                      B,         D,         gate_stride,   storage(op, dtype),
                                      at(stream)};
        expect(op, {{"R", 0, R}, {"B", R > 0, B}, {"D", 1, D}},
               {{"dout", R * D, p.dout},
                {"y", R * D, p.y},
                {"gate", B * D, p.gate},
                {"offsets", B + 1, p.offsets},
                {"dy", R * D, p.dy},
                {"dgate", B * D, p.dgate},
                {"workspace", split_slots(R, B) * D, p.workspace}});
        if (device < 0) expect_offsets(op, "offsets", p.offsets, B, "R", R);
        run_unlocked(p, device);
      },
      "dout"_a, "y"_a, "gate"_a, "offsets"_a, "dy"_a, "dgate"_a, "workspace"_a, "R"_a, "B"_a, "D"_a,
      "gate_stride"_a, "dtype"_a, "device"_a, "stream"_a);
  m.def(
      "gated_residual_norm_modulate",
      [](Address x, Address y, Address gate, Address weight, Address scale, Address shift,
         Address offsets, Address x_new, Address normed, int64_t R, int64_t B, int64_t D,
         int64_t gate_stride, int64_t scale_stride, int64_t shift_stride, double eps, int dtype,
         int device, Address stream) {
        const char* op = "gated_residual_norm_modulate";
        GatedResidualNormModulateParams p{at(x),
                                          at(y),
                                          at(gate),
                                          at(weight),
                                          at(scale),
                                          at(shift),
                                          at<int32_t>(offsets),
                                          at(x_new),
                                          at(normed),
                                          R,
                                          B,
                                          D,
                                          gate_stride,
                                          scale_stride,
                                          shift_stride,
                                          eps,
                                          storage(op, dtype),
                                          at(stream)};
        expect(op, {{"R", 0, R}, {"B", R > 0, B}, {"D", 1, D}},
               {{"x", R * D, p.x},
                {"y", R * D, p.y},
                {"gate", B * D, p.gate},
                {"weight", D, p.weight},
                {"scale", B * D, p.scale},
                {"shift", B * D, p.shift},
                {"offsets", B + 1, p.offsets},
                {"x_new", R * D, p.x_new},
                {"normed", R * D, p.normed}});
        if (device < 0) expect_offsets(op, "offsets", p.offsets, B, "R", R);
        run_unlocked(p, device);
      },
      "x"_a, "y"_a, "gate"_a, "weight"_a, "scale"_a, "shift"_a, "offsets"_a, "x_new"_a, "normed"_a,
      "R"_a, "B"_a, "D"_a, "gate_stride"_a, "scale_stride"_a, "shift_stride"_a, "eps"_a, "dtype"_a,
      "device"_a, "stream"_a);
  m.def(
      "gated_residual_norm_modulate_backward",
      [](Address dx_new, Address dnormed, Address x_new, Address y, Address gate, Address weight,
         Address scale, Address offsets, Address dx, Address dy, Address dgate, Address dweight,
         Address dscale, Address dshift, Address workspace, int64_t R, int64_t B, int64_t D,
         int64_t gate_stride, int64_t scale_stride, double eps, int dtype, int device,
         Address stream) {
        const char* op = "gated_residual_norm_modulate_backward";
        GatedResidualNormModulateBackwardParams p{at(dx_new),
                                                  at(dnormed),
                                                  at(x_new),
                                                  at(y),
                                                  at(gate),
                                                  at(weight),
                                                  at(scale),
                                                  at<int32_t>(offsets),
                                                  at(dx),
                                                  at(dy),
                                                  at(dgate),
                                                  at(dweight),
                                                  at(dscale),
                                                  at(dshift),
                                                  at(workspace),
                                                  R,
                                                  B,
                                                  D,
                                                  gate_stride,
                                                  scale_stride,
                                                  eps,
                                                  storage(op, dtype),
                                                  at(stream)};
        expect(op, {{"R", 0, R}, {"B", R > 0, B}, {"D", 1, D}},
               {{"dx_new", R * D, p.dx_new},
                {"dnormed", R * D, p.dnormed},
                {"x_new", R * D, p.x_new},
                {"y", R * D, p.y},
                {"gate", B * D, p.gate},
                {"weight", D, p.weight},
                {"scale", B * D, p.scale},
                {"offsets", B + 1, p.offsets},
                {"dx", R * D, p.dx},
                {"dy", R * D, p.dy},
                {"dgate", B * D, p.dgate},
                {"dweight", D, p.dweight},
                {"dscale", B * D, p.dscale},
                {"dshift", B * D, p.dshift},
                {"workspace", split_slots(R, B) * 3 * D, p.workspace}});
        if (device < 0) expect_offsets(op, "offsets", p.offsets, B, "R", R);
        run_unlocked(p, device);
      },
      "dx_new"_a, "dnormed"_a, "x_new"_a, "y"_a, "gate"_a, "weight"_a, "scale"_a, "offsets"_a,
      "dx"_a, "dy"_a, "dgate"_a, "dweight"_a, "dscale"_a, "dshift"_a, "workspace"_a, "R"_a, "B"_a,
      "D"_a, "gate_stride"_a, "scale_stride"_a, "eps"_a, "dtype"_a, "device"_a, "stream"_a);
}

void bind_swiglu(py::module_& m) {
  m.def(
      "swiglu",
      [](Address h, Address y, int64_t R, int64_t F, int dtype, int device, Address stream) {
        const char* op = "swiglu";
        SwigluParams p{at(h), at(y), R, F, storage(op, dtype), at(stream)};
        expect(op, {{"R", 0, R}, {"F", 1, F}}, {{"h", R * 2 * F, p.h}, {"y", R * F, p.y}});
        run_unlocked(p, device);
      },
      "h"_a, "y"_a, "R"_a, "F"_a, "dtype"_a, "device"_a, "stream"_a);
  m.def(
      "swiglu_backward",
      [](Address dy, Address h, Address dh, int64_t R, int64_t F, int dtype, int device,
         Address stream) {
        const char* op = "swiglu_backward";
        SwigluBackwardParams p{at(dy), at(h), at(dh), R, F, storage(op, dtype), at(stream)};
        expect(op, {{"R", 0, R}, {"F", 1, F}},
               {{"dy", R * F, p.dy}, {"h", R * 2 * F, p.h}, {"dh", R * 2 * F, p.dh}});
        run_unlocked(p, device);
      },
      "dy"_a, "h"_a, "dh"_a, "R"_a, "F"_a, "dtype"_a, "device"_a, "stream"_a);
}

void bind_guidance_step(py::module_& m) {
  m.def(
      "guidance_step",
      [](Address x, Address cond, Address uncond, Address delta, Address offsets, Address out,
         int64_t R, int64_t B, int64_t C, double guidance, int dtype, int device, Address stream) {
        const char* op = "guidance_step";
        GuidanceStepParams p{
            at(x), at(cond), at(uncond), at(delta), at<int32_t>(offsets), at(out),
            R,     B,        C,          guidance,  storage(op, dtype),   at(stream)};
        expect(op, {{"R", 0, R}, {"B", R > 0, B}, {"C", 1, C}},
               {{"x", R * C, p.x},
                {"cond", R * C, p.cond},
                {"delta", B, p.delta},
                {"offsets", B + 1, p.offsets},
                {"out", R * C, p.out}});
        if (device < 0) expect_offsets(op, "offsets", p.offsets, B, "R", R);
        run_unlocked(p, device);
      },
      "x"_a, "cond"_a, "uncond"_a, "delta"_a, "offsets"_a, "out"_a, "R"_a, "B"_a, "C"_a,
      "guidance"_a, "dtype"_a, "device"_a, "stream"_a);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of lens.ops";
  bind_pack_tokens(m);
  bind_rms_norm_modulate(m);
  bind_qk_norm_rope(m);
  bind_gated_residual(m);
  bind_swiglu(m);
  bind_guidance_step(m);
#if defined(LENS_WITH_CUDA)
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif
  m.attr("split_rows") = kSplitRows;
  m.def("isa", [] { return isas()[current_isa()].name; });
  m.def("set_isa", &set_isa, "name"_a);
  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (const Isa& isa : isas()) {
      if (isa.available()) names.push_back(isa.name);
    }
    return names;
  });
}
